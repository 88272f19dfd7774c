//! Property tests of the pure parts: a guest, the device's decisions and the users of the streams, moved step by step in an order that proptest
//! chooses. Whatever the order, all bytes arrive once and in order, neither side oversteps its credit, and everything comes to its end.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::connection::Plan;
use super::header::{HOST_CID, Header, Op, Shut, TYPE_STREAM};
use super::table::{Id, Table, Turn, Verdict};

const GUEST_CID: u64 = 7;
const HOST_PORT: u32 = 1027;

/// Byte `at` of the stream that goes `up` (to the guest) or down, of connection `n`.
fn byte(n: usize, up: bool, at: usize) -> u8 {
    (at.wrapping_mul(31) ^ n.wrapping_mul(7) ^ usize::from(up).wrapping_mul(13) ^ (at >> 8)) as u8
}

/// A user's end of a stream, and the socket buffers between it and the device.
#[derive(Default)]
struct User {
    id: Option<Id>,
    total: usize,
    written: usize,
    to_device: VecDeque<u8>,
    eof_sent: bool,
    held: VecDeque<u8>,
    to_user: VecDeque<u8>,
    eof_seen: bool,
    got: usize,
    over: bool,
}

/// The guest's end of a connection, with credit of its own.
#[derive(Default)]
struct Peer {
    ports: Option<(u32, u32)>,
    open: bool,
    total: usize,
    sent: usize,
    alloc: u32,
    forwarded: u32,
    told: u32,
    inbox: VecDeque<u8>,
    got: usize,
    device_alloc: u32,
    device_forwarded: u32,
    shut: Shut,
    device_shut: Shut,
    over: bool,
}

impl Peer {
    fn packet(&mut self, op: Op, shut: Shut, len: u32) -> Option<Header> {
        let (guest, host) = self.ports?;
        self.told = self.forwarded;
        Some(Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            len,
            kind: TYPE_STREAM,
            op: Some(op),
            shut,
            buf_alloc: self.alloc,
            fwd_cnt: self.forwarded,
        })
    }
}

struct World {
    table: Table<usize>,
    users: Vec<User>,
    peers: Vec<Peer>,
    /// The guest's transmit queue.
    tx: VecDeque<(Header, Vec<u8>)>,
    window: u32,
    pipe: usize,
}

#[derive(Clone, Debug)]
struct Setup {
    window: u32,
    pipe: usize,
    /// (the host asks, bytes to the guest, bytes to the host, the guest's buffer)
    connections: Vec<(bool, usize, usize, u32)>,
}

fn setup() -> impl Strategy<Value = Setup> {
    let connection = (any::<bool>(), 0..3000usize, 0..3000usize, 1..600u32);
    (4..600u32, 1..400usize, prop::collection::vec(connection, 1..5)).prop_map(|(window, pipe, connections)| Setup {
        window,
        pipe,
        connections,
    })
}

impl World {
    fn new(setup: &Setup) -> Self {
        let mut world = World {
            table: Table::new(GUEST_CID, 16, setup.window),
            users: Vec::new(),
            peers: Vec::new(),
            tx: VecDeque::new(),
            window: setup.window,
            pipe: setup.pipe,
        };
        for (n, &(host_asks, up, down, alloc)) in setup.connections.iter().enumerate() {
            let mut user = User { total: up, ..User::default() };
            let mut peer = Peer { total: down, alloc, ..Peer::default() };
            if host_asks {
                user.id = world.table.open(n as u32, n).ok();
            } else {
                peer.ports = Some((n as u32, HOST_PORT));
                let request = peer.packet(Op::Request, Shut::NONE, 0);
                world.tx.extend(request.map(|request| (request, Vec::new())));
            }
            world.users.push(user);
            world.peers.push(peer);
        }
        world
    }

