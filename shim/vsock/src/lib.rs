//! The guest's vsock device. Its own: a vhost-user backend (virtio 1.2, 5.10; stream sockets) inside this process. No CIDs or ports of the machine
//! are used, and nothing is on disk: a connection is one end of a socket pair, the other end is the device's.
//!
//! | file            | what it is                                                                      |
//! |-----------------|---------------------------------------------------------------------------------|
//! | `header.rs`     | the packet header (pure)                                                        |
//! | `credit.rs`     | flow control's arithmetic (pure)                                                |
//! | `connection.rs` | one connection's state machine (pure)                                           |
//! | `table.rs`      | all connections, RSTs, and whose turn it is (pure)                              |
//! | `scatter.rs`    | pieces of guest memory, and system calls on them                                |
//! | `ring.rs`       | a virtqueue with its notifications                                              |
//! | `backend.rs`    | QEMU's vhost-user requests                                                      |
//! | `host.rs`       | the device's end of a stream                                                    |
//! | `streams.rs`    | packets between rings and streams                                               |
//! | `worker.rs`     | the thread that drives all of these                                             |
//! | `shared.rs`     | what that thread shares with the [`Device`]                                     |
//! | `kernel.rs`     | the kernel's device, which may take this one's place                            |
//! | `stream.rs`     | a connection over either                                                        |

mod backend;
mod connection;
mod credit;
mod header;
mod host;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod interleaving;
pub mod kernel;
mod ring;
mod scatter;
mod shared;
mod stream;
mod streams;
mod table;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use shared::{Opening, Shared};
pub use stream::Stream;
use worker::Worker;

/// Connections of one guest at a time, those to it and from it together; past it they are refused.
pub const CONNECTIONS_MAX: usize = 4096;
/// Bytes that a guest may have sent on one connection without their having been taken on the host: what Linux gives its own sockets
/// (`VIRTIO_VSOCK_DEFAULT_BUF_SIZE`).
const WINDOW: u32 = 256 * 1024;
/// Connections of the guest that wait for [`Listener::accept`]; past it they are refused.
const BACKLOG: usize = 128;

/// What can go wrong with the device or a connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something that the device needs.
    #[error("set up the vsock device: {0}")]
    Setup(#[source] io::Error),
    /// A stream could not be made.
    #[error("make a stream to vsock port {port}: {source}")]
    Stream {
        /// The port, of the guest or of the host.
        port: u32,
        /// What was refused.
        source: io::Error,
    },
    /// The guest refused, or the table of connections is full.
    #[error("connect to vsock port {0} of the guest: refused")]
    Refused(u32),
    /// The guest did not answer in time.
    #[error("connect to vsock port {port} of the guest: no answer in {deadline:?}")]
    TimedOut {
        /// The guest's port.
        port: u32,
        /// How long was waited.
        deadline: Duration,
    },
    /// More than [`CONNECTIONS_MAX`] connections wait for the device's thread.
    #[error("too many vsock connections wait to be opened")]
    TooMany,
    /// Somebody listens on this port already.
    #[error("listen on vsock port {0} of the host: in use")]
    PortInUse(u32),
    /// The device was stopped, or QEMU is gone.
    #[error("the vsock device is closed")]
    Closed,
}

/// What this module's calls answer.
pub type Result<T> = std::result::Result<T, Error>;

/// The handle of a device. Dropping it stops the device.
pub struct Device {
    shared: Arc<Shared>,
    alive: watch::Receiver<()>,
}

impl Device {
    /// Starts the device's thread for a guest with this CID. The fd is QEMU's end of the vhost-user connection, for its `-chardev
    /// socket,fd=N`; it is close-on-exec, so the one who starts QEMU hands it on by name. QEMU's memory must be a shared memfd with the
    /// seals that `memory-backend-memfd` sets by itself.
    pub fn start(guest_cid: u64) -> Result<(Device, OwnedFd)> {
        let (ours, qemus) = StdStream::pair().map_err(Error::Setup)?;
        let shared = Arc::new(Shared::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::Setup)?));
        let (alive, watched) = watch::channel(());
        let worker = Worker::new(guest_cid, ours, shared.clone(), alive)?;
        let closer = Closer(shared.clone());
        std::thread::Builder::new()
            .name("vsock".to_owned())
            .spawn(move || {
                // Closes also when the thread panics: nobody waits for a device that isn't there.
                let _closer = closer;
                worker.run();
            })
            .map_err(Error::Setup)?;
        Ok((Device { shared, alive: watched }, qemus.into()))
    }

    /// Connects to a port of the guest. Dropping the future gives up. `deadline` counts from now, and a guest that is still booting
    /// is waited for so long.
    pub async fn connect(&self, port: u32, deadline: Duration) -> Result<UnixStream> {
        let to_stream_error = |source| Error::Stream { port, source };
        let (user, socket) = UnixStream::pair().map_err(to_stream_error)?;
        let socket = socket.into_std().map_err(to_stream_error)?;
        let (connected, answer) = oneshot::channel();
        self.shared.open(Opening { port, socket, connected })?;
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(())) => Ok(user),
            Ok(Err(_)) if self.is_closed() => Err(Error::Closed),
            Ok(Err(_)) => Err(Error::Refused(port)),
            Err(_) => Err(Error::TimedOut { port, deadline }),
        }
    }

    /// Accepts connections that the guest makes to `port` of the host, from now on and until the listener is dropped. Each port has one
    /// listener; ports without one refuse.
    pub fn listen(&self, port: u32) -> Result<Listener> {
        let (queue, incoming) = mpsc::channel(BACKLOG);
        self.shared.listen(port, queue)?;
        Ok(Listener { port, incoming, shared: self.shared.clone() })
    }

    /// Ends the device: all streams are closed, all calls fail with [`Error::Closed`].
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Whether the device has ended.
    pub fn is_closed(&self) -> bool {
        self.alive.has_changed().is_err()
    }

    /// Waits until the device has ended: stopped, or QEMU is gone.
    pub async fn closed(&self) {
        let mut alive = self.alive.clone();
        // Nothing is ever sent; the sender's end is the news.
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

/// A port of the host on which the guest's connections arrive. Dropping it refuses further ones, and closes those not yet accepted.
pub struct Listener {
    port: u32,
    incoming: mpsc::Receiver<StdStream>,
    shared: Arc<Shared>,
}

impl Listener {
    /// The next connection. [`Error::Closed`] when the device has ended.
    pub async fn accept(&mut self) -> Result<UnixStream> {
        let stream = self.incoming.recv().await.ok_or(Error::Closed)?;
        UnixStream::from_std(stream).map_err(|source| Error::Stream { port: self.port, source })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.unlisten(self.port);
    }
}
