//! The kernel's uevents, as a signal that something has changed. Of what they say, only the path of the device is used.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

/// Multicast group of the kernel's uevents, as opposed to udev's (libudev: UDEV_MONITOR_KERNEL).
const KERNEL_EVENTS: u32 = 1;

/// How much of an event is read, bytes: paths of devices are shorter.
const BEGINNING: usize = 512;

/// Subscribes to the kernel's uevents. The descriptor does not block.
///
/// # Errors
/// Those of socket(2) and bind(2).
pub(crate) fn subscribe() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let uevents = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
    bind(uevents.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
    Ok(uevents)
}

/// Discards all pending events. Returns whether `matters` is true for the beginning of one of them, ACTION@PATH, or the
/// kernel has dropped some.
///
/// # Errors
/// Those of recv(2).
pub(crate) fn drain(uevents: &OwnedFd, matters: impl Fn(&[u8]) -> bool) -> io::Result<bool> {
    let (mut any, mut event) = (false, [0; BEGINNING]);
    loop {
        match recv(uevents.as_raw_fd(), &mut event, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::EAGAIN) => return Ok(any),
            Ok(length) => {
                let beginning = event[..length].split(|byte| *byte == 0).next().unwrap_or_default();
                any |= matters(beginning);
            }
            Err(Errno::EINTR) => {}
            // The kernel has dropped events.
            Err(Errno::ENOBUFS) => any = true,
            Err(error) => return Err(error.into()),
        }
    }
}
