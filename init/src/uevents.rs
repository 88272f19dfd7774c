//! The kernel's uevents, as a signal that something has changed. What they say does not matter.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

/// Multicast group of the kernel's uevents, as opposed to udev's (libudev: UDEV_MONITOR_KERNEL).
const KERNEL_EVENTS: u32 = 1;

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

/// Discards all pending events.
///
/// # Errors
/// Those of recv(2).
pub(crate) fn drain(uevents: &OwnedFd) -> io::Result<()> {
    loop {
        match recv(uevents.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
            // ENOBUFS: the kernel dropped events. One is enough.
            Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
