//! The extras disk: files for the guest itself, one after the other on a read-only block device. The host writes the
//! disk, and the guest reads it once from beginning to end.
//!
//! The header is [`MAGIC`], the number of files (u32), and for each file its permission bits (u32), its size (u64), the
//! length of its path (u32) and its path. Integers are little-endian. The contents follow in the same order. Each
//! starts at a multiple of [`ALIGNMENT`], and the disk's size is a multiple of it as well.

use std::io::{self, Error, ErrorKind, Read};
use std::time::Duration;

/// virtio serial of the disk, by which the guest finds it.
pub const SERIAL: &str = "husk-extras";
/// Path of the supervisor agent in the guest. The guest runs an agent if the extras contain this file.
pub const SUPERVISOR: &str = "/run/husk/supervisor";
/// Time between SIGTERM and SIGKILL for the supervisor agent when the guest shuts down. The host's own deadline is
/// longer by as much.
pub const SUPERVISOR_GRACE: Duration = Duration::from_secs(5);
/// Contains the agent's PID while the agent runs.
pub const SUPERVISOR_PID: &str = "/run/husk-supervisor.pid";
/// The agent's current log.
pub const SUPERVISOR_LOG: &str = "/var/log/husk-supervisor.log";
/// The agent's previous log, after rotation.
pub const SUPERVISOR_LOG_BEFORE: &str = "/var/log/husk-supervisor.log.1";

/// First bytes of the disk, which has neither a partition table nor a file system.
pub const MAGIC: &[u8; 12] = b"husk extras\n";
/// Alignment of the contents, bytes: a page, so that the guest can read them from the disk directly into pages.
pub const ALIGNMENT: u64 = 4096;
/// Most files on a disk.
pub const FILES_MAX: usize = 256;
/// Longest path, bytes (PATH_MAX without the NUL).
pub const PATH_MAX: usize = 4095;

/// A file on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Size, bytes.
    pub size: u64,
}

/// Encodes the disk's header for these files, without padding up to [`ALIGNMENT`].
pub fn encode(files: &[File]) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend((files.len() as u32).to_le_bytes());
    for file in files {
        head.extend(file.mode.to_le_bytes());
        head.extend(file.size.to_le_bytes());
        head.extend((file.path.len() as u32).to_le_bytes());
        head.extend(file.path.as_bytes());
    }
    head
}

/// Reads the header of a disk from its beginning. Returns the files, and the offset of the first content.
///
/// # Errors
/// InvalidData if the disk is not an extras disk, or the reader's error.
pub fn decode(disk: &mut impl Read) -> io::Result<(Vec<File>, u64)> {
    let mut disk = Counting { inner: disk, read: 0 };
    if &disk.bytes::<12>()? != MAGIC {
        return Err(invalid("not an extras disk"));
    }
    let count = u32::from_le_bytes(disk.bytes()?) as usize;
    if count > FILES_MAX {
        return Err(invalid("too many files"));
    }
    let mut files = Vec::with_capacity(count);
    for _ in 0..count {
        let mode = u32::from_le_bytes(disk.bytes()?);
        let size = u64::from_le_bytes(disk.bytes()?);
        let length = u32::from_le_bytes(disk.bytes()?) as usize;
        if length > PATH_MAX {
            return Err(invalid("a path is too long"));
        }
        let mut path = vec![0; length];
        disk.fill(&mut path)?;
        let path = String::from_utf8(path).map_err(|_| invalid("a path is not UTF-8"))?;
        files.push(File { path, mode, size });
    }
    Ok((files, disk.read.next_multiple_of(ALIGNMENT)))
}

/// Offset of the content that follows one of `size` bytes at offset `at`. `None` if it overflows.
pub fn after(at: u64, size: u64) -> Option<u64> {
    at.checked_add(size)?.checked_next_multiple_of(ALIGNMENT)
}

fn invalid(why: &str) -> Error {
    Error::new(ErrorKind::InvalidData, why)
}

struct Counting<'a, R> {
    inner: &'a mut R,
    read: u64,
}

impl<R: Read> Counting<'_, R> {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact(bytes)?;
        self.read += bytes.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, size: u64) -> File {
        File { path: path.into(), mode: 0o640, size }
    }

    #[test]
    fn a_header_decodes_to_the_files_it_was_encoded_from() {
        for files in [vec![], vec![file("/a", 0)], vec![file("/run/husk/supervisor", 1 << 40), file("/ä", 7)]] {
            let head = encode(&files);
            assert_eq!(decode(&mut &head[..]).unwrap(), (files, ALIGNMENT));
        }
        let long = vec![file(&"x".repeat(PATH_MAX), 1); 2];
        assert_eq!(decode(&mut &encode(&long)[..]).unwrap(), (long, 3 * ALIGNMENT));
    }

    #[test]
    fn an_invalid_header_is_rejected() {
        let good = encode(&[file("/a", 3)]);
        let with = |at: usize, bytes: &[u8]| {
            let mut head = good.clone();
            head[at..at + bytes.len()].copy_from_slice(bytes);
            head
        };
        let table = [
            (Vec::new(), "failed to fill whole buffer"),
            (with(0, b"H"), "not an extras disk"),
            (with(12, &257u32.to_le_bytes()), "too many files"),
            (with(12, &2u32.to_le_bytes()), "failed to fill whole buffer"),
            (with(28, &4096u32.to_le_bytes()), "a path is too long"),
            (with(32, &[0xff]), "a path is not UTF-8"),
        ];
        for (head, expected) in table {
            assert_eq!(decode(&mut &head[..]).unwrap_err().to_string(), expected, "{head:?}");
        }
    }

    #[test]
    fn contents_start_at_page_boundaries() {
        let table =
            [((4096, 0), Some(4096)), ((4096, 1), Some(8192)), ((4096, 4096), Some(8192)), ((1, u64::MAX), None)];
        for ((at, size), expected) in table {
            assert_eq!(after(at, size), expected, "{at} {size}");
        }
        assert_eq!(after(0, u64::MAX), None);
    }
}
