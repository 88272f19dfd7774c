//! Finds block devices by the serial that the host gave them (virtio-blk). Device letters are useless: they follow the
//! order of discovery.

use std::fs::{self, File};
use std::io::{self, BufRead, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::uevents::{drain, subscribe};

/// The kernel's list of block devices, including partitions.
const DEVICES: &str = "/sys/class/block";
/// Time for a device to appear.
const DEADLINE: Duration = Duration::from_secs(5);

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
/// TimedOut when the device does not appear within 5 s, with the serials that exist; or an error of the kernel.
pub(super) fn open(serial: &str) -> io::Result<DiskReader> {
    // Subscribe before the first search: a device that appears in between would be missed. An event arrives when a disk
    // is ready to be opened.
    let uevents = subscribe()?;
    let found = wait(&uevents, DEADLINE, || find(serial))?;
    found.map(DiskReader::new).ok_or_else(|| {
        let present = match serials() {
            Ok(all) if all.is_empty() => "there are none".to_owned(),
            Ok(all) => {
                let all: Vec<_> = all.iter().map(|(name, serial)| format!("{name} ({serial:?})")).collect();
                format!("present: {}", all.join(", "))
            }
            Err(error) => error.to_string(),
        };
        let what = format!("no block device with serial {serial:?} within {} s; {present}", DEADLINE.as_secs());
        io::Error::new(ErrorKind::TimedOut, what)
    })
}

/// Calls `find` at once and after each batch of events until it finds something. Returns None at the deadline.
fn wait<T>(
    uevents: &OwnedFd,
    deadline: Duration,
    mut find: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = find()? {
            return Ok(Some(found));
        }
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up: otherwise the loop would spin during the last fraction of a millisecond.
        let left = PollTimeout::try_from(left.as_millis() + u128::from(!left.is_zero())).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(uevents.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => return Ok(None),
            Ok(_) => drain(uevents)?,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn find(serial: &str) -> io::Result<Option<File>> {
    let Some((name, _)) = serials()?.into_iter().find(|(_, found)| found == serial) else { return Ok(None) };
    match File::options().read(true).custom_flags(libc::O_DIRECT).open(format!("/dev/{name}")) {
        Ok(device) => Ok(Some(device)),
        // A device is listed shortly before it can be opened. Its uevent follows.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Name and serial of every block device that has a serial.
fn serials() -> io::Result<Vec<(String, String)>> {
    let mut serials = Vec::new();
    for device in fs::read_dir(DEVICES)? {
        let name = device?.file_name().to_string_lossy().into_owned();
        match fs::read_to_string(format!("{DEVICES}/{name}/serial")) {
            Ok(serial) => serials.push((name, serial.trim_end().to_owned())),
            // Partitions and loop devices have none, and a device may disappear during the search.
            Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("read the serial of {name}: {error}"))),
        }
    }
    Ok(serials)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_late_device_is_found_by_its_uevent() {
        let (kernel, uevents) = UnixDatagram::pair().unwrap();
        let uevents = OwnedFd::from(uevents);
        let mut searches = 0;
        let found = wait(&uevents, Duration::from_secs(60), || {
            searches += 1;
            // Two events, each after a search without a result.
            let sent = if searches < 3 { kernel.send(b"add@/devices/x").map(drop) } else { Ok(()) };
            sent.map(|()| (searches == 3).then_some("vdb"))
        });
        assert_eq!((found.unwrap(), searches), (Some("vdb"), 3));
    }

    #[test]
    fn a_missing_device_is_awaited_until_the_deadline_without_polling() {
        let (kernel, uevents) = UnixDatagram::pair().unwrap();
        let uevents = OwnedFd::from(uevents);
        kernel.send(b"add@/devices/another").unwrap();
        let (began, deadline) = (Instant::now(), Duration::from_millis(50));
        let mut searches = 0;
        let found = wait(&uevents, deadline, || {
            searches += 1;
            Ok(None::<()>)
        });
        assert_eq!((found.unwrap(), searches), (None, 2));
        assert!(began.elapsed() >= deadline);
    }

    #[test]
    fn a_failed_search_ends_the_wait_with_its_error() {
        let (_kernel, uevents) = UnixDatagram::pair().unwrap();
        let failed = wait::<()>(&uevents.into(), Duration::from_secs(60), || Err(io::Error::other("why")));
        assert_eq!(failed.unwrap_err().to_string(), "why");
    }
}
