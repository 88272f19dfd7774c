//! Reads a disk of the boot from start to end.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::OpenOptionsExt;

use crate::disks::find::{by_serial, find};

/// Bytes per read: more than the kernel's readahead, because every request to an emulated disk is expensive.
const CHUNK: usize = 512 * 1024;
/// Alignment for direct I/O, in memory and on the disk: covers the block size of any disk.
const BLOCK: usize = 4096;

/// Reads a disk once from start to end. Bypasses the page cache, which would cost a second copy and the time to make
/// it.
pub(super) struct DiskReader {
    disk: File,
    buffer: Vec<u8>,
    /// Offset of the aligned chunk in `buffer`.
    aligned: usize,
    /// The part of the chunk that nobody has consumed yet.
    unread: std::ops::Range<usize>,
    position: u64,
}

impl DiskReader {
    fn new(disk: File) -> Self {
        let buffer = vec![0; CHUNK + BLOCK];
        let aligned = buffer.as_ptr().align_offset(BLOCK);
        Self { disk, buffer, aligned, unread: 0..0, position: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }
}

impl BufRead for DiskReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let chunk = &mut self.buffer[self.aligned..][..CHUNK];
        if self.unread.is_empty() {
            self.unread = 0..self.disk.read(chunk)?;
        }
        Ok(&chunk[self.unread.clone()])
    }

    fn consume(&mut self, amount: usize) {
        self.unread.start += amount;
        self.position += amount as u64;
    }
}

impl Read for DiskReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(bytes)?;
        self.consume(read);
        Ok(read)
    }
}

/// Opens the block device with this serial for reading, and waits until it appears.
///
/// # Errors
/// Those of [`find`].
pub(super) fn open(serial: &str) -> io::Result<DiskReader> {
    find(serial, File::options().read(true).custom_flags(libc::O_DIRECT), || Ok(()), by_serial)
        .map(|(_, disk)| DiskReader::new(disk))
}
