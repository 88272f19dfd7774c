//! Property tests of the pure files: a simulated guest, the device's decisions, and the users of the streams take steps
//! in an order that proptest chooses. In any order, all bytes arrive once and in order, neither side exceeds its
//! credit, and every connection ends.

use std::collections::VecDeque;

use proptest::prelude::*;

use husk_vsock::testing::{
    ConnectionId, HOST_CID, Header, Limits, NextPacket, NextSend, Op, Outcome, Shut, TYPE_STREAM, Table,
};

const GUEST_CID: u64 = 7;
const HOST_PORT: u32 = 1027;

/// Byte `at` of connection `n`, in the direction to the guest (`up`) or to the host.
fn byte(n: usize, up: bool, at: usize) -> u8 {
    (at.wrapping_mul(31) ^ n.wrapping_mul(7) ^ usize::from(up).wrapping_mul(13) ^ (at >> 8)) as u8
}

/// A user's end of a stream, and the socket buffers between it and the device.
#[derive(Default)]
struct User {
    id: Option<ConnectionId>,
    total: usize,
    written: usize,
    to_device: VecDeque<u8>,
    eof_sent: bool,
    held: VecDeque<u8>,
    to_user: VecDeque<u8>,
    eof_seen: bool,
    got: usize,
    ended: bool,
}

/// The guest's end of a connection, with its own credit.
#[derive(Default)]
struct Peer {
    ports: Option<(u32, u32)>,
    open: bool,
    total: usize,
    sent: usize,
    alloc: u32,
    forwarded: u32,
    announced: u32,
    inbox: VecDeque<u8>,
    got: usize,
    device_alloc: u32,
    device_forwarded: u32,
    shut: Shut,
    device_shut: Shut,
    ended: bool,
}

impl Peer {
    fn packet(&mut self, op: Op, shut: Shut, len: u32) -> Option<Header> {
        let (guest, host) = self.ports?;
        self.announced = self.forwarded;
        Some(Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            len,
            socket_type: TYPE_STREAM,
            op: Some(op),
            shut,
            buf_alloc: self.alloc,
            fwd_cnt: self.forwarded,
        })
    }
}

struct Simulation {
    table: Table<usize>,
    users: Vec<User>,
    peers: Vec<Peer>,
    /// The guest's transmit queue.
    tx: VecDeque<(Header, Vec<u8>)>,
    window: u32,
    pipe: usize,
}

#[derive(Clone, Debug)]
struct Scenario {
    window: u32,
    pipe: usize,
    /// (the host opens it, bytes to the guest, bytes to the host, size of the guest's buffer)
    connections: Vec<(bool, usize, usize, u32)>,
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let connection = (any::<bool>(), 0..3000usize, 0..3000usize, 1..600u32);
    (4..600u32, 1..400usize, prop::collection::vec(connection, 1..5)).prop_map(|(window, pipe, connections)| Scenario {
        window,
        pipe,
        connections,
    })
}

/// Few connections, each with the same window.
fn limits(window: u32) -> Limits {
    Limits { connections: 16, by_guest: 16, window, windows: 1 << 20, small_window: window }
}

impl Simulation {
    fn new(scenario: &Scenario) -> Self {
        let mut simulation = Simulation {
            table: Table::new(GUEST_CID, limits(scenario.window)),
            users: Vec::new(),
            peers: Vec::new(),
            tx: VecDeque::new(),
            window: scenario.window,
            pipe: scenario.pipe,
        };
        for (n, &(host_opens, up, down, alloc)) in scenario.connections.iter().enumerate() {
            let mut user = User { total: up, ..User::default() };
            let mut peer = Peer { total: down, alloc, ..Peer::default() };
            if host_opens {
                user.id = simulation.table.open(n as u32, n).ok();
            } else {
                peer.ports = Some((n as u32, HOST_PORT));
                let request = peer.packet(Op::Request, Shut::NONE, 0);
                simulation.tx.extend(request.map(|request| (request, Vec::new())));
            }
            simulation.users.push(user);
            simulation.peers.push(peer);
        }
        simulation
    }

