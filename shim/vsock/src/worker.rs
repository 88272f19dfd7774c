//! The device's thread: one epoll loop over QEMU's control socket, the rings' kicks and the streams. It only moves bytes and carries out
//! what the pure parts (`table.rs`, `connection.rs`) decide. It sleeps without a timeout as long as no dropped stream lingers.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use vhost::vhost_user::BackendReqHandler;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Error;
use super::backend::{Backend, RX, TX};
use super::host::{Delivered, HostSide};
use super::ring::RING_MAX;
use super::shared::Shared;
use super::streams::{BATCH, LINGER, Moved, Streams};
use super::table::Id;

const CONTROL: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
const KICK_RX: u64 = u64::MAX - 2;
const KICK_TX: u64 = u64::MAX - 3;

/// Why the thread goes on, or not.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Going,
    Stopped,
    QemuGone,
}

/// The thread's state.
pub struct Worker {
    /// What `closed()` waits for. First, so that it is dropped before the streams: whoever sees a connection vanish can tell why.
    alive: Option<watch::Sender<()>>,
    epoll: Arc<Epoll>,
    backend: Arc<Mutex<Backend>>,
    control: BackendReqHandler<Mutex<Backend>>,
    streams: Streams,
}

impl Worker {
    /// Sets up the device behind `socket`, QEMU's counterpart.
    pub fn new(
        guest_cid: u64,
        socket: UnixStream,
        shared: Arc<Shared>,
        alive: watch::Sender<()>,
    ) -> Result<Self, Error> {
        let epoll = Arc::new(Epoll::new().map_err(Error::Setup)?);
        for (fd, token) in [(socket.as_raw_fd(), CONTROL), (shared.wake.as_raw_fd(), WAKE)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).map_err(Error::Setup)?;
        }
        let backend = Backend::new(epoll.clone(), [KICK_RX, KICK_TX], guest_cid)
            .map_err(|error| Error::Setup(io::Error::other(error)))?;
        let backend = Arc::new(Mutex::new(backend));
        let control = BackendReqHandler::from_stream(socket, backend.clone());
        let streams = Streams::new(guest_cid, epoll.clone(), shared);
        Ok(Worker { alive: Some(alive), epoll, backend, control, streams })
    }

    /// Runs until it is told to stop, or QEMU is gone.
    pub fn run(mut self) {
        let mut events = vec![EpollEvent::default(); 256];
        let mut timeout = Some(Duration::ZERO);
        let life = loop {
            let count = match self.epoll.wait(epoll_timeout(timeout), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::error!("vsock: wait for events: {error}");
                    break Life::Stopped;
                }
            };
            let mut life = Life::Going;
            for event in &events[..count] {
                match event.data() {
                    CONTROL => life = self.control_request(),
                    WAKE if self.streams.take_wishes() => return,
                    WAKE => {}
                    KICK_RX => self.clear_kick(RX),
                    KICK_TX => self.clear_kick(TX),
                    id => self.streams.host_event(id, event.event_set()),
                }
                if life != Life::Going {
                    break;
                }
            }
            if life != Life::Going {
                break life;
            }
            let more = self.move_packets();
            timeout = if more { Some(Duration::ZERO) } else { self.streams.check_lingering(Instant::now()) };
        };
        if life == Life::QemuGone {
            self.last_words();
        }
    }

    fn control_request(&mut self) -> Life {
        use vhost::vhost_user::Error as Vhost;
        // The request may stop the rings: what the guest sent before that has been sent.
        self.take_all_from_guest();
        match self.control.handle_request() {
            Ok(()) => {
                let mut backend = lock(&self.backend);
                if std::mem::take(&mut backend.driver_is_new) {
                    self.streams.clear();
                }
                Life::Going
            }
            Err(Vhost::SocketRetry(_)) => Life::Going,
            Err(Vhost::Disconnected | Vhost::PartialMessage | Vhost::SocketBroken(_)) => Life::QemuGone,
            Err(error) => {
                log::error!("vsock: QEMU's request cannot be served: {error}");
                Life::QemuGone
            }
        }
    }

    fn clear_kick(&mut self, index: usize) {
        if let Err(error) = lock(&self.backend).rings[index].clear_kick() {
            log::warn!("vsock: clear the kick of ring {index}: {error}");
        }
    }

    /// Moves what can be moved both ways, a batch each. True when there is more to do without any event.
    fn move_packets(&mut self) -> bool {
        let mut backend = lock(&self.backend);
        let Backend { memory, rings: [rx, tx], .. } = &mut *backend;
        let from = self.streams.take_from_guest(memory, tx);
        let more_to = self.streams.give_to_guest(memory, rx);
        let relieved = from == Moved::Congested && !self.streams.is_congested();
        from == Moved::More || more_to || relieved
    }

    fn take_all_from_guest(&mut self) {
        let mut backend = lock(&self.backend);
        let Backend { memory, rings: [_, tx], .. } = &mut *backend;
        // A full ring's worth. A guest that goes on sending meanwhile is not waited for.
        for _ in 0..=usize::from(RING_MAX) / BATCH {
            if self.streams.take_from_guest(memory, tx) != Moved::More {
                break;
            }
        }
    }

    /// What the guest sent before its end still reaches those who read: what was said on the way down is worth having. Everybody hears
    /// at once that the device is gone; only streams with bytes for them live on, until these were read, or the streams are dropped.
    fn last_words(mut self) {
        self.streams.drop_replies();
        self.take_all_from_guest();
        let mut left: HashMap<Id, HostSide> = self.streams.end().filter(|(_, host)| host.holds()).collect();
        self.alive = None;
        if left.is_empty() {
            return;
        }
        if let Err(error) = deliver_rest(&mut left) {
            log::error!("vsock: deliver what the guest had sent before its end: {error}");
        }
        if !left.is_empty() {
            log::warn!("vsock: {} readers have not taken what the guest had sent before its end", left.len());
        }
    }
}

fn deliver_rest(left: &mut HashMap<Id, HostSide>) -> io::Result<()> {
    // A set of their own: the device's is full of things that are over, and stay readable.
    let epoll = Epoll::new()?;
    for (id, host) in left.iter() {
        host.watch(&epoll, *id)?;
    }
    let mut events = vec![EpollEvent::default(); 64];
    let mut deadline = Instant::now() + LINGER;
    while !left.is_empty() {
        let wait = deadline.saturating_duration_since(Instant::now());
        if wait.is_zero() {
            break;
        }
        let count = match epoll.wait(epoll_timeout(Some(wait)), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            let id = event.data();
            let Some(host) = left.get_mut(&id) else { continue };
            if let Delivered::Took(1..) = host.deliver_held(&epoll, id) {
                deadline = Instant::now() + LINGER;
            }
            if !host.holds() {
                left.remove(&id);
            }
        }
    }
    Ok(())
}

fn epoll_timeout(timeout: Option<Duration>) -> i32 {
    // Rounded up: a millisecond early would be a wake-up for nothing.
    timeout.map_or(-1, |timeout| i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX))
}

fn lock(backend: &Mutex<Backend>) -> std::sync::MutexGuard<'_, Backend> {
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}
