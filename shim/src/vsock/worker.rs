//! The device's thread: one epoll loop over QEMU's control socket, the rings' kicks and the streams. It only moves bytes and carries out
//! what the pure parts (`table.rs`, `connection.rs`) decide. It sleeps without a timeout as long as no dropped stream lingers.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use vhost::vhost_user::BackendReqHandler;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::{Backend, RX, TX};
use super::connection::Plan;
use super::header::{HEADER_LEN, Header, Shut};
use super::host::{Delivered, HostSide, is_retry};
use super::ring::Ring;
use super::scatter::{Scatter, Side};
use super::shared::{Opening, Shared};
use super::table::{Id, Table, Turn, Verdict};
use super::{CONNECTIONS_MAX, Error, WINDOW};

const CONTROL: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
const KICK_RX: u64 = u64::MAX - 2;
const KICK_TX: u64 = u64::MAX - 3;

/// Packets moved one way before the other way, and the streams, get their turn.
const BATCH: usize = 64;
/// How long a connection whose stream was dropped may make no progress before the guest is told off with an RST; and how long bytes of a VM
/// that is gone wait for their reader. Linux gives its own side 8 s (`VSOCK_CLOSE_TIMEOUT`).
const LINGER: Duration = Duration::from_secs(10);

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

/// The connections and what they need of the outside.
struct Streams {
    epoll: Arc<Epoll>,
    shared: Arc<Shared>,
    table: Table<HostSide>,
    lingering: BTreeSet<(Instant, Id)>,
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
        let table = Table::new(guest_cid, CONNECTIONS_MAX, WINDOW);
        let streams = Streams { epoll: epoll.clone(), shared, table, lingering: BTreeSet::new() };
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
            self.last_words(&mut events);
        }
    }

    fn control_request(&mut self) -> Life {
        use vhost::vhost_user::Error as Vhost;
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
        let more_from = self.streams.from_guest(memory, tx);
        let more_to = self.streams.to_guest(memory, rx);
        let relieved = more_from == Moved::Congested && !self.streams.table.is_congested();
        more_from == Moved::More || more_to || relieved
    }

    /// What the guest sent before its end still reaches those who read: all that was said on its way down is worth having. Callers
    /// hear at once that the device is gone.
    fn last_words(&mut self, events: &mut [EpollEvent]) {
        {
            let mut backend = lock(&self.backend);
            let Backend { memory, rings: [_, tx], .. } = &mut *backend;
            // Ends: QEMU is gone, so the ring gets no new entries; even a shared ring has but so many.
            for _ in 0..=super::ring::RING_MAX as usize / BATCH {
                self.streams.table.drop_replies();
                if self.streams.from_guest(memory, tx) == Moved::All {
                    break;
                }
            }
        }
        self.streams.shared.close();
        self.alive = None;
        let mut left: HashMap<Id, HostSide> =
            self.streams.table.clear().into_iter().filter(|(_, host)| host.holds()).collect();
        let mut deadline = Instant::now() + LINGER;
        while !left.is_empty() {
            let wait = deadline.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                log::warn!("vsock: {} readers have not taken what the guest had sent before its end", left.len());
                break;
            }
            let count = match self.epoll.wait(epoll_timeout(Some(wait)), events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::error!("vsock: wait for events: {error}");
                    break;
                }
            };
            for event in &events[..count] {
                let id = event.data();
                if id == CONTROL || id == WAKE {
                    // Both stay readable, and neither says anything new.
                    if id == WAKE && self.streams.shared.is_stopping() {
                        return;
                    }
                    let fd = if id == WAKE { self.streams.shared.wake.as_raw_fd() } else { self.control.as_raw_fd() };
                    if let Err(error) = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
                        log::debug!("vsock: stop watching fd {fd}: {error}");
                    }
                    continue;
                }
                let Some(host) = left.get_mut(&id) else { continue };
                match host.deliver_held(&self.epoll, id) {
                    Delivered::Took(n) if n > 0 => deadline = Instant::now() + LINGER,
                    Delivered::Took(_) => {}
                    Delivered::Refused(_) => host.discard(),
                }
                if !host.holds() {
                    left.remove(&id);
                }
            }
        }
    }
}

/// How far [`Streams::from_guest`] came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moved {
    /// All that there is; the next kick says when there is more.
    All,
    /// A batch, and there is more.
    More,
    /// The guest must first make room for the answers that it is owed.
    Congested,
}