    /// One step of one kind for one connection, moving at most `n` bytes. True when something moved.
    fn step(&mut self, kind: u8, who: usize, n: usize) -> bool {
        let who = who % self.users.len();
        match kind % 8 {
            0 => self.user_writes(who, n),
            1 => self.user_reads(who, n),
            2 => self.peer_sends(who, n),
            3 => self.peer_reads(who, n),
            4 => self.device_hears(),
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
            if let Some(link) = self.table.link(id) {
                link.connection.host_readable();
            }
            self.table.touch(id);
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
        let freed = peer.forwarded.wrapping_sub(peer.told);
        if take > 0 && !peer.over && freed >= peer.alloc.div_ceil(2) {
            let update = peer.packet(Op::CreditUpdate, Shut::NONE, 0);
            self.tx.extend(update.map(|update| (update, Vec::new())));
        }
        take > 0
    }

    fn peer_hears(&mut self, header: &Header, payload: &[u8]) {
        // The guest's port tells which one it is, whoever asked.
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
                assert!(!peer.device_shut.has(Shut::SEND), "payload after the end of sending");
                peer.inbox.extend(payload);
                assert!(peer.inbox.len() <= peer.alloc as usize, "the device oversteps its credit");
                None
            }
            Some(Op::CreditRequest) => peer.packet(Op::CreditUpdate, Shut::NONE, 0),
            Some(Op::Shutdown) => {
                peer.device_shut.add(header.shut);
                if peer.device_shut.has(Shut::BOTH) {
                    peer.over = true;
                    peer.open = false;
                    peer.packet(Op::Rst, Shut::NONE, 0)
                } else {
                    None
                }
            }
            Some(Op::Rst) => panic!("an RST in a world where all is in order"),
            Some(Op::CreditUpdate) | None => None,
        };
        self.tx.extend(answer.map(|answer| (answer, Vec::new())));
    }

    fn device_hears(&mut self) -> bool {
        let Some((header, payload)) = self.tx.pop_front() else { return false };
        match self.table.hear(&header, payload.len()) {
            Verdict::Nothing | Verdict::Connected(_) => {}
            Verdict::Request => {
                let who = header.src_port as usize;
                self.users[who].id = self.table.accept(&header, who).ok();
            }
            Verdict::Data(id) => {
                let who = self.table.link(id).map(|link| link.host);
                if let Some(who) = who {
                    self.users[who].held.extend(payload);
                    assert!(self.users[who].held.len() <= self.window as usize, "more is held than the window");
                }
            }
            Verdict::Changed(id) => self.settle(id),
            Verdict::Dropped(_, who) => {
                self.users[who].over = true;
            }
        }
        true
    }

    fn settle(&mut self, id: Id) {
        let Some(link) = self.table.link(id) else { return };
        let who = link.host;
        if link.connection.host_half_close().has(Shut::SEND) {
            assert!(self.users[who].held.is_empty(), "end of file before the bytes");
            self.users[who].eof_seen = true;
        }
        if link.connection.is_ended() && link.connection.held() == 0 {
            self.table.abort(id);
            self.users[who].over = true;
        }
        self.table.touch(id);
    }

    fn device_flushes(&mut self, who: usize) -> bool {
        let user = &mut self.users[who];
        let Some(id) = user.id else { return false };
        let room = (self.pipe - user.to_user.len()).min(user.held.len());
        user.to_user.extend(user.held.drain(..room));
        if room > 0
            && let Some(link) = self.table.link(id)
        {
            link.connection.host_took(room as u32);
        }
        self.settle(id);
        room > 0
    }

    fn device_sends(&mut self, room: usize) -> bool {
        let (header, payload) = match self.table.turn() {
            None => return false,
            Some(Turn::Reply(header)) => {
                self.table.take_reply();
                (Some(header), Vec::new())
            }
            Some(Turn::Link(id)) => {
                let mut header = None;
                let mut payload = Vec::new();
                if let Some(link) = self.table.link(id)
                    && let Plan::Data { limit } = link.connection.plan()
                    && room > 0
                {
                    let user = &mut self.users[link.host];
                    let n = room.min(limit as usize).min(user.to_device.len());
                    payload.extend(user.to_device.drain(..n));
                    if n > 0 {
                        header = self.table.data(id, n as u32);
                    } else if user.eof_sent {
                        link.connection.host_eof();
                    } else {
                        link.connection.host_drained();
                    }
                }
                let header = header.or_else(|| self.table.control(id));
                self.table.end_turn();
                (header, payload)
            }
        };
        if let Some(header) = header {
            self.peer_hears(&header, &payload);
        }
        header.is_some()
    }

    /// Lets everybody go on until nothing moves any more.
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
    fn all_bytes_arrive_once_in_order_and_everything_ends(
        setup in setup(),
        steps in prop::collection::vec((any::<u8>(), any::<usize>(), 0..300usize), 0..2000),
    ) {
        let mut world = World::new(&setup);
        for (kind, who, n) in steps {
            world.step(kind, who, n);
        }
        world.finish();
        for (n, (user, peer)) in world.users.iter().zip(&world.peers).enumerate() {
            prop_assert_eq!(user.got, peer.total, "bytes to user {}", n);
            prop_assert_eq!(peer.got, user.total, "bytes to peer {}", n);
            prop_assert!(user.eof_seen, "user {} has not seen the end", n);
            prop_assert!(peer.device_shut.has(Shut::BOTH) && peer.over, "peer {} has not seen the end", n);
            prop_assert!(user.over, "connection {} is left", n);
        }
        prop_assert!(world.table.turn().is_none());
    }

    /// A guest that says anything at all: nothing panics, and what is kept for it stays bounded.
    #[test]
    fn nonsense_is_bounded(
        packets in prop::collection::vec(
            (0..3u64, 0..3u64, 0..4u32, 0..4u32, any::<u32>(), 0..3u16, 0..9u16, any::<u8>(), any::<u32>(), any::<u32>(), 0..2000usize),
            0..600,
        ),
        sends in prop::collection::vec(0..200usize, 0..100),
    ) {
        let mut table: Table<()> = Table::new(1, 8, 1000);
        let mut sends = sends.into_iter();
        let mut links: Vec<Id> = Vec::new();
        for (src_cid, dst_cid, src_port, dst_port, len, kind, op, shut, buf_alloc, fwd_cnt, payload) in packets {
            if table.is_congested() {
                while table.turn().is_some_and(|turn| matches!(turn, Turn::Reply(_))) {
                    table.take_reply();
                }
            }
            let mut bytes = Header {
                src_cid, dst_cid, src_port, dst_port, len: len % 2000, kind, op: None, shut: Shut::NONE, buf_alloc, fwd_cnt,
            }.encode();
            bytes[30] = op as u8;
            bytes[32] = shut;
            let header = Header::decode(&bytes);
            match table.hear(&header, payload) {
                Verdict::Request => links.extend(table.accept(&header, ())),
                Verdict::Data(id) => {
                    prop_assert!(header.len as usize <= payload);
                    let link = table.link(id);
                    prop_assert!(link.is_some_and(|link| link.connection.held() <= 1000));
                }
                Verdict::Changed(id) => {
                    if let Some(link) = table.link(id) {
                        link.connection.host_half_close();
                    }
                }
                Verdict::Nothing | Verdict::Connected(_) | Verdict::Dropped(..) => {}
            }
            if let (Some(n), Some(&id)) = (sends.next(), links.last()) {
                if let Some(link) = table.link(id) {
                    link.connection.host_readable();
                    link.connection.host_took(n as u32);
                }
                table.touch(id);
                if let Some(Turn::Link(id)) = table.turn() {
                    table.control(id);
                    table.end_turn();
                }
            }
            links.retain(|&id| table.link(id).is_some());
            prop_assert!(links.len() <= 8);
        }
    }
}