    /// Takes one step of one kind for one connection and moves at most `n` bytes. Returns true if something moved.
    fn step(&mut self, kind: u8, who: usize, n: usize) -> bool {
        let who = who % self.users.len();
        match kind % 8 {
            0 => self.user_writes(who, n),
            1 => self.user_reads(who, n),
            2 => self.peer_sends(who, n),
            3 => self.peer_reads(who, n),
            4 => self.device_receives(),
            5 | 6 => self.device_sends(n),
            _ => self.device_flushes(who),
        }
    }

    fn user_writes(&mut self, who: usize, n: usize) -> bool {
        let user = &mut self.users[who];
        let Some(id) = user.id else { return false };
        let room = self.pipe.saturating_sub(user.to_device.len()).min(n).min(user.total - user.written);
        for at in user.written..user.written + room {
            user.to_device.push_back(byte(who, true, at));
        }
        user.written += room;
        let ends = user.written == user.total && !user.eof_sent;
        user.eof_sent |= ends;
        if room > 0 || ends {
            if let Some(entry) = self.table.get(id) {
                entry.connection.host_readable();
            }
            self.table.schedule(id);
        }
        room > 0 || ends
    }

    fn user_reads(&mut self, who: usize, n: usize) -> bool {
        let user = &mut self.users[who];
        let take = n.min(user.to_user.len());
        for got in user.to_user.drain(..take) {
            assert_eq!(got, byte(who, false, user.got), "byte {} to user {who}", user.got);
            user.got += 1;
        }
        take > 0
    }

    fn peer_sends(&mut self, who: usize, n: usize) -> bool {
        let peer = &mut self.peers[who];
        if !peer.open || peer.shut.has(Shut::SEND) {
            return false;
        }
        let in_flight = (peer.sent as u32).wrapping_sub(peer.device_forwarded);
        let credit = peer.device_alloc.saturating_sub(in_flight) as usize;
        let len = n.min(credit).min(peer.total - peer.sent);
        let packet = if peer.sent == peer.total {
            peer.shut.add(Shut::SEND);
            (peer.packet(Op::Shutdown, Shut::SEND, 0), Vec::new())
        } else if len > 0 {
            let bytes = (peer.sent..peer.sent + len).map(|at| byte(who, false, at)).collect();
            peer.sent += len;
            (peer.packet(Op::Rw, Shut::NONE, len as u32), bytes)
        } else {
            return false;
        };
        self.tx.extend(packet.0.map(|header| (header, packet.1)));
        true
    }

    fn peer_reads(&mut self, who: usize, n: usize) -> bool {
        let peer = &mut self.peers[who];
        let take = n.min(peer.inbox.len());
        for got in peer.inbox.drain(..take) {
            assert_eq!(got, byte(who, true, peer.got), "byte {} to peer {who}", peer.got);
            peer.got += 1;
        }
        peer.forwarded = peer.forwarded.wrapping_add(take as u32);
        let freed = peer.forwarded.wrapping_sub(peer.announced);
        if take > 0 && !peer.ended && freed >= peer.alloc.div_ceil(2) {
            let update = peer.packet(Op::CreditUpdate, Shut::NONE, 0);
            self.tx.extend(update.map(|update| (update, Vec::new())));
        }
        take > 0
    }

