//! Changes of the host's files that the shim reports to the guest, where virtio-fs does not carry them.
//!
//! Each change is an event of inotify(7) as the host's kernel has reported it: the mask and the cookie as 32-bit
//! little-endian numbers, the length of the name as one byte, and the name. The name is empty if the watched folder or
//! file itself has changed. By hand, because a message for each would cost the init 2 KiB.

/// Name of a source's mount point in its entry of the share.
pub const SHARE_SOURCE: &str = "source";

/// Mask and cookie, bytes.
const NUMBERS: usize = 8;

/// A change of a watched folder or file, or of an entry of the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change<'a> {
    /// `IN_` flags of inotify(7).
    pub mask: u32,
    /// Connects the two events of a rename.
    pub cookie: u32,
    /// The name of the folder's entry; empty for the watched folder or file itself.
    pub name: &'a [u8],
}

impl Change<'_> {
    /// Appends the change to others. Without effect if the name is longer than 255 bytes, which no filesystem allows
    /// (`NAME_MAX`).
    pub fn encode(&self, changes: &mut Vec<u8>) {
        if let Ok(length) = u8::try_from(self.name.len()) {
            changes.extend(self.mask.to_le_bytes());
            changes.extend(self.cookie.to_le_bytes());
            changes.push(length);
            changes.extend(self.name);
        }
    }
}

/// Takes the first change off `changes`. None at their end, or if the rest is incomplete.
pub fn take<'a>(changes: &mut &'a [u8]) -> Option<Change<'a>> {
    let (numbers, rest) = changes.split_first_chunk::<NUMBERS>()?;
    let (mask, cookie) = numbers.split_first_chunk()?;
    let (length, rest) = rest.split_first()?;
    let (name, rest) = rest.split_at_checked((*length).into())?;
    *changes = rest;
    Some(Change { mask: u32::from_le_bytes(*mask), cookie: u32::from_le_bytes(*cookie.first_chunk()?), name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_read_as_they_were_written_and_an_incomplete_one_is_not() {
        let long = [b'x'; 255];
        let all = [
            Change { mask: 0x4000_0100, cookie: 0, name: b"..data" },
            Change { mask: 0x80, cookie: u32::MAX, name: &long },
            Change { mask: 4, cookie: 0, name: b"" },
        ];
        let mut bytes = Vec::new();
        all.iter().for_each(|change| change.encode(&mut bytes));
        let mut rest = &bytes[..];
        let read: Vec<_> = std::iter::from_fn(|| take(&mut rest)).collect();
        assert_eq!((read.as_slice(), rest), (&all[..], &b""[..]));
        for length in 0..bytes.len() {
            let mut cut = &bytes[..length];
            assert!(std::iter::from_fn(|| take(&mut cut)).count() < all.len(), "{length}");
        }
        let before = bytes.clone();
        Change { mask: 1, cookie: 1, name: &[b'x'; 256] }.encode(&mut bytes);
        assert_eq!(bytes, before);
    }
}
