//! The kernel's vsock device (vhost-vsock). CIDs of guests and ports of the host are shared by the whole machine, so
//! whoever accepts a connection must check the CID that it comes from.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::error::VsockError;

/// The device's path.
pub const DEVICE: &str = "/dev/vhost-vsock";
/// Pause after a failed accept, which means that descriptors or memory are exhausted. Without it the loop would spin
/// until some are free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Opens a device for one guest. It has no CID yet: see [`claim`].
///
/// # Errors
///
/// The error of open(2).
pub fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// Assigns this CID to the device. Returns false when another guest of the machine, of husk or not, has the CID.
///
/// # Errors
///
/// The error of ioctl(2), other than EADDRINUSE.
pub fn claim(device: &File, cid: u32) -> io::Result<bool> {
    // VHOST_VSOCK_SET_GUEST_CID (linux/vhost.h): _IOW(VHOST_VIRTIO, 0x60, __u64). QEMU repeats the call without effect.
    const SET_GUEST_CID: libc::c_ulong = 0x4008_af60;
    let cid = u64::from(cid);
    // SAFETY: the descriptor is open. The call reads one u64, which outlives the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), SET_GUEST_CID, &raw const cid) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EADDRINUSE) => Ok(false),
            error => Err(error),
        },
    }
}

/// Connects to a port of the guest with this CID. Dropping the future cancels the attempt.
///
/// # Errors
///
/// [`VsockError::Refused`], [`VsockError::TimedOut`] or [`VsockError::Stream`].
pub async fn connect(cid: u32, port: u32, deadline: Duration) -> Result<VsockStream, VsockError> {
    match tokio::time::timeout(deadline, VsockStream::connect(VsockAddr::new(cid, port))).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) if error.raw_os_error() == Some(libc::ECONNRESET) => Err(VsockError::Refused(port)),
        Ok(Err(source)) => Err(VsockError::Stream { port, source }),
        Err(_) => Err(VsockError::TimedOut { port, deadline }),
    }
}

/// A vsock port of the host, open to every guest of the machine.
pub struct KernelListener {
    inner: VsockListener,
    port: u32,
}

impl KernelListener {
    /// Listens on a port. Only one process of the machine can.
    ///
    /// # Errors
    ///
    /// [`VsockError::PortInUse`] or [`VsockError::Stream`].
    pub fn bind(port: u32) -> Result<Self, VsockError> {
        match VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)) {
            Ok(inner) => Ok(Self { inner, port }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(VsockError::PortInUse(port)),
            Err(source) => Err(VsockError::Stream { port, source }),
        }
    }

    /// Waits for the next connection, and returns it with the guest's CID, which the kernel guarantees. A failed accept
    /// is logged and retried.
    pub async fn accept(&self) -> (VsockStream, u32) {
        loop {
            match self.inner.accept().await {
                Ok((stream, peer)) => return (stream, peer.cid()),
                Err(error) => {
                    tracing::error!(port = self.port, %error, "failed to accept a vsock connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Waits for the next connection of this guest, and closes those of others: any guest of the machine can connect to
    /// any port.
    pub async fn accept_from(&self, cid: u32) -> VsockStream {
        loop {
            match self.accept().await {
                (stream, from) if from == cid => return stream,
                (_, from) => {
                    tracing::warn!(
                        from,
                        port = self.port,
                        "closed a vsock connection from a guest that has no access to the port"
                    );
                }
            }
        }
    }
}
