//! All connections of one guest: finds the connection of a packet, decides which packets get an RST, and schedules the
//! connections that have something to send. Pure: the host's end of a connection is the opaque type parameter `H`.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::connection::{Connection, Effect, NextSend, Outgoing};
use crate::header::{HOST_CID, Header, Op, Shut, TYPE_STREAM};
use crate::limits::Limits;

/// RSTs queued for the guest. With this many, the device takes no more packets: the guest has to make room first.
const RSTS_MAX: usize = 256;
/// First source port of host-initiated connections, well above the ports that services listen on.
const FIRST_PORT: u32 = 0x4000_0000;

/// Identifies a connection as long as its host end exists. Never reused.
pub type ConnectionId = u64;

/// The pair of ports that identifies a connection on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

/// A connection and its host end.
#[derive(Debug)]
pub struct Entry<H> {
    /// The connection's state machine.
    pub connection: Connection,
    /// The host's end.
    pub host: H,
    ports: Ports,
    /// The receive window, bytes.
    window: u32,
    by_guest: bool,
    /// The connection's place in [`Table::ready`].
    turn: Option<Turn>,
}

/// A place in the order of turns. Counts up and is never reused.
type Turn = u64;

/// What the device must do after a packet from the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome<H> {
    /// Nothing.
    Nothing,
    /// Answer the guest's request with [`Table::accept`] or [`Table::reject`].
    Request,
    /// Deliver the packet's payload to this connection.
    Payload(ConnectionId),
    /// The guest accepted the host's request.
    Connected(ConnectionId),
    /// Half-closes may be due on the host's socket. Or the guest's end is closed, and held bytes are still to be
    /// delivered.
    Changed(ConnectionId),
    /// The connection was dropped. Returns its host end.
    Dropped(ConnectionId, H),
}

/// The packet to send to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextPacket {
    /// An RST. After sending it, call [`Table::rst_sent`].
    Rst(Header),
    /// A packet of this connection: take it with [`Table::control`] or [`Table::data`], then call
    /// [`Table::finish_turn`].
    From(ConnectionId),
}

/// The connections of one guest.
#[derive(Debug)]
pub struct Table<H> {
    guest_cid: u64,
    limits: Limits,
    ids: HashMap<Ports, ConnectionId>,
    entries: HashMap<ConnectionId, Entry<H>>,
    /// How many of the entries the guest has opened.
    by_guest: usize,
    /// Sum of the entries' windows, bytes.
    windows: u64,
    /// Connections that may have something to send, in the order of their turns. All of them are in `entries`: a guest
    /// that takes no packets could otherwise add any number.
    ready: BTreeMap<Turn, ConnectionId>,
    next_turn: Turn,
    rsts: VecDeque<Header>,
    next_id: ConnectionId,
    next_port: u32,
}

impl<H> Table<H> {
    /// Starts without connections.
    pub fn new(guest_cid: u64, limits: Limits) -> Self {
        Table {
            guest_cid,
            limits,
            ids: HashMap::new(),
            entries: HashMap::new(),
            by_guest: 0,
            windows: 0,
            ready: BTreeMap::new(),
            next_turn: 0,
            rsts: VecDeque::new(),
            next_id: 0,
            next_port: FIRST_PORT,
        }
    }

    /// Whether the guest must make room for RSTs before more of its packets are taken.
    pub fn is_congested(&self) -> bool {
        self.rsts.len() >= RSTS_MAX
    }

