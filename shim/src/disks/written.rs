//! The parts of a sparse file that have been written.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// Most parts and most bytes, together, that are worth to be encrypted before a container starts. A filesystem that was
/// just made on a disk of 16 TiB has fewer.
const MOST_EXTENTS: usize = 1 << 16;
const MOST_BYTES: u64 = 1 << 30;

/// A part of a file, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Finds the parts. A filesystem of the host that does not know calls the whole file written.
///
/// # Errors
/// Those of lseek(2), and Other if there is too much.
pub(super) fn find(file: &File) -> io::Result<Vec<Extent>> {
    let (mut extents, mut at, mut bytes) = (Vec::new(), 0, 0);
    loop {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            // No data up to the end.
            Err(Errno::ENXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        at = lseek(file, start, Whence::SeekHole)?;
        let number = |offset: i64| u64::try_from(offset).map_err(io::Error::other);
        let (offset, end) = (number(start)?, number(at)?);
        let length = end.saturating_sub(offset);
        bytes += length;
        extents.push(Extent { offset, length });
        if extents.len() > MOST_EXTENTS || bytes > MOST_BYTES {
            let text = format!("more than {MOST_EXTENTS} parts or {MOST_BYTES} bytes of the file are written");
            return Err(io::Error::other(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_are_not_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        assert_eq!(find(&file).unwrap(), []);
        file.write_all_at(b"x", 0).unwrap();
        file.write_all_at(b"x", (8 << 20) - 1).unwrap();
        let found = find(&file).unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!((found[0].offset, found[1].offset + found[1].length), (0, 8 << 20));
        assert!(found.iter().all(|extent| extent.length <= 1 << 20), "{found:?}");
    }
}
