//! Moves packets between the rings and the host's sockets, a batch at a time, as `table.rs` decides. `worker.rs`
//! decides when. Nothing here blocks.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{Epoll, EventSet};

use crate::connection::NextSend;
use crate::header::{HEADER_LEN, Header, Shut};
use crate::host_end::{Delivered, HostEnd, is_retry};
use crate::limits::{LIMITS, WINDOW};
use crate::ring::Ring;
use crate::scatter::{Scatter, Side};
use crate::shared::{ConnectRequest, Shared};
use crate::table::{ConnectionId, NextPacket, Outcome, Table};

/// Packets moved in one direction before the other direction, and the sockets, are served.
pub(crate) const BATCH: usize = 64;
/// How long a connection whose stream was dropped may make no progress before the guest gets an RST, and how long the
/// bytes of a VM that is gone wait for their reader. Linux waits 8 s in the first case (`VSOCK_CLOSE_TIMEOUT`).
pub const LINGER: Duration = Duration::from_secs(10);

/// The guest's connections with the host's sockets.
pub struct Forwarder {
    epoll: Arc<Epoll>,
    shared: Arc<Shared>,
    table: Table<HostEnd>,
    lingering: BTreeSet<(Instant, ConnectionId)>,
}

/// How far [`Forwarder::receive_from_guest`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The ring is empty. The guest's next packet comes with a kick.
    Drained,
    /// A batch is done, and the ring has more.
    More,
    /// The guest must make room for the RSTs that it is owed first.
    Congested,
}

impl Forwarder {
    /// Starts without connections. Their sockets are watched in `epoll`, with the connection's id as the token.
    pub fn new(guest_cid: u64, epoll: Arc<Epoll>, shared: Arc<Shared>) -> Self {
        let table = Table::new(guest_cid, LIMITS);
        Forwarder { epoll, shared, table, lingering: BTreeSet::new() }
    }

    /// Whether the guest must make room for RSTs before more of its packets are taken.
    pub(crate) fn is_congested(&self) -> bool {
        self.table.is_congested()
    }

