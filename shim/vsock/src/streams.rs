//! The connections with their streams: packets between the rings and the sockets, a batch at a time, as `table.rs` decides.
//! When to do so is `worker.rs`'s part. Nothing here waits.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::connection::Plan;
use super::header::{HEADER_LEN, Header, Shut};
use super::host::{Delivered, HostSide, is_retry};
use super::ring::Ring;
use super::scatter::{Scatter, Side};
use super::shared::{Opening, Shared};
use super::table::{Id, Table, Turn, Verdict};
use super::{CONNECTIONS_MAX, WINDOW};

/// Packets moved one way before the other way, and the streams, get their turn.
pub const BATCH: usize = 64;
/// How long a connection whose stream was dropped may make no progress before the guest is told off with an RST; and how long bytes of
/// a VM that is gone wait for their reader. Linux gives its own side 8 s (`VSOCK_CLOSE_TIMEOUT`).
pub const LINGER: Duration = Duration::from_secs(10);

/// See the module.
pub struct Streams {
    epoll: Arc<Epoll>,
    shared: Arc<Shared>,
    table: Table<HostSide>,
    lingering: BTreeSet<(Instant, Id)>,
}

/// How far [`Streams::take_from_guest`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// All that there is; the next kick says when there is more.
    All,
    /// A batch, and there is more.
    More,
    /// The guest must first make room for the answers that it is owed.
    Congested,
}

impl Streams {
    /// No connections yet. Their streams are watched in `epoll`, under the connection's id.
    pub fn new(guest_cid: u64, epoll: Arc<Epoll>, shared: Arc<Shared>) -> Self {
        let table = Table::new(guest_cid, CONNECTIONS_MAX, WINDOW);
        Streams { epoll, shared, table, lingering: BTreeSet::new() }
    }

    /// Whether the guest must make room for answers before more of its packets are taken.
    pub fn is_congested(&self) -> bool {
        self.table.is_congested()
    }

    /// Takes packets of the guest.
    pub fn take_from_guest(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> Moved {
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
    pub fn give_to_guest(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> bool {
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
    pub fn take_wishes(&mut self) -> bool {
        for Opening { port, socket, connected } in self.shared.take_openings() {
            // Without room the caller hears it from the sender's end.
            if let Ok(id) = self.table.open(port, HostSide::new(socket, Some(connected))) {
                self.watch(id);
            }
        }
        self.shared.is_stopping()
    }

    /// Something happened to a connection's stream.
    pub fn host_event(&mut self, id: Id, events: EventSet) {
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
    pub fn check_lingering(&mut self, now: Instant) -> Option<Duration> {
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

    /// Ends all connections without a word to the guest: its driver has started over.
    pub fn clear(&mut self) {
        for (id, host) in self.table.clear() {
            self.forget(id, host);
        }
    }

    /// Drops the answers that wait for the guest.
    pub fn drop_replies(&mut self) {
        self.table.drop_replies();
    }

    /// Ends for good: everybody who waits for the device hears so. Answers the streams.
    pub fn end(&mut self) -> impl Iterator<Item = (Id, HostSide)> {
        self.shared.close();
        self.table.clear().into_iter()
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
