//! The extras disk: files for the guest itself, as they lie one after the other on a read-only block device. The host writes it and the guest reads
//! it, once, from its beginning to its end.
//!
//! [`MAGIC`], the number of files (u32), then for each its permission bits (u32), its size (u64), the length of its path (u32) and its path; numbers are
//! little-endian. The contents follow in the same order, each from the next multiple of [`ALIGNMENT`] on, and the disk ends at one as well.

use std::io::{self, Error, ErrorKind, Read};
use std::time::Duration;

/// virtio serial of the disk, by which the guest finds it.
pub const SERIAL: &str = "husk-extras";
/// Where the supervisor agent is in the guest. Extras that have it make a guest with an agent.
pub const SUPERVISOR: &str = "/run/husk/supervisor";
/// What the supervisor agent has from SIGTERM to SIGKILL when its guest ends; the host waits so much longer for that.
pub const SUPERVISOR_GRACE: Duration = Duration::from_secs(5);
/// Has the agent's pid while it runs.
pub const SUPERVISOR_PID: &str = "/run/husk-supervisor.pid";
/// Has the agent's output.
pub const SUPERVISOR_LOG: &str = "/var/log/husk-supervisor.log";
/// Has its output from before that.
pub const SUPERVISOR_LOG_BEFORE: &str = "/var/log/husk-supervisor.log.1";

/// What the disk begins with: no partition table, and no file system.
pub const MAGIC: &[u8; 12] = b"husk extras\n";
/// Where contents begin: a page, so that they can go from the disk into pages.
pub const ALIGNMENT: u64 = 4096;
/// Most files on a disk.
pub const FILES_MAX: usize = 256;
/// Longest path, bytes (PATH_MAX, with its NUL).
pub const PATH_MAX: usize = 4095;

/// A file on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
}

/// What stands before the contents of these files, without what fills it up to [`ALIGNMENT`].
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

/// The files of a disk that is read from its beginning, and where the first content begins.
///
/// # Errors
/// InvalidData when it is no extras disk, else what the reader says.
pub fn decode(disk: &mut impl Read) -> io::Result<(Vec<File>, u64)> {
    let mut disk = Counting { inner: disk, read: 0 };
    if &disk.bytes::<12>()? != MAGIC {
        return Err(invalid("it does not begin as an extras disk does"));
    }
    let count = u32::from_le_bytes(disk.bytes()?) as usize;
    if count > FILES_MAX {
        return Err(invalid("it has too many files"));
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
        let path = String::from_utf8(path).map_err(|_| invalid("a path is no UTF-8"))?;
        files.push(File { path, mode, size });
    }
    Ok((files, disk.read.next_multiple_of(ALIGNMENT)))
}

/// Where the content after one of `size` bytes begins, that begins at `at`; nothing if there can be no such disk.
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
    fn what_was_written_is_read() {
        for files in [vec![], vec![file("/a", 0)], vec![file("/run/husk/supervisor", 1 << 40), file("/ä", 7)]] {
            let head = encode(&files);
            assert_eq!(decode(&mut &head[..]).unwrap(), (files, ALIGNMENT));
        }
        let long = vec![file(&"x".repeat(PATH_MAX), 1); 2];
        assert_eq!(decode(&mut &encode(&long)[..]).unwrap(), (long, 3 * ALIGNMENT));
    }

    #[test]
    fn what_is_no_extras_disk_is_refused() {
        let good = encode(&[file("/a", 3)]);
        let with = |at: usize, bytes: &[u8]| {
            let mut head = good.clone();
            head[at..at + bytes.len()].copy_from_slice(bytes);
            head
        };
        let table = [
            (Vec::new(), "failed to fill whole buffer"),
            (with(0, b"H"), "it does not begin as an extras disk does"),
            (with(12, &257u32.to_le_bytes()), "it has too many files"),
            (with(12, &2u32.to_le_bytes()), "failed to fill whole buffer"),
            (with(28, &4096u32.to_le_bytes()), "a path is too long"),
            (with(32, &[0xff]), "a path is no UTF-8"),
        ];
        for (head, wanted) in table {
            assert_eq!(decode(&mut &head[..]).unwrap_err().to_string(), wanted, "{head:?}");
        }
    }

    #[test]
    fn contents_begin_at_pages() {
        let table =
            [((4096, 0), Some(4096)), ((4096, 1), Some(8192)), ((4096, 4096), Some(8192)), ((1, u64::MAX), None)];
        for ((at, size), wanted) in table {
            assert_eq!(after(at, size), wanted, "{at} {size}");
        }
        assert_eq!(after(0, u64::MAX), None);
    }
}
