//! State shared by the handles (`device.rs`) and the device's thread (`worker.rs`): connection requests, listening
//! ports, and whether the device is stopping or closed.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use tokio::sync::{mpsc, oneshot};
use vmm_sys_util::eventfd::EventFd;

use crate::error::VsockError;
use crate::limits::LIMITS;
use crate::lock::lock;

/// A connection that the host wants to open, on its way to the device's thread.
pub(crate) struct ConnectRequest {
    /// The guest's port.
    pub(crate) port: u32,
    /// The device's end of the socket pair.
    pub(crate) socket: UnixStream,
    /// Receives `()` when the guest accepts. Dropped when the connection fails.
    pub(crate) connected: oneshot::Sender<()>,
}

/// State shared by the handles and the device's thread.
pub struct Shared {
    wake: EventFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    requests: Vec<ConnectRequest>,
    listeners: HashMap<u32, mpsc::Sender<UnixStream>>,
    stopping: bool,
    closed: bool,
}

impl State {
    fn check_open(&self) -> Result<(), VsockError> {
        if self.closed || self.stopping { Err(VsockError::Closed) } else { Ok(()) }
    }
}

/// A reserved slot in a listener's queue.
pub(crate) struct QueueSlot(mpsc::OwnedPermit<UnixStream>);

impl QueueSlot {
    /// Queues the stream for the listener.
    pub(crate) fn send(self, stream: UnixStream) {
        self.0.send(stream);
    }
}

impl Shared {
    /// `wake` must be nonblocking. The device's thread watches it.
    pub fn new(wake: EventFd) -> Self {
        Shared { wake, state: Mutex::default() }
    }

    /// Descriptor that becomes readable when the device's thread has something to do.
    pub(crate) fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Queues a connection request and wakes the thread.
    pub(crate) fn request_connection(&self, request: ConnectRequest) -> Result<(), VsockError> {
        let mut state = lock(&self.state);
        state.check_open()?;
        if state.requests.len() >= LIMITS.connections {
            return Err(VsockError::TooMany);
        }
        state.requests.push(request);
        drop(state);
        self.wake.write(1).map_err(VsockError::Wake)
    }

    /// Returns the requests queued since the last call.
    pub(crate) fn take_requests(&self) -> Vec<ConnectRequest> {
        // Clear the eventfd first, so that a request queued later wakes the thread again. Reading a counter of zero
        // fails with EAGAIN, which is expected here.
        let _was_clear = self.wake.read();
        std::mem::take(&mut lock(&self.state).requests)
    }

    /// Registers a listener for the guest's connections to `port`.
    ///
    /// # Errors
    ///
    /// [`VsockError::PortInUse`] or [`VsockError::Closed`].
    pub fn listen(&self, port: u32, queue: mpsc::Sender<UnixStream>) -> Result<(), VsockError> {
        let mut state = lock(&self.state);
        state.check_open()?;
        if state.listeners.contains_key(&port) {
            return Err(VsockError::PortInUse(port));
        }
        state.listeners.insert(port, queue);
        Ok(())
    }

    /// Removes the listener for `port`.
    pub(crate) fn unlisten(&self, port: u32) {
        lock(&self.state).listeners.remove(&port);
    }

    /// Reserves a slot in the queue of the listener for `port`. `None` without a listener, or when its queue is full.
    pub(crate) fn reserve(&self, port: u32) -> Option<QueueSlot> {
        let queue = lock(&self.state).listeners.get(&port)?.clone();
        queue.try_reserve_owned().ok().map(QueueSlot)
    }

    /// Asks the thread to stop.
    pub(crate) fn stop(&self) {
        lock(&self.state).stopping = true;
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "failed to wake the vsock device's thread to stop it");
        }
    }

    /// Whether the thread was asked to stop.
    pub(crate) fn is_stopping(&self) -> bool {
        lock(&self.state).stopping
    }

    /// Marks the device as closed. Dropping the requests and the listeners fails every pending `connect` and `accept`.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.requests.clear();
        state.listeners.clear();
    }
}
