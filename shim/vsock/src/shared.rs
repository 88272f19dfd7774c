//! What the handle (`mod.rs`) and the device's thread (`worker.rs`) share: wishes one way, listening ports, and the news of the end.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, oneshot};
use vmm_sys_util::eventfd::EventFd;

use super::{CONNECTIONS_MAX, Error};

/// A host-initiated connection on its way to the device's thread.
pub struct Opening {
    /// The guest's port.
    pub port: u32,
    /// The device's end of the stream.
    pub socket: UnixStream,
    /// Told when the guest has accepted; dropped when it has not.
    pub connected: oneshot::Sender<()>,
}

/// See the module.
pub struct Shared {
    /// Wakes the thread.
    pub wake: EventFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    openings: Vec<Opening>,
    listeners: HashMap<u32, mpsc::Sender<UnixStream>>,
    stopping: bool,
    closed: bool,
}

/// A place in a listener's queue.
pub struct Place(mpsc::OwnedPermit<UnixStream>);

impl Place {
    /// Puts the stream there.
    pub fn send(self, stream: UnixStream) {
        self.0.send(stream);
    }
}

impl Shared {
    /// Nothing wished yet. `wake` is nonblocking.
    pub fn new(wake: EventFd) -> Self {
        Shared { wake, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a connection to the thread.
    pub fn open(&self, opening: Opening) -> Result<(), Error> {
        let mut state = self.state();
        if state.closed || state.stopping {
            return Err(Error::Closed);
        }
        if state.openings.len() >= CONNECTIONS_MAX {
            return Err(Error::TooMany);
        }
        state.openings.push(opening);
        drop(state);
        self.wake.write(1).map_err(Error::Setup)
    }

    /// What was handed over since the last time.
    pub fn take_openings(&self) -> Vec<Opening> {
        // Cleared first: what comes in after it wakes again. A counter that is zero already is no error.
        let _was_clear = self.wake.read();
        std::mem::take(&mut self.state().openings)
    }

    /// Registers a listener for connections that the guest makes to `port`.
    pub fn listen(&self, port: u32, queue: mpsc::Sender<UnixStream>) -> Result<(), Error> {
        let mut state = self.state();
        if state.closed || state.stopping {
            return Err(Error::Closed);
        }
        if state.listeners.contains_key(&port) {
            return Err(Error::PortInUse(port));
        }
        state.listeners.insert(port, queue);
        Ok(())
    }

    /// Takes the listener for `port` away.
    pub fn unlisten(&self, port: u32) {
        self.state().listeners.remove(&port);
    }

    /// A place in the queue of the listener for `port`, if there is a listener, and its queue is not full.
    pub fn place(&self, port: u32) -> Option<Place> {
        let queue = self.state().listeners.get(&port)?.clone();
        queue.try_reserve_owned().ok().map(Place)
    }

    /// Asks the thread to end.
    pub fn stop(&self) {
        self.state().stopping = true;
        if let Err(error) = self.wake.write(1) {
            log::error!("vsock: wake the device's thread to stop it: {error}");
        }
    }

    /// Whether the thread was asked to end.
    pub fn is_stopping(&self) -> bool {
        self.state().stopping
    }

    /// The device is gone: what waits for it hears so.
    pub fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.openings.clear();
        state.listeners.clear();
    }
}
