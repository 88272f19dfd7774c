//! The device's thread: one epoll loop over QEMU's control socket, the kicks of the rings, and the host's sockets. It
//! carries out the decisions of the pure files (`table.rs`, `connection.rs`). It sleeps without a timeout unless a
//! connection lingers.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use vhost::vhost_user::BackendReqHandler;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::backend::{Backend, RX, TX};
use crate::error::VsockError;
use crate::forwarder::{BATCH, Forwarder, LINGER, Progress};
use crate::host_end::{Delivered, HostEnd};
use crate::lock::lock;
use crate::ring::RING_MAX;
use crate::shared::Shared;
use crate::table::ConnectionId;

/// Epoll tokens. All others are connection ids, which count up from 0.
const CONTROL: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
const KICK_RX: u64 = u64::MAX - 2;
const KICK_TX: u64 = u64::MAX - 3;

/// Why the loop ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exit {
    Stopped,
    QemuGone,
}

/// The thread's state.
pub(crate) struct Worker {
    /// `Device::closed` waits for its drop. The first field, so that it is dropped before the streams: whoever sees a
    /// stream close can already tell why.
    alive: Option<watch::Sender<()>>,
    epoll: Arc<Epoll>,
    backend: Arc<Mutex<Backend>>,
    control: BackendReqHandler<Mutex<Backend>>,
    forwarder: Forwarder,
}

impl Worker {
    /// Sets up a device that serves QEMU through `socket`.
    pub(crate) fn new(
        guest_cid: u64,
        socket: UnixStream,
        shared: Arc<Shared>,
        alive: watch::Sender<()>,
    ) -> Result<Self, VsockError> {
        let epoll = Arc::new(Epoll::new().map_err(VsockError::Setup)?);
        for (fd, token) in [(socket.as_raw_fd(), CONTROL), (shared.wake_fd(), WAKE)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).map_err(VsockError::Setup)?;
        }
        let backend = Backend::new(epoll.clone(), [KICK_RX, KICK_TX], guest_cid)
            .map_err(|error| VsockError::Setup(io::Error::other(error)))?;
        let backend = Arc::new(Mutex::new(backend));
        let control = BackendReqHandler::from_stream(socket, backend.clone());
        let forwarder = Forwarder::new(guest_cid, epoll.clone(), shared);
        Ok(Worker { alive: Some(alive), epoll, backend, control, forwarder })
    }

    /// Runs until the device is stopped or QEMU is gone.
    pub(crate) fn run(mut self) {
        if self.serve() == Exit::QemuGone {
            self.drain_after_disconnect();
        }
    }

    fn serve(&mut self) -> Exit {
        let mut events = vec![EpollEvent::default(); 256];
        let mut timeout = Some(Duration::ZERO);
        loop {
            let count = match self.epoll.wait(epoll_timeout(timeout), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "failed to wait for events of the vsock device");
                    return Exit::Stopped;
                }
            };
            for event in &events[..count] {
                if let Some(exit) = self.handle(event) {
                    return exit;
                }
            }
            let more = self.move_packets();
            timeout = if more { Some(Duration::ZERO) } else { self.forwarder.check_lingering(Instant::now()) };
        }
    }

    fn handle(&mut self, event: &EpollEvent) -> Option<Exit> {
        match event.data() {
            CONTROL => return self.control_request(),
            WAKE => return self.forwarder.take_requests().then_some(Exit::Stopped),
            KICK_RX => self.clear_kick(RX),
            KICK_TX => self.clear_kick(TX),
            id => self.forwarder.host_event(id, event.event_set()),
        }
        None
    }

    fn control_request(&mut self) -> Option<Exit> {
        use vhost::vhost_user::Error as Vhost;
        // The request may stop the rings: first take the packets that the guest has already sent.
        self.take_all_from_guest();
        match self.control.handle_request() {
            Ok(()) => {
                let mut backend = lock(&self.backend);
                if std::mem::take(&mut backend.driver_restarted) {
                    self.forwarder.clear();
                }
                None
            }
            Err(Vhost::SocketRetry(_)) => None,
            Err(Vhost::Disconnected | Vhost::PartialMessage | Vhost::SocketBroken(_)) => Some(Exit::QemuGone),
            Err(error) => {
                tracing::error!(%error, "failed to serve QEMU's vhost-user request");
                Some(Exit::QemuGone)
            }
        }
    }

    fn clear_kick(&mut self, ring: usize) {
        if let Err(error) = lock(&self.backend).rings[ring].clear_kick() {
            tracing::warn!(ring, %error, "failed to clear the kick of a vsock ring");
        }
    }

    /// Moves one batch of packets each way. Returns true if there is more to do without waiting for an event.
    fn move_packets(&mut self) -> bool {
        let mut backend = lock(&self.backend);
        let Backend { memory, rings: [rx, tx], .. } = &mut *backend;
        let received = self.forwarder.receive_from_guest(memory, tx);
        let more_to_send = self.forwarder.send_to_guest(memory, rx);
        let relieved = received == Progress::Congested && !self.forwarder.is_congested();
        received == Progress::More || more_to_send || relieved
    }

    fn take_all_from_guest(&mut self) {
        let mut backend = lock(&self.backend);
        let Backend { memory, rings: [_, tx], .. } = &mut *backend;
        // One full ring, and no more: the guest may go on sending meanwhile.
        for _ in 0..=usize::from(RING_MAX) / BATCH {
            if self.forwarder.receive_from_guest(memory, tx) != Progress::More {
                break;
            }
        }
    }

    /// Delivers what the guest sent before its end, such as the last log lines of a failing guest. Callers learn at
    /// once that the device is closed; only streams with undelivered bytes stay open, until the bytes are read or the
    /// reader drops the stream.
    fn drain_after_disconnect(mut self) {
        self.forwarder.drop_rsts();
        self.take_all_from_guest();
        let mut left: HashMap<ConnectionId, HostEnd> =
            self.forwarder.end().filter(|(_, host)| host.has_held_bytes()).collect();
        self.alive = None;
        if left.is_empty() {
            return;
        }
        if let Err(error) = deliver_rest(&mut left) {
            tracing::error!(%error, "failed to deliver what the guest had sent before its end");
        }
        if !left.is_empty() {
            tracing::warn!(streams = left.len(), "readers have not taken what the guest had sent before its end");
        }
    }
}

fn deliver_rest(left: &mut HashMap<ConnectionId, HostEnd>) -> io::Result<()> {
    // A new epoll set: the device's set contains descriptors that have ended and stay readable.
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
            if let Delivered::Written(1..) = host.deliver_held(&epoll, id) {
                deadline = Instant::now() + LINGER;
            }
            if !host.has_held_bytes() {
                left.remove(&id);
            }
        }
    }
    Ok(())
}

fn epoll_timeout(timeout: Option<Duration>) -> i32 {
    // Rounded up: waking a fraction of a millisecond early would find nothing to do.
    timeout.map_or(-1, |timeout| i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX))
}