    fn peer_receives(&mut self, header: &Header, payload: &[u8]) {
        // The guest's port identifies the connection, whichever side opened it.
        let who = header.dst_port as usize;
        let peer = &mut self.peers[who];
        peer.device_alloc = header.buf_alloc;
        peer.device_forwarded = header.fwd_cnt;
        let answer = match header.op {
            Some(Op::Request) => {
                peer.ports = Some((header.dst_port, header.src_port));
                peer.open = true;
                peer.packet(Op::Response, Shut::NONE, 0)
            }
            Some(Op::Response) => {
                peer.open = true;
                None
            }
            Some(Op::Rw) => {
                assert!(!peer.device_shut.has(Shut::SEND), "payload after SHUTDOWN(SEND)");
                peer.inbox.extend(payload);
                assert!(peer.inbox.len() <= peer.alloc as usize, "the device exceeds its credit");
                None
            }
            Some(Op::CreditRequest) => peer.packet(Op::CreditUpdate, Shut::NONE, 0),
            Some(Op::Shutdown) => {
                peer.device_shut.add(header.shut);
                if peer.device_shut.has(Shut::BOTH) {
                    peer.ended = true;
                    peer.open = false;
                    peer.packet(Op::Rst, Shut::NONE, 0)
                } else {
                    None
                }
            }
            Some(Op::Rst) => panic!("an RST although both sides follow the protocol"),
            Some(Op::CreditUpdate) | None => None,
        };
        self.tx.extend(answer.map(|answer| (answer, Vec::new())));
    }

    fn device_receives(&mut self) -> bool {
        let Some((header, payload)) = self.tx.pop_front() else { return false };
        match self.table.receive(&header, payload.len()) {
            Outcome::Nothing | Outcome::Connected(_) => {}
            Outcome::Request => {
                let who = header.src_port as usize;
                self.users[who].id = self.table.accept(&header, who).ok();
            }
            Outcome::Payload(id) => {
                let who = self.table.get(id).map(|entry| entry.host);
                if let Some(who) = who {
                    self.users[who].held.extend(payload);
                    assert!(self.users[who].held.len() <= self.window as usize, "held bytes exceed the window");
                }
            }
            Outcome::Changed(id) => self.settle(id),
            Outcome::Dropped(_, who) => {
                self.users[who].ended = true;
            }
        }
        true
    }

    fn settle(&mut self, id: ConnectionId) {
        let Some(entry) = self.table.get(id) else { return };
        let who = entry.host;
        if entry.connection.take_half_close().has(Shut::SEND) {
            assert!(self.users[who].held.is_empty(), "end of file before the held bytes");
            self.users[who].eof_seen = true;
        }
        if entry.connection.is_ended() && entry.connection.held() == 0 {
            self.table.abort(id);
            self.users[who].ended = true;
        }
        self.table.schedule(id);
    }

    fn device_flushes(&mut self, who: usize) -> bool {
        let user = &mut self.users[who];
        let Some(id) = user.id else { return false };
        let room = (self.pipe - user.to_user.len()).min(user.held.len());
        user.to_user.extend(user.held.drain(..room));
        if room > 0
            && let Some(entry) = self.table.get(id)
        {
            entry.connection.host_consumed(room as u32);
        }
        self.settle(id);
        room > 0
    }

    fn device_sends(&mut self, room: usize) -> bool {
        let (header, payload) = match self.table.next_packet() {
            None => return false,
            Some(NextPacket::Rst(header)) => {
                self.table.rst_sent();
                (Some(header), Vec::new())
            }
            Some(NextPacket::From(id)) => {
                let mut header = None;
                let mut payload = Vec::new();
                if let Some(entry) = self.table.get(id)
                    && let NextSend::Payload { limit } = entry.connection.next_send()
                    && room > 0
                {
                    let user = &mut self.users[entry.host];
                    let n = room.min(limit as usize).min(user.to_device.len());
                    payload.extend(user.to_device.drain(..n));
                    if n > 0 {
                        header = self.table.data(id, n as u32);
                    } else if user.eof_sent {
                        entry.connection.host_eof();
                    } else {
                        entry.connection.host_drained();
                    }
                }
                let header = header.or_else(|| self.table.control(id));
                self.table.finish_turn();
                (header, payload)
            }
        };
        if let Some(header) = header {
            self.peer_receives(&header, &payload);
        }
        header.is_some()
    }