    /// Handles a packet from the guest. `payload` is the size of what the packet really carries, bytes. A header that
    /// claims more is a violation.
    pub fn receive(&mut self, header: &Header, payload: usize) -> Outcome<H> {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID || header.socket_type != TYPE_STREAM {
            return self.reply_rst(header);
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let Some(&id) = self.ids.get(&ports) else {
            return if header.op == Some(Op::Request) { Outcome::Request } else { self.reply_rst(header) };
        };
        let Some(entry) = self.entries.get_mut(&id) else {
            self.ids.remove(&ports);
            return self.reply_rst(header);
        };
        let effect = if header.len as usize > payload { Effect::Violation } else { entry.connection.receive(header) };
        match effect {
            Effect::Nothing => {
                self.schedule(id);
                Outcome::Changed(id)
            }
            Effect::Payload => {
                self.schedule(id);
                Outcome::Payload(id)
            }
            Effect::Connected => {
                self.schedule(id);
                Outcome::Connected(id)
            }
            Effect::Ended { rst } => {
                let held = entry.connection.held();
                self.ids.remove(&ports);
                if rst {
                    self.rsts.push_back(header.rst_reply());
                }
                if held > 0 { Outcome::Changed(id) } else { self.remove(id) }
            }
            Effect::Violation => {
                self.ids.remove(&ports);
                self.reply_rst(header);
                self.remove(id)
            }
        }
    }

    fn remove(&mut self, id: ConnectionId) -> Outcome<H> {
        self.take(id).map_or(Outcome::Nothing, |entry| Outcome::Dropped(id, entry.host))
    }

    /// Removes a connection with everything that the table counts and links of it.
    fn take(&mut self, id: ConnectionId) -> Option<Entry<H>> {
        let entry = self.entries.remove(&id)?;
        if self.ids.get(&entry.ports) == Some(&id) {
            self.ids.remove(&entry.ports);
        }
        if let Some(turn) = entry.turn {
            self.ready.remove(&turn);
        }
        self.windows -= u64::from(entry.window);
        self.by_guest -= usize::from(entry.by_guest);
        Some(entry)
    }

    fn reply_rst(&mut self, header: &Header) -> Outcome<H> {
        // An RST never gets an answer: two sides without a connection would exchange RSTs forever.
        if header.op != Some(Op::Rst) {
            self.rsts.push_back(header.rst_reply());
        }
        Outcome::Nothing
    }

    /// Accepts a request.
    ///
    /// # Errors
    ///
    /// With a full table, or if the guest has opened too many, it rejects the request and returns `host`.
    pub fn accept(&mut self, request: &Header, host: H) -> Result<ConnectionId, H> {
        if self.entries.len() >= self.limits.connections || self.by_guest >= self.limits.by_guest {
            self.reject(request);
            return Err(host);
        }
        let ports = Ports { host: request.dst_port, guest: request.src_port };
        self.by_guest += 1;
        Ok(self.insert(ports, Connection::accepted(self.next_window(), request), host, true))
    }

    /// Rejects a request with an RST.
    pub(crate) fn reject(&mut self, request: &Header) {
        self.reply_rst(request);
    }

    /// Requests a connection to a port of the guest.
    ///
    /// # Errors
    ///
    /// With a full table it returns `host`.
    pub fn open(&mut self, port: u32, host: H) -> Result<ConnectionId, H> {
        if self.entries.len() >= self.limits.connections {
            return Err(host);
        }
        let mut ports = Ports { host: self.next_port, guest: port };
        // The loop ends because there are fewer connections than ports.
        while self.ids.contains_key(&ports) {
            ports.host = next_port(ports.host);
        }
        self.next_port = next_port(ports.host);
        Ok(self.insert(ports, Connection::requesting(self.next_window()), host, false))
    }

    /// The receive window of the next connection.
    pub(crate) fn next_window(&self) -> u32 {
        let Limits { window, windows, small_window, .. } = self.limits;
        if self.windows + u64::from(window) <= windows { window } else { small_window }
    }

    fn insert(&mut self, ports: Ports, connection: Connection, host: H, by_guest: bool) -> ConnectionId {
        let id = self.next_id;
        self.next_id += 1;
        let window = self.next_window();
        self.windows += u64::from(window);
        self.ids.insert(ports, id);
        self.entries.insert(id, Entry { connection, host, ports, window, by_guest, turn: None });
        self.schedule(id);
        id
    }

    /// The connection, for reporting events of the host's end. Call [`Table::schedule`] afterwards.
    pub fn get(&mut self, id: ConnectionId) -> Option<&mut Entry<H>> {
        self.entries.get_mut(&id)
    }

    /// Schedules the connection if it has something to send.
    pub fn schedule(&mut self, id: ConnectionId) {
        if let Some(entry) = self.entries.get_mut(&id)
            && entry.turn.is_none()
            && entry.connection.next_send() != NextSend::Nothing
        {
            entry.turn = Some(self.next_turn);
            self.ready.insert(self.next_turn, id);
            self.next_turn += 1;
        }
    }

    /// Ends a connection at once from the host's side. The guest gets an RST if it knows the connection.
    pub fn abort(&mut self, id: ConnectionId) -> Option<H> {
        let entry = self.take(id)?;
        if entry.connection.is_known_to_guest() {
            self.rsts.push_back(Header { op: Some(Op::Rst), ..self.header(entry.ports) });
        }
        Some(entry.host)
    }

    /// Drops all connections without RSTs: the guest's driver has restarted, or the guest is gone.
    pub(crate) fn clear(&mut self) -> Vec<(ConnectionId, H)> {
        self.ids.clear();
        self.ready.clear();
        self.rsts.clear();
        (self.by_guest, self.windows) = (0, 0);
        self.entries.drain().map(|(id, entry)| (id, entry.host)).collect()
    }

    /// The packet to send next. Connections take turns packet by packet, so that a busy one does not delay the others.
    /// RSTs go first because they shorten the guest's own queues.
    pub fn next_packet(&mut self) -> Option<NextPacket> {
        if let Some(rst) = self.rsts.front() {
            return Some(NextPacket::Rst(*rst));
        }
        loop {
            let turn = self.ready.first_entry()?;
            let id = *turn.get();
            match self.entries.get_mut(&id) {
                Some(entry) if entry.connection.next_send() != NextSend::Nothing => return Some(NextPacket::From(id)),
                Some(entry) => entry.turn = None,
                None => {}
            }
            turn.remove();
        }
    }

    /// Drops the queued RSTs, which have no reader any more.
    pub(crate) fn drop_rsts(&mut self) {
        self.rsts.clear();
    }

    /// The RST that [`Table::next_packet`] returned was sent.
    pub fn rst_sent(&mut self) {
        self.rsts.pop_front();
    }

    /// Ends the turn of the first connection. It goes to the end of the queue if it has more to send.
    pub fn finish_turn(&mut self) {
        if let Some((_, id)) = self.ready.pop_first()
            && let Some(entry) = self.entries.get_mut(&id)
        {
            entry.turn = None;
            self.schedule(id);
        }
    }

    /// Returns the packet without payload that a connection has to send, and counts it as sent.
    pub fn control(&mut self, id: ConnectionId) -> Option<Header> {
        let entry = self.entries.get_mut(&id)?;
        let (outgoing, ports) = (entry.connection.control()?, entry.ports);
        Some(self.address(ports, outgoing))
    }

    /// Returns the header for `len` bytes of a connection's payload, and counts them as sent.
    pub fn data(&mut self, id: ConnectionId, len: u32) -> Option<Header> {
        let entry = self.entries.get_mut(&id)?;
        let (outgoing, ports) = (entry.connection.data(len), entry.ports);
        Some(self.address(ports, outgoing))
    }

    fn address(&self, ports: Ports, outgoing: Outgoing) -> Header {
        Header {
            len: outgoing.len,
            op: Some(outgoing.op),
            shut: outgoing.shut,
            buf_alloc: outgoing.buf_alloc,
            fwd_cnt: outgoing.fwd_cnt,
            ..self.header(ports)
        }
    }

    fn header(&self, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: 0,
            socket_type: TYPE_STREAM,
            op: None,
            shut: Shut::NONE,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

fn next_port(port: u32) -> u32 {
    // VMADDR_PORT_ANY (u32::MAX) is not a valid port.
    if port >= u32::MAX - 1 { FIRST_PORT } else { port + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: u64 = 7;
    const LIMITS: Limits = Limits { connections: 2, by_guest: 2, window: 100, windows: 1000, small_window: 10 };

    fn packet(op: Op) -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: 5000,
            dst_port: 1027,
            len: 0,
            socket_type: TYPE_STREAM,
            op: Some(op),
            shut: Shut::NONE,
            buf_alloc: 1000,
            fwd_cnt: 0,
        }
    }

    fn table() -> Table<&'static str> {
        Table::new(GUEST, LIMITS)
    }

    /// A table with one connection that the guest opened with `packet`. Its RESPONSE has been sent.
    fn connected() -> (Table<&'static str>, ConnectionId) {
        let mut table = table();
        assert_eq!(table.receive(&packet(Op::Request), 0), Outcome::Request);
        let id = table.accept(&packet(Op::Request), "a").expect("room");
        assert_eq!(sent(&mut table), Some(Op::Response));
        (table, id)
    }

    /// Sends the next packet without payload and returns its operation.
    fn sent(table: &mut Table<&'static str>) -> Option<Op> {
        match table.next_packet()? {
            NextPacket::Rst(header) => {
                table.rst_sent();
                header.op
            }
            NextPacket::From(id) => {
                let header = table.control(id);
                table.finish_turn();
                header?.op
            }
        }
    }

    #[test]
    fn an_invalid_packet_gets_an_rst_but_an_rst_gets_no_answer() {
        let cases = [
            ("unknown connection", packet(Op::Rw)),
            ("unknown connection", packet(Op::Response)),
            ("unknown connection", packet(Op::Shutdown)),
            ("unknown connection", packet(Op::CreditUpdate)),
            ("the CID of another guest", Header { src_cid: 9, ..packet(Op::Request) }),
            ("not addressed to the host", Header { dst_cid: 1, ..packet(Op::Request) }),
            ("an unsupported socket type", Header { socket_type: 2, ..packet(Op::Request) }),
            ("an unknown operation", Header { op: None, ..packet(Op::Rw) }),
        ];
        for (what, header) in cases {
            let mut table = table();
            assert_eq!(table.receive(&header, 0), Outcome::Nothing, "{what}");
            assert_eq!(table.next_packet(), Some(NextPacket::Rst(header.rst_reply())), "{what}");
            table.rst_sent();
            assert_eq!(table.receive(&Header { op: Some(Op::Rst), ..header }, 0), Outcome::Nothing, "{what}");
            assert_eq!(table.next_packet(), None, "{what}");
        }
    }

    #[test]
    fn a_protocol_violation_ends_the_connection() {
        let cases = [
            ("a request on ports in use", packet(Op::Request), 0),
            ("a response without a request", packet(Op::Response), 0),
            ("an unknown operation", Header { op: None, ..packet(Op::Rw) }, 0),
            ("more payload than the credit", Header { len: 101, ..packet(Op::Rw) }, 101),
            ("less payload than the header claims", Header { len: 10, ..packet(Op::Rw) }, 9),
        ];
        for (what, header, payload) in cases {
            let (mut table, id) = connected();
            assert_eq!(table.receive(&header, payload), Outcome::Dropped(id, "a"), "{what}");
            assert_eq!(sent(&mut table), Some(Op::Rst), "{what}");
            assert_eq!(sent(&mut table), None, "{what}");
        }
    }

    #[test]
    fn payload_after_shutdown_of_sending_ends_the_connection() {
        let (mut table, id) = connected();
        assert_eq!(table.receive(&Header { shut: Shut::SEND, ..packet(Op::Shutdown) }, 0), Outcome::Changed(id));
        assert_eq!(table.receive(&Header { len: 1, ..packet(Op::Rw) }, 1), Outcome::Dropped(id, "a"));
        assert_eq!(sent(&mut table), Some(Op::Rst));
    }

    #[test]
    fn the_number_of_connections_is_bounded() {
        let mut table = table();
        assert!(table.open(1, "a").is_ok());
        assert!(table.accept(&packet(Op::Request), "b").is_ok());
        assert_eq!(table.open(2, "c"), Err("c"));
        let third = Header { src_port: 6000, ..packet(Op::Request) };
        assert_eq!(table.accept(&third, "d"), Err("d"));
        assert_eq!(table.next_packet(), Some(NextPacket::Rst(third.rst_reply())));
    }

    #[test]
    fn a_guest_that_opens_too_many_connections_leaves_room_for_those_of_the_host() {
        let limits = Limits { connections: 100, by_guest: 3, ..LIMITS };
        let mut table = Table::new(GUEST, limits);
        let request = |port| Header { src_port: port, ..packet(Op::Request) };
        let ids: Vec<_> = (1..=3).map(|port| table.accept(&request(port), "guest").expect("room")).collect();
        assert_eq!(table.accept(&request(4), "one more"), Err("one more"));
        assert_eq!(table.next_packet(), Some(NextPacket::Rst(request(4).rst_reply())));
        table.rst_sent();
        assert!((0..97).all(|_| table.open(1025, "host").is_ok()));
        assert_eq!(table.abort(ids[1]), Some("guest"));
        assert!(table.accept(&request(4), "in its place").is_ok());
        table.clear();
        assert!((1..=3).all(|port| table.accept(&request(port), "after a restart").is_ok()));
    }

    #[test]
    fn the_windows_of_all_connections_together_are_bounded() {
        let limits = Limits { connections: 50, by_guest: 50, ..LIMITS };
        let mut table = Table::new(GUEST, limits);
        let ids: Vec<_> = (0..50).map(|_| table.open(1025, "a").expect("room")).collect();
        let total: u32 = table.entries.values().map(|entry| entry.window).sum();
        assert_eq!((total, table.windows), (10 * 100 + 40 * 10, u64::from(total)));
        for id in &ids {
            table.abort(*id);
        }
        assert_eq!((table.windows, table.next_window()), (0, 100), "closed connections return their windows");
    }

    #[test]
    fn a_guest_that_takes_no_packets_cannot_grow_the_table() {
        let mut table = Table::new(GUEST, Limits { connections: 8, by_guest: 4, ..LIMITS });
        let opened = table.open(1025, "host").expect("room");
        for round in 0..100_000_u32 {
            let request = Header { src_port: round, ..packet(Op::Request) };
            // Without receive buffers, the RESPONSE stays due.
            if table.receive(&request, 0) == Outcome::Request {
                let _full = table.accept(&request, "guest");
            }
            table.receive(&Header { op: Some(Op::Rst), ..request }, 0);
        }
        for port in 0..10 {
            let request = Header { src_port: port, ..packet(Op::Request) };
            assert_eq!(table.receive(&request, 0), Outcome::Request);
            let _full = table.accept(&request, "guest");
        }
        assert_eq!((table.entries.len(), table.ids.len(), table.ready.len()), (5, 5, 5));
        assert_eq!(table.rsts.len(), 6);
        // The host's connection has kept its turn.
        table.drop_rsts();
        assert_eq!(table.next_packet(), Some(NextPacket::From(opened)));
    }

    #[test]
    fn a_guest_that_takes_no_rsts_is_throttled() {
        let mut table = table();
        for _ in 0..RSTS_MAX {
            assert!(!table.is_congested());
            table.receive(&packet(Op::Rw), 0);
        }
        assert!(table.is_congested());
        table.rst_sent();
        assert!(!table.is_congested());
    }

    #[test]
    fn a_refused_request_of_the_host_is_dropped_without_an_answer() {
        let mut table = table();
        let id = table.open(5000, "a").expect("room");
        let Some(NextPacket::From(next)) = table.next_packet() else { panic!("no packet is scheduled") };
        let request = table.control(next).expect("a request");
        table.finish_turn();
        assert_eq!(request.op, Some(Op::Request));
        assert_eq!(request.dst_port, 5000);
        let refusal = Header { dst_port: request.src_port, ..packet(Op::Rst) };
        assert_eq!(table.receive(&refusal, 0), Outcome::Dropped(id, "a"));
        assert_eq!(table.next_packet(), None);
    }

    #[test]
    fn cancelling_a_request_sends_an_rst_only_if_the_guest_knows_the_request() {
        let mut table = table();
        let id = table.open(5000, "a").expect("room");
        assert_eq!(table.abort(id), Some("a"));
        assert_eq!(table.next_packet(), None);
        let id = table.open(5000, "b").expect("room");
        assert_eq!(sent(&mut table), Some(Op::Request));
        assert_eq!(table.abort(id), Some("b"));
        assert_eq!(sent(&mut table), Some(Op::Rst));
    }

    #[test]
    fn bytes_sent_before_the_guests_close_reach_the_host() {
        let (mut table, id) = connected();
        assert_eq!(table.receive(&Header { len: 60, ..packet(Op::Rw) }, 60), Outcome::Payload(id));
        assert_eq!(table.receive(&Header { shut: Shut::BOTH, ..packet(Op::Shutdown) }, 0), Outcome::Changed(id));
        // The RST is sent at once: the guest can reuse the ports while the host still reads.
        assert_eq!(sent(&mut table), Some(Op::Rst));
        assert_eq!(table.receive(&packet(Op::Request), 0), Outcome::Request);
        let entry = table.get(id).expect("the connection still exists");
        assert_eq!(entry.connection.take_half_close(), Shut::RECEIVE);
        entry.connection.host_consumed(60);
        assert_eq!(entry.connection.take_half_close(), Shut::SEND);
        assert!(entry.connection.is_ended());
    }

    #[test]
    fn a_busy_connection_does_not_delay_the_others() {
        let mut table = table();
        for (at, port) in [5000, 5001].into_iter().enumerate() {
            let request = Header { src_port: port, ..packet(Op::Request) };
            let id = table.accept(&request, "x").expect("room");
            assert_eq!(id, at as ConnectionId);
        }
        assert_eq!((sent(&mut table), sent(&mut table)), (Some(Op::Response), Some(Op::Response)));
        for id in [0, 1] {
            table.get(id).expect("the connection exists").connection.host_readable();
            table.schedule(id);
        }
        let mut order = Vec::new();
        for _ in 0..6 {
            let Some(NextPacket::From(id)) = table.next_packet() else { panic!("no packet is scheduled") };
            table.data(id, 10);
            table.finish_turn();
            order.push(id);
        }
        assert_eq!(order, [0, 1, 0, 1, 0, 1]);
    }
}
