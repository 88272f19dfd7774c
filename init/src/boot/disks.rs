//! Block devices, found by the serial that the host gave them (virtio-blk's). Never by letter: a letter only tells which device was seen first.

use std::fs::{self, File};
use std::io::{self, BufRead, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

/// The kernel's list of block devices, partitions included.
const DEVICES: &str = "/sys/class/block";
/// How long a device may take to appear.
const DEADLINE: Duration = Duration::from_secs(5);
/// The multicast group of the kernel's own events, as opposed to udev's (libudev's UDEV_MONITOR_KERNEL).
const KERNEL_EVENTS: u32 = 1;

/// Bytes that are read at once: more than the kernel would read ahead by itself, because each request of an emulated disk has its price.
const CHUNK: usize = 512 * 1024;
/// What direct I/O is aligned to, in memory and on the disk: any disk's blocks.
const BLOCK: usize = 4096;

/// A disk that is read once, from its beginning: past the page cache, which would have another copy of it, and take the time to make it.
pub struct Reader {
    disk: File,
    buffer: Vec<u8>,
    /// The part of the buffer that is aligned, and of that the part that is yet to be read.
    aligned: usize,
    unread: std::ops::Range<usize>,
    position: u64,
}

impl Reader {
    fn new(disk: File) -> Self {
        let buffer = vec![0; CHUNK + BLOCK];
        let aligned = buffer.as_ptr().align_offset(BLOCK);
        Self { disk, buffer, aligned, unread: 0..0, position: 0 }
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position
    }
}

impl BufRead for Reader {
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

impl Read for Reader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(bytes)?;
        self.consume(read);
        Ok(read)
    }
}

/// Opens the block device with this serial for reading, and waits for it if it is not there yet.
///
/// # Errors
/// TimedOut when it does not appear within 5 s, with its serial and those that there are; or what the kernel said.
pub fn open(serial: &str) -> io::Result<Reader> {
    // Before the first look, so that a device that comes after it is heard of.
    let events = listen()?;
    let found = wait(&events, DEADLINE, || look(serial))?;
    found.map(Reader::new).ok_or_else(|| {
        let there = match serials() {
            Ok(all) if all.is_empty() => "there is none".to_owned(),
            Ok(all) => {
                let all: Vec<_> = all.iter().map(|(name, serial)| format!("{name} with {serial:?}")).collect();
                format!("there is {}", all.join(", "))
            }
            Err(error) => error.to_string(),
        };
        let what = format!("no block device with the serial {serial:?} within {} s; {there}", DEADLINE.as_secs());
        io::Error::new(ErrorKind::TimedOut, what)
    })
}

/// The kernel's events of devices (uevents): one comes when a disk is ready to be opened.
fn listen() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let events = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
    bind(events.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
    Ok(events)
}

/// What `look` finds, at once or after one of the events; nothing when the deadline has passed.
fn wait<T>(
    events: &OwnedFd,
    deadline: Duration,
    mut look: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up, so that the last fraction of a millisecond is not spent spinning.
        let left = PollTimeout::try_from(left.as_millis() + u128::from(!left.is_zero())).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => return Ok(None),
            Ok(_) => forget(events)?,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes all events that are there. What they say is not of interest: the list is looked through again.
fn forget(events: &OwnedFd) -> io::Result<()> {
    loop {
        match recv(events.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
            // Some were lost, because there were too many: one is enough.
            Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn look(serial: &str) -> io::Result<Option<File>> {
    let Some((name, _)) = serials()?.into_iter().find(|(_, found)| found == serial) else { return Ok(None) };
    match File::options().read(true).custom_flags(libc::O_DIRECT).open(format!("/dev/{name}")) {
        Ok(device) => Ok(Some(device)),
        // It is in the list somewhat sooner than it can be opened, which its event tells.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// All block devices that have a serial, with it.
fn serials() -> io::Result<Vec<(String, String)>> {
    let mut serials = Vec::new();
    for device in fs::read_dir(DEVICES)? {
        let name = device?.file_name().to_string_lossy().into_owned();
        match fs::read_to_string(format!("{DEVICES}/{name}/serial")) {
            Ok(serial) => serials.push((name, serial.trim_end().to_owned())),
            // Partitions, loop devices and the like have none; others may go while they are looked at.
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
    fn what_comes_late_is_found_by_its_event() {
        let (kernel, events) = UnixDatagram::pair().unwrap();
        let events = OwnedFd::from(events);
        let mut looks = 0;
        let found = wait(&events, Duration::from_secs(60), || {
            looks += 1;
            // Two events, that come after a look which has found nothing.
            let news = if looks < 3 { kernel.send(b"add@/devices/x").map(drop) } else { Ok(()) };
            news.map(|()| (looks == 3).then_some("vdb"))
        });
        assert_eq!((found.unwrap(), looks), (Some("vdb"), 3));
    }

    #[test]
    fn what_never_comes_is_waited_for_until_the_deadline_and_not_looked_for_meanwhile() {
        let (kernel, events) = UnixDatagram::pair().unwrap();
        let events = OwnedFd::from(events);
        kernel.send(b"add@/devices/another").unwrap();
        let (began, deadline) = (Instant::now(), Duration::from_millis(50));
        let mut looks = 0;
        let found = wait(&events, deadline, || {
            looks += 1;
            Ok(None::<()>)
        });
        assert_eq!((found.unwrap(), looks), (None, 2));
        assert!(began.elapsed() >= deadline);
    }

    #[test]
    fn what_cannot_be_looked_for_is_told() {
        let (_kernel, events) = UnixDatagram::pair().unwrap();
        let failed = wait::<()>(&events.into(), Duration::from_secs(60), || Err(io::Error::other("why")));
        assert_eq!(failed.unwrap_err().to_string(), "why");
    }
}