    /// Runs all steps until nothing moves any more.
    fn finish(&mut self) {
        let mut idle = 0;
        while idle < 3 {
            let mut moved = false;
            for kind in 0..8 {
                for who in 0..self.users.len() {
                    moved |= self.step(kind, who, 64);
                }
            }
            idle = if moved { 0 } else { idle + 1 };
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn all_bytes_arrive_once_and_in_order_and_every_connection_ends(
        scenario in scenario(),
        steps in prop::collection::vec((any::<u8>(), any::<usize>(), 0..300usize), 0..2000),
    ) {
        let mut simulation = Simulation::new(&scenario);
        for (kind, who, n) in steps {
            simulation.step(kind, who, n);
        }
        simulation.finish();
        for (n, (user, peer)) in simulation.users.iter().zip(&simulation.peers).enumerate() {
            prop_assert_eq!(user.got, peer.total, "bytes to user {}", n);
            prop_assert_eq!(peer.got, user.total, "bytes to peer {}", n);
            prop_assert!(user.eof_seen, "user {} got no end of file", n);
            prop_assert!(peer.device_shut.has(Shut::BOTH) && peer.ended, "peer {} got no complete shutdown", n);
            prop_assert!(user.ended, "connection {} did not end", n);
        }
        prop_assert!(simulation.table.next_packet().is_none());
    }

    /// A guest may send any packets: nothing panics, and the state kept for it stays bounded.
    #[test]
    fn random_packets_keep_the_state_bounded(
        packets in prop::collection::vec(
            (
                (0..3u64, 0..3u64, 0..4u32, 0..4u32),
                (any::<u32>(), 0..3u16, 0..9u16, any::<u8>(), any::<u32>(), any::<u32>()),
                0..2000usize,
            ),
            0..600,
        ),
        sends in prop::collection::vec(0..200usize, 0..100),
    ) {
        let mut table: Table<()> = Table::new(1, limits(1000));
        let mut sends = sends.into_iter();
        let mut ids: Vec<ConnectionId> = Vec::new();
        for (addresses, fields, payload) in packets {
            let (src_cid, dst_cid, src_port, dst_port) = addresses;
            let (len, socket_type, op, shut, buf_alloc, fwd_cnt) = fields;
            if table.is_congested() {
                while table.next_packet().is_some_and(|next| matches!(next, NextPacket::Rst(_))) {
                    table.rst_sent();
                }
            }
            let mut bytes = Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len: len % 2000,
                socket_type,
                op: None,
                shut: Shut::NONE,
                buf_alloc,
                fwd_cnt,
            }
            .encode();
            bytes[30] = op as u8;
            bytes[32] = shut;
            let header = Header::decode(&bytes);
            match table.receive(&header, payload) {
                Outcome::Request => ids.extend(table.accept(&header, ())),
                Outcome::Payload(id) => {
                    prop_assert!(header.len as usize <= payload);
                    let entry = table.get(id);
                    prop_assert!(entry.is_some_and(|entry| entry.connection.held() <= 1000));
                }
                Outcome::Changed(id) => {
                    if let Some(entry) = table.get(id) {
                        entry.connection.take_half_close();
                    }
                }
                Outcome::Nothing | Outcome::Connected(_) | Outcome::Dropped(..) => {}
            }
            if let (Some(n), Some(&id)) = (sends.next(), ids.last()) {
                if let Some(entry) = table.get(id) {
                    entry.connection.host_readable();
                    entry.connection.host_consumed(n as u32);
                }
                table.schedule(id);
                if let Some(NextPacket::From(id)) = table.next_packet() {
                    table.control(id);
                    table.finish_turn();
                }
            }
            ids.retain(|&id| table.get(id).is_some());
            prop_assert!(ids.len() <= 8);
        }
    }
}