impl Streams {
    /// Takes packets of the guest.
    fn from_guest(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> Moved {
        let mut moved = Moved::More;
        ring.mute_kicks(memory);
        for _ in 0..BATCH {
            if self.table.is_congested() {
                moved = Moved::Congested;
                break;
            }
            let Some(chain) = ring.pop(memory) else {
                if ring.wait_for_kick(memory) {
                    continue;
                }
                moved = Moved::All;
                break;
            };
            let head = chain.head_index();
            // More than the window is never right, so there is no need to look at more.
            if let Some(mut packet) = Scatter::collect(memory, chain, Side::Readable, HEADER_LEN + WINDOW as usize) {
                self.packet(&mut packet);
            }
            ring.push(memory, head, 0);
        }
        call(memory, ring);
        moved
    }

    fn packet(&mut self, packet: &mut Scatter<'_>) {
        let mut bytes = [0; HEADER_LEN];
        if packet.read(&mut bytes) < HEADER_LEN {
            // No address to send an RST to.
            return;
        }
        let header = Header::decode(&bytes);
        match self.table.hear(&header, packet.len()) {
            Verdict::Nothing => {}
            Verdict::Request => self.request(&header),
            Verdict::Connected(id) => {
                if let Some(connected) = self.table.link(id).and_then(|link| link.host.connected.take()) {
                    // The caller may have given up; then its end is closed, which is seen as such.
                    let _gave_up = connected.send(());
                }
            }
            Verdict::Data(id) => {
                packet.truncate(header.len as usize);
                if let Some(link) = self.table.link(id) {
                    let delivered = link.host.deliver(packet, &self.epoll, id);
                    self.delivered(id, delivered);
                }
            }
            Verdict::Changed(id) => self.settle(id),
            Verdict::Dropped(id, host) => self.forget(id, host),
        }
    }

    fn request(&mut self, header: &Header) {
        let Some(place) = self.shared.place(header.dst_port) else { return self.table.refuse(header) };
        let (device, user) = match pair() {
            Ok(pair) => pair,
            Err(error) => {
                log::warn!("vsock: socket pair for a connection to port {}: {error}", header.dst_port);
                return self.table.refuse(header);
            }
        };
        let Ok(id) = self.table.accept(header, HostSide::new(device, None)) else { return };
        if self.watch(id) {
            place.send(user);
        }
    }

    fn watch(&mut self, id: Id) -> bool {
        let Some(link) = self.table.link(id) else { return false };
        match link.host.watch(&self.epoll, id) {
            Ok(()) => true,
            Err(error) => {
                log::warn!("vsock: watch a stream: {error}");
                self.abort(id);
                false
            }
        }
    }

    /// Sends packets to the guest. True when there is more to send and there may be room.
    fn to_guest(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> bool {
        let mut more = true;
        for _ in 0..BATCH {
            let Some(turn) = self.table.turn() else {
                more = false;
                break;
            };
            let Some(chain) = ring.pop(memory) else {
                if ring.wait_for_kick(memory) {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head_index();
            let room = Scatter::collect(memory, chain, Side::Writable, HEADER_LEN + WINDOW as usize);
            let Some(room) = room.filter(|room| room.len() >= HEADER_LEN) else {
                // A buffer without room for a header has no use: the guest gets it back empty.
                ring.push(memory, head, 0);
                continue;
            };
            match self.fill(turn, room) {
                Some(len) => ring.push(memory, head, len),
                None => ring.undo_pop(),
            }
        }
        call(memory, ring);
        more
    }

    /// Fills one buffer of the guest; answers the packet's length, or `None` when there was nothing to send after all.
    fn fill(&mut self, turn: Turn, mut room: Scatter<'_>) -> Option<usize> {
        let id = match turn {
            Turn::Reply(header) => {
                self.table.take_reply();
                room.write(&header.encode());
                return Some(HEADER_LEN);
            }
            Turn::Link(id) => id,
        };
        let mut place = room.split_front(HEADER_LEN);
        let mut header = None;
        let mut len = 0;
        if let Some(link) = self.table.link(id)
            && let Plan::Data { limit } = link.connection.plan()
            && room.len() > 0
        {
            room.truncate(limit as usize);
            let asked = room.len();
            match link.host.read_into(&mut room) {
                Ok(0) => link.connection.host_eof(),
                Ok(n) => {
                    if n < asked && !link.host.saw_hangup {
                        // The stream is empty: its next byte, or its end, is a new edge.
                        link.connection.host_drained();
                    }
                    len = n;
                    header = self.table.data(id, n as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_retry(&error) => link.connection.host_drained(),
                Err(_) => {
                    link.host.discard();
                    link.connection.host_refuses();
                    link.connection.host_eof();
                }
            }
        }
        let header = header.or_else(|| self.table.control(id));
        self.table.end_turn();
        let header = header?;
        place.write(&header.encode());
        Some(HEADER_LEN + len)
    }

    /// Carries out the handle's wishes. True when the thread is to end.
    fn take_wishes(&mut self) -> bool {
        for Opening { port, socket, connected } in self.shared.take_openings() {
            // Without room the caller hears it from the sender's end.
            if let Ok(id) = self.table.open(port, HostSide::new(socket, Some(connected))) {
                self.watch(id);
            }
        }
        self.shared.is_stopping()
    }

    fn host_event(&mut self, id: Id, events: EventSet) {
        let Some(link) = self.table.link(id) else { return };
        if events.contains(EventSet::OUT) {
            let delivered = link.host.deliver_held(&self.epoll, id);
            self.delivered(id, delivered);
        }
        let Some(link) = self.table.link(id) else { return };
        link.host.saw_hangup |= events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        link.connection.host_readable();
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            if link.connection.is_requesting() {
                return self.abort(id);
            }
            link.host.discard();
            link.connection.host_refuses();
            if link.host.deadline.is_none() {
                self.linger(id);
            }
        }
        self.settle(id);
    }

    fn delivered(&mut self, id: Id, delivered: Delivered) {
        let Some(link) = self.table.link(id) else { return };
        match delivered {
            Delivered::Took(n) => link.connection.host_took(n),
            Delivered::Refused(n) => {
                link.connection.host_took(n);
                link.connection.host_refuses();
            }
        }
        self.settle(id);
    }

    /// After anything happened to a connection: carries half-closes out, drops it when it is over, and lets it send.
    fn settle(&mut self, id: Id) {
        let Some(link) = self.table.link(id) else { return };
        let shut = link.connection.host_half_close();
        if shut != Shut::NONE {
            link.host.half_close(shut);
        }
        if link.connection.is_ended() && link.connection.held() == 0 {
            return self.abort(id);
        }
        self.table.touch(id);
    }

    fn linger(&mut self, id: Id) {
        let deadline = Instant::now() + LINGER;
        if let Some(link) = self.table.link(id) {
            link.host.deadline = Some(deadline);
            link.host.moved = 0;
            self.lingering.insert((deadline, id));
        }
    }

    /// Ends connections that linger without progress; answers when to look again.
    fn check_lingering(&mut self, now: Instant) -> Option<Duration> {
        while let Some(&(deadline, id)) = self.lingering.first() {
            if deadline > now {
                return Some(deadline - now);
            }
            self.lingering.pop_first();
            match self.table.link(id) {
                Some(link) if link.host.moved > 0 => self.linger(id),
                Some(_) => self.abort(id),
                None => {}
            }
        }
        None
    }

    fn abort(&mut self, id: Id) {
        if let Some(host) = self.table.abort(id) {
            self.forget(id, host);
        }
    }

    fn clear(&mut self) {
        for (id, host) in self.table.clear() {
            self.forget(id, host);
        }
    }

    fn forget(&mut self, id: Id, host: HostSide) {
        if let Some(deadline) = host.deadline {
            self.lingering.remove(&(deadline, id));
        }
    }
}

fn call(memory: &GuestMemoryMmap, ring: &mut Ring) {
    if let Err(error) = ring.call(memory) {
        log::warn!("vsock: call the guest: {error}");
    }
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (device, user) = UnixStream::pair()?;
    device.set_nonblocking(true)?;
    user.set_nonblocking(true)?;
    Ok((device, user))
}

fn epoll_timeout(timeout: Option<Duration>) -> i32 {
    // Rounded up: a millisecond early would be a wake-up for nothing.
    timeout.map_or(-1, |timeout| i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX))
}

fn lock(backend: &Mutex<Backend>) -> std::sync::MutexGuard<'_, Backend> {
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}
