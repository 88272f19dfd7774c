//! The kernel's vsock device (vhost_vsock): guests have CIDs of the whole machine, and ports of the host are the whole machine's, so whoever accepts a
//! connection asks where it comes from.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use super::{Error, Result};

/// The device.
pub const DEVICE: &str = "/dev/vhost-vsock";
/// Pause after a failed accept, which is a lack of descriptors or memory: without it the loop would turn until some come free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A device for one guest, without a CID yet.
pub fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// Gives the device this CID; false when another guest of the machine has it, whoever runs that.
pub fn claim(device: &File, cid: u32) -> io::Result<bool> {
    // VHOST_VSOCK_SET_GUEST_CID (linux/vhost.h): _IOW(VHOST_VIRTIO, 0x60, __u64). QEMU does it again, which changes nothing.
    const SET_GUEST_CID: libc::c_ulong = 0x4008_af60;
    let cid = u64::from(cid);
    // SAFETY: the descriptor is open, and the call reads one u64, which lives through it.
    match unsafe { libc::ioctl(device.as_raw_fd(), SET_GUEST_CID, &raw const cid) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EADDRINUSE) => Ok(false),
            error => Err(error),
        },
    }
}

/// Connects to a port of the guest with this CID. Dropping the future gives up.
pub async fn connect(cid: u32, port: u32, deadline: Duration) -> Result<VsockStream> {
    match tokio::time::timeout(deadline, VsockStream::connect(VsockAddr::new(cid, port))).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) if error.raw_os_error() == Some(libc::ECONNRESET) => Err(Error::Refused(port)),
        Ok(Err(source)) => Err(Error::Stream { port, source }),
        Err(_) => Err(Error::TimedOut { port, deadline }),
    }
}

/// A port of the host.
pub struct Listener {
    inner: VsockListener,
    port: u32,
}

impl Listener {
    /// Listens on a port that nobody else of the machine may have.
    pub fn bind(port: u32) -> Result<Self> {
        match VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)) {
            Ok(inner) => Ok(Self { inner, port }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(Error::PortInUse(port)),
            Err(source) => Err(Error::Stream { port, source }),
        }
    }

    /// The next connection and the CID that it comes from, which the kernel vouches for. What cannot be accepted is logged, and the next waited for.
    pub async fn accept(&self) -> (VsockStream, u32) {
        loop {
            match self.inner.accept().await {
                Ok((stream, peer)) => return (stream, peer.cid()),
                Err(error) => {
                    tracing::error!(port = self.port, %error, "accept a vsock connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// The next connection of this guest. Others are hung up on: any guest of the machine can dial any port.
    pub async fn accept_from(&self, cid: u32) -> VsockStream {
        loop {
            match self.accept().await {
                (stream, from) if from == cid => return stream,
                (_, from) => tracing::warn!(from, port = self.port, "hung up on a guest that this port is not for"),
            }
        }
    }
}
