//! The handles of a device: [`Device`] connects to the guest, [`Listener`] accepts the guest's connections.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::VsockError;
use crate::shared::{ConnectRequest, Shared};
use crate::worker::Worker;

/// Connections of the guest that may wait for [`Listener::accept`]. The device refuses any beyond that.
const BACKLOG: usize = 128;

/// A device. Dropping it stops the device.
pub struct Device {
    shared: Arc<Shared>,
    alive: watch::Receiver<()>,
}

impl Device {
    /// Starts the device's thread for a guest with this CID.
    ///
    /// The returned descriptor is QEMU's end of the vhost-user connection, for `-chardev socket,fd=N`. It is
    /// close-on-exec: whoever starts QEMU must pass it on explicitly. QEMU's memory must be a shared memfd with the
    /// seals that `memory-backend-memfd` applies by default.
    ///
    /// # Errors
    ///
    /// [`VsockError::Setup`].
    pub fn start(guest_cid: u64) -> Result<(Device, OwnedFd), VsockError> {
        let (ours, qemus) = StdStream::pair().map_err(VsockError::Setup)?;
        let shared = Arc::new(Shared::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(VsockError::Setup)?));
        let (alive, watched) = watch::channel(());
        let worker = Worker::new(guest_cid, ours, shared.clone(), alive)?;
        let closer = Closer(shared.clone());
        std::thread::Builder::new()
            .name("vsock".to_owned())
            .spawn(move || {
                // Closes the device after a panic as well: otherwise callers would wait for a thread that is gone.
                let _closer = closer;
                worker.run();
            })
            .map_err(VsockError::Setup)?;
        Ok((Device { shared, alive: watched }, qemus.into()))
    }

    /// Connects to a port of the guest. The guest may still be booting: the request waits for its driver until
    /// `deadline`, which starts now. Dropping the future cancels the request.
    ///
    /// # Errors
    ///
    /// [`VsockError::Refused`], [`VsockError::TimedOut`], [`VsockError::TooMany`], [`VsockError::Closed`], or a failed
    /// system call.
    pub async fn connect(&self, port: u32, deadline: Duration) -> Result<UnixStream, VsockError> {
        let to_stream_error = |source| VsockError::Stream { port, source };
        let (user, socket) = UnixStream::pair().map_err(to_stream_error)?;
        let socket = socket.into_std().map_err(to_stream_error)?;
        let (connected, answer) = oneshot::channel();
        self.shared.request_connection(ConnectRequest { port, socket, connected })?;
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(())) => Ok(user),
            Ok(Err(_)) if self.is_closed() => Err(VsockError::Closed),
            Ok(Err(_)) => Err(VsockError::Refused(port)),
            Err(_) => Err(VsockError::TimedOut { port, deadline }),
        }
    }

    /// Accepts the guest's connections to `port` of the host until the listener is dropped. A port has at most one
    /// listener; the device refuses connections to a port without one.
    ///
    /// # Errors
    ///
    /// [`VsockError::PortInUse`] or [`VsockError::Closed`].
    pub fn listen(&self, port: u32) -> Result<Listener, VsockError> {
        let (queue, incoming) = mpsc::channel(BACKLOG);
        self.shared.listen(port, queue)?;
        Ok(Listener { port, incoming, shared: self.shared.clone() })
    }

    /// Stops the device: all streams close, and all calls fail with [`VsockError::Closed`].
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Whether the device has ended.
    pub fn is_closed(&self) -> bool {
        self.alive.has_changed().is_err()
    }

    /// Waits until the device has ended: it was stopped, or QEMU has closed its connection.
    pub async fn closed(&self) {
        let mut alive = self.alive.clone();
        // The thread never sends a value: dropping the sender is the signal.
        while alive.changed().await.is_ok() {}
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Closer(Arc<Shared>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A port of the host to which the guest can connect. Dropping the listener refuses further connections and closes
/// those that were not accepted.
pub struct Listener {
    port: u32,
    incoming: mpsc::Receiver<StdStream>,
    shared: Arc<Shared>,
}

impl Listener {
    /// Waits for the next connection.
    ///
    /// # Errors
    ///
    /// [`VsockError::Closed`] when the device has ended, or [`VsockError::Stream`].
    pub async fn accept(&mut self) -> Result<UnixStream, VsockError> {
        let stream = self.incoming.recv().await.ok_or(VsockError::Closed)?;
        UnixStream::from_std(stream).map_err(|source| VsockError::Stream { port: self.port, source })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.unlisten(self.port);
    }
}