    /// Takes a batch of packets from the guest.
    pub fn receive_from_guest(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> Progress {
        let mut progress = Progress::More;
        ring.mute_kicks(memory);
        for _ in 0..BATCH {
            if self.table.is_congested() {
                progress = Progress::Congested;
                break;
            }
            let Some(chain) = ring.pop(memory) else {
                if ring.wait_for_kick(memory) {
                    continue;
                }
                progress = Progress::Drained;
                break;
            };
            let head = chain.head_index();
            // A payload above the window is always a violation, so collecting the window is enough.
            if let Some(mut packet) = Scatter::collect(memory, chain, Side::Readable, HEADER_LEN + WINDOW as usize) {
                self.receive_packet(&mut packet);
            }
            ring.push(memory, head, 0);
        }
        notify(memory, ring);
        progress
    }

    fn receive_packet(&mut self, packet: &mut Scatter<'_>) {
        let mut bytes = [0; HEADER_LEN];
        if packet.read(&mut bytes) < HEADER_LEN {
            // Without a header there is no address for an RST.
            return;
        }
        let header = Header::decode(&bytes);
        match self.table.receive(&header, packet.len()) {
            Outcome::Nothing => {}
            Outcome::Request => self.accept(&header),
            Outcome::Connected(id) => {
                if let Some(connected) = self.table.get(id).and_then(|entry| entry.host.connected.take()) {
                    // Fails if the caller has given up. Its end of the pair is closed then, which epoll reports.
                    let _gave_up = connected.send(());
                }
            }
            Outcome::Payload(id) => {
                packet.truncate(header.len as usize);
                if let Some(entry) = self.table.get(id) {
                    let delivered = entry.host.deliver(packet, &self.epoll, id);
                    self.delivered(id, delivered);
                }
            }
            Outcome::Changed(id) => self.settle(id),
            Outcome::Dropped(id, host) => self.forget(id, &host),
        }
    }

    fn accept(&mut self, request: &Header) {
        let Some(slot) = self.shared.reserve(request.dst_port) else { return self.table.reject(request) };
        let (device, user) = match nonblocking_pair() {
            Ok(pair) => pair,
            Err(error) => {
                let port = request.dst_port;
                tracing::warn!(port, %error, "failed to create a socket pair for a vsock connection");
                return self.table.reject(request);
            }
        };
        let Ok(id) = self.table.accept(request, HostEnd::new(device, None)) else { return };
        if self.watch(id) {
            slot.send(user);
        }
    }

    fn watch(&mut self, id: ConnectionId) -> bool {
        let Some(entry) = self.table.get(id) else { return false };
        match entry.host.watch(&self.epoll, id) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "failed to watch the socket of a vsock connection");
                self.abort(id);
                false
            }
        }
    }

    /// Sends a batch of packets to the guest. Returns true if there are more packets and there may be room for them.
    pub fn send_to_guest(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> bool {
        let mut more = true;
        for _ in 0..BATCH {
            let Some(next) = self.table.next_packet() else {
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
                // The buffer cannot hold a header: return it to the guest unused.
                ring.push(memory, head, 0);
                continue;
            };
            match self.fill(next, room) {
                Some(len) => ring.push(memory, head, len),
                None => ring.undo_pop(),
            }
        }
        notify(memory, ring);
        more
    }

    /// Writes one packet into a buffer of the guest. Returns the packet's length, or `None` if there was nothing to
    /// send after all.
    fn fill(&mut self, next: NextPacket, mut room: Scatter<'_>) -> Option<usize> {
        let id = match next {
            NextPacket::Rst(header) => {
                self.table.rst_sent();
                room.write(&header.encode());
                return Some(HEADER_LEN);
            }
            NextPacket::From(id) => id,
        };
        let mut header_room = room.split_front(HEADER_LEN);
        let len = self.read_payload(id, &mut room);
        let header = if len > 0 { self.table.data(id, len as u32) } else { self.table.control(id) };
        self.table.finish_turn();
        header_room.write(&header?.encode());
        Some(HEADER_LEN + len)
    }

    /// Reads payload from the host's socket into a buffer of the guest, as far as the guest's credit allows. Returns
    /// the number of bytes.
    fn read_payload(&mut self, id: ConnectionId, room: &mut Scatter<'_>) -> usize {
        let Some(entry) = self.table.get(id) else { return 0 };
        let NextSend::Payload { limit } = entry.connection.next_send() else { return 0 };
        room.truncate(limit as usize);
        let requested = room.len();
        if requested == 0 {
            return 0;
        }
        match entry.host.read_into(room) {
            Ok(0) => entry.connection.host_eof(),
            Ok(n) => {
                if n < requested && !entry.host.saw_hangup {
                    // The socket is empty: its next byte, or its end, is a new edge.
                    entry.connection.host_drained();
                }
                return n;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_retry(&error) => entry.connection.host_drained(),
            Err(_) => {
                entry.host.discard_held();
                entry.connection.host_stops_reading();
                entry.connection.host_eof();
            }
        }
        0
    }

    /// Carries out the requests of the handles. Returns true if the thread should stop.
    pub(crate) fn take_requests(&mut self) -> bool {
        for ConnectRequest { port, socket, connected } in self.shared.take_requests() {
            // If the table is full, `connected` is dropped, which the caller reports as a refusal.
            if let Ok(id) = self.table.open(port, HostEnd::new(socket, Some(connected))) {
                self.watch(id);
            }
        }
        self.shared.is_stopping()
    }

    /// Handles an epoll event of a connection's socket.
    pub fn host_event(&mut self, id: ConnectionId, events: EventSet) {
        let Some(entry) = self.table.get(id) else { return };
        if events.contains(EventSet::OUT) {
            let delivered = entry.host.deliver_held(&self.epoll, id);
            self.delivered(id, delivered);
        }
        let Some(entry) = self.table.get(id) else { return };
        entry.host.saw_hangup |= events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        entry.connection.host_readable();
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            if entry.connection.is_requesting() {
                return self.abort(id);
            }
            entry.host.discard_held();
            entry.connection.host_stops_reading();
            if entry.host.deadline.is_none() {
                self.linger(id);
            }
        }
        self.settle(id);
    }

    fn delivered(&mut self, id: ConnectionId, delivered: Delivered) {
        let Some(entry) = self.table.get(id) else { return };
        match delivered {
            Delivered::Written(n) => entry.connection.host_consumed(n),
            Delivered::Broken(n) => {
                entry.connection.host_consumed(n);
                entry.connection.host_stops_reading();
            }
        }
        self.settle(id);
    }

    /// Follows every change of a connection: carries out half-closes, drops the connection when it is over, and
    /// schedules what it has to send.
    fn settle(&mut self, id: ConnectionId) {
        let Some(entry) = self.table.get(id) else { return };
        let shut = entry.connection.take_half_close();
        if shut != Shut::NONE {
            entry.host.half_close(shut);
        }
        if entry.connection.is_ended() && entry.connection.held() == 0 {
            return self.abort(id);
        }
        self.table.schedule(id);
    }

    fn linger(&mut self, id: ConnectionId) {
        let deadline = Instant::now() + LINGER;
        if let Some(entry) = self.table.get(id) {
            entry.host.deadline = Some(deadline);
            entry.host.transferred = 0;
            self.lingering.insert((deadline, id));
        }
    }

    /// Aborts connections that linger without progress. Returns the time until the next check.
    pub fn check_lingering(&mut self, now: Instant) -> Option<Duration> {
        while let Some(&(deadline, id)) = self.lingering.first() {
            if deadline > now {
                return Some(deadline - now);
            }
            self.lingering.pop_first();
            match self.table.get(id) {
                Some(entry) if entry.host.transferred > 0 => self.linger(id),
                Some(_) => self.abort(id),
                None => {}
            }
        }
        None
    }

    fn abort(&mut self, id: ConnectionId) {
        if let Some(host) = self.table.abort(id) {
            self.forget(id, &host);
        }
    }

    /// Drops all connections without notifying the guest, whose driver has restarted.
    pub(crate) fn clear(&mut self) {
        for (id, host) in self.table.clear() {
            self.forget(id, &host);
        }
    }

    /// Drops the RSTs queued for the guest.
    pub(crate) fn drop_rsts(&mut self) {
        self.table.drop_rsts();
    }

    /// Closes the device for its callers, and returns the host's ends of all connections.
    pub(crate) fn end(&mut self) -> impl Iterator<Item = (ConnectionId, HostEnd)> {
        self.shared.close();
        self.table.clear().into_iter()
    }

    fn forget(&mut self, id: ConnectionId, host: &HostEnd) {
        if let Some(deadline) = host.deadline {
            self.lingering.remove(&(deadline, id));
        }
    }
}

fn notify(memory: &GuestMemoryMmap, ring: &mut Ring) {
    if let Err(error) = ring.notify(memory) {
        tracing::warn!(%error, "failed to notify the guest of used vsock buffers");
    }
}

fn nonblocking_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (device, user) = UnixStream::pair()?;
    device.set_nonblocking(true)?;
    user.set_nonblocking(true)?;
    Ok((device, user))
}
