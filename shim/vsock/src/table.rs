//! All connections of one guest: who is who, what gets an RST, and whose turn it is to send. Pure: what a connection means on the host is
//! the type parameter `H`, which is kept here and never looked at.

use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, Heard, Plan, Say};
use super::header::{HOST_CID, Header, Op, Shut, TYPE_STREAM};

/// RSTs that wait for room in the guest's queue. Past this many the guest's packets wait too: it is the one that makes no room.
const REPLIES_MAX: usize = 256;
/// First port of those that host-initiated connections come from; chosen high, away from the ports that anything listens on.
const FIRST_PORT: u32 = 0x4000_0000;

/// Names a connection for as long as the host has a part in it. Never reused.
pub type Id = u64;

/// The pair of ports that names a connection on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}

/// A connection and the host's part of it.
#[derive(Debug)]
pub struct Link<H> {
    /// The state machine.
    pub connection: Connection,
    /// The host's part.
    pub host: H,
    key: Key,
    queued: bool,
}

/// What a packet of the guest asks of the host.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<H> {
    /// Nothing.
    Nothing,
    /// The guest wants a connection: answer with [`Table::accept`] or [`Table::refuse`].
    Request,
    /// The packet's payload is for this connection.
    Data(Id),
    /// The host's request was accepted.
    Connected(Id),
    /// Half-closes may be due on the host's socket; or the guest's end is over and what is held for the host is still to be delivered.
    Changed(Id),
    /// The connection is gone.
    Dropped(Id, H),
}

/// What to send to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// An RST, taken with [`Table::take_reply`].
    Reply(Header),
    /// A packet of this connection.
    Link(Id),
}

/// The connections of one guest.
#[derive(Debug)]
pub struct Table<H> {
    guest_cid: u64,
    limit: usize,
    window: u32,
    ids: HashMap<Key, Id>,
    links: HashMap<Id, Link<H>>,
    ready: VecDeque<Id>,
    replies: VecDeque<Header>,
    next_id: Id,
    next_port: u32,
}

impl<H> Table<H> {
    /// At most `limit` connections with a receive window of `window` bytes each.
    pub fn new(guest_cid: u64, limit: usize, window: u32) -> Self {
        Table {
            guest_cid,
            limit,
            window,
            ids: HashMap::new(),
            links: HashMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            next_id: 0,
            next_port: FIRST_PORT,
        }
    }

    /// Whether no more packets of the guest should be taken before it has made room for the answers.
    pub fn is_congested(&self) -> bool {
        self.replies.len() >= REPLIES_MAX
    }

    /// Takes a packet of the guest. `payload` is what the packet really carries, in bytes: a header that claims more is nonsense.
    pub fn hear(&mut self, header: &Header, payload: usize) -> Verdict<H> {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.reply_rst(header);
        }
        let key = Key { host: header.dst_port, guest: header.src_port };
        let Some(&id) = self.ids.get(&key) else {
            return if header.op == Some(Op::Request) { Verdict::Request } else { self.reply_rst(header) };
        };
        let Some(link) = self.links.get_mut(&id) else {
            self.ids.remove(&key);
            return self.reply_rst(header);
        };
        let heard = if header.len as usize > payload { Heard::Violation } else { link.connection.hear(header) };
        match heard {
            Heard::Nothing => {
                self.touch(id);
                Verdict::Changed(id)
            }
            Heard::Data => {
                self.touch(id);
                Verdict::Data(id)
            }
            Heard::Connected => {
                self.touch(id);
                Verdict::Connected(id)
            }
            Heard::Ended { rst } => {
                let held = link.connection.held();
                self.ids.remove(&key);
                if rst {
                    self.replies.push_back(header.rst_reply());
                }
                if held > 0 { Verdict::Changed(id) } else { self.drop_link(id) }
            }
            Heard::Violation => {
                self.ids.remove(&key);
                self.reply_rst(header);
                self.drop_link(id)
            }
        }
    }

    fn drop_link(&mut self, id: Id) -> Verdict<H> {
        self.links.remove(&id).map_or(Verdict::Nothing, |link| Verdict::Dropped(id, link.host))
    }

    fn reply_rst(&mut self, header: &Header) -> Verdict<H> {
        // An RST is never answered: two sides that know nothing of each other would do so for ever.
        if header.op != Some(Op::Rst) {
            self.replies.push_back(header.rst_reply());
        }
        Verdict::Nothing
    }

    /// Says yes to a request. With no room for another connection it is a no, and `host` comes back.
    pub fn accept(&mut self, request: &Header, host: H) -> Result<Id, H> {
        if self.links.len() >= self.limit {
            self.refuse(request);
            return Err(host);
        }
        let key = Key { host: request.dst_port, guest: request.src_port };
        Ok(self.insert(key, Connection::accepted(self.window, request), host))
    }

    /// Says no to a request.
    pub fn refuse(&mut self, request: &Header) {
        self.reply_rst(request);
    }

    /// Asks the guest for a connection to its `port`. `host` comes back when there is no room.
    pub fn open(&mut self, port: u32, host: H) -> Result<Id, H> {
        if self.links.len() >= self.limit {
            return Err(host);
        }
        let mut key = Key { host: self.next_port, guest: port };
        // Ends: there are fewer connections than ports.
        while self.ids.contains_key(&key) {
            key.host = next_port(key.host);
        }
        self.next_port = next_port(key.host);
        Ok(self.insert(key, Connection::requesting(self.window), host))
    }

    fn insert(&mut self, key: Key, connection: Connection, host: H) -> Id {
        let id = self.next_id;
        self.next_id += 1;
        self.ids.insert(key, id);
        self.links.insert(id, Link { connection, host, key, queued: false });
        self.touch(id);
        id
    }

    /// The connection, to be told what happened on the host's side. Follow it with [`Table::touch`].
    pub fn link(&mut self, id: Id) -> Option<&mut Link<H>> {
        self.links.get_mut(&id)
    }

    /// Lets the connection take its turn if it has something to send now.
    pub fn touch(&mut self, id: Id) {
        if let Some(link) = self.links.get_mut(&id)
            && !link.queued
            && link.connection.plan() != Plan::Idle
        {
            link.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Ends a connection from the host's side, at once: the guest hears an RST if it knows of it.
    pub fn abort(&mut self, id: Id) -> Option<H> {
        let link = self.links.remove(&id)?;
        if self.ids.get(&link.key) == Some(&id) {
            self.ids.remove(&link.key);
        }
        if link.connection.guest_knows() {
            self.replies.push_back(Header { op: Some(Op::Rst), ..self.header(link.key) });
        }
        Some(link.host)
    }

    /// Ends all connections without a word: the guest has a new driver, or is gone.
    pub fn clear(&mut self) -> Vec<(Id, H)> {
        self.ids.clear();
        self.ready.clear();
        self.replies.clear();
        self.links.drain().map(|(id, link)| (id, link.host)).collect()
    }

    /// Whose turn it is to send. Connections take turns packet by packet, so that a busy one does not keep others waiting; RSTs come
    /// first, they make the guest's own queues shorter.
    pub fn turn(&mut self) -> Option<Turn> {
        if let Some(reply) = self.replies.front() {
            return Some(Turn::Reply(*reply));
        }
        loop {
            let id = *self.ready.front()?;
            match self.links.get_mut(&id) {
                Some(link) if link.connection.plan() != Plan::Idle => return Some(Turn::Link(id)),
                Some(link) => link.queued = false,
                None => {}
            }
            self.ready.pop_front();
        }
    }

    /// Drops all RSTs that wait: nobody will read them.
    pub fn drop_replies(&mut self) {
        self.replies.clear();
    }

    /// The reply of this turn went out.
    pub fn take_reply(&mut self) {
        self.replies.pop_front();
    }

    /// The turn of the connection in front is over: it goes to the end of the line, or leaves it with nothing to send.
    pub fn end_turn(&mut self) {
        if let Some(id) = self.ready.pop_front()
            && let Some(link) = self.links.get_mut(&id)
        {
            link.queued = false;
            self.touch(id);
        }
    }

    /// The packet without payload that a connection has to send, counted as sent.
    pub fn control(&mut self, id: Id) -> Option<Header> {
        let link = self.links.get_mut(&id)?;
        let (say, key) = (link.connection.control()?, link.key);
        Some(self.address(key, say))
    }

    /// The header for `len` bytes of a connection's payload, counted as sent.
    pub fn data(&mut self, id: Id, len: u32) -> Option<Header> {
        let link = self.links.get_mut(&id)?;
        let (say, key) = (link.connection.data(len), link.key);
        Some(self.address(key, say))
    }

    fn address(&self, key: Key, say: Say) -> Header {
        Header {
            len: say.len,
            op: Some(say.op),
            shut: say.shut,
            buf_alloc: say.buf_alloc,
            fwd_cnt: say.fwd_cnt,
            ..self.header(key)
        }
    }

    fn header(&self, key: Key) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host,
            dst_port: key.guest,
            len: 0,
            kind: TYPE_STREAM,
            op: None,
            shut: Shut::NONE,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

fn next_port(port: u32) -> u32 {
    // VMADDR_PORT_ANY (u32::MAX) is no port.
    if port >= u32::MAX - 1 { FIRST_PORT } else { port + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: u64 = 7;

    fn packet(op: Op) -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: 5000,
            dst_port: 1027,
            len: 0,
            kind: TYPE_STREAM,
            op: Some(op),
            shut: Shut::NONE,
            buf_alloc: 1000,
            fwd_cnt: 0,
        }
    }

    fn table() -> Table<&'static str> {
        Table::new(GUEST, 2, 100)
    }

    /// A table with the guest's connection from `packet`, its RESPONSE sent.
    fn connected() -> (Table<&'static str>, Id) {
        let mut table = table();
        assert_eq!(table.hear(&packet(Op::Request), 0), Verdict::Request);
        let id = table.accept(&packet(Op::Request), "a").expect("room");
        assert_eq!(sent(&mut table), Some(Op::Response));
        (table, id)
    }

    /// Sends what is next without payload.
    fn sent(table: &mut Table<&'static str>) -> Option<Op> {
        match table.turn()? {
            Turn::Reply(header) => {
                table.take_reply();
                header.op
            }
            Turn::Link(id) => {
                let header = table.control(id);
                table.end_turn();
                header?.op
            }
        }
    }

    #[test]
    fn nonsense_gets_an_rst_and_an_rst_gets_nothing() {
        let cases = [
            ("unknown connection", packet(Op::Rw)),
            ("unknown connection", packet(Op::Response)),
            ("unknown connection", packet(Op::Shutdown)),
            ("unknown connection", packet(Op::CreditUpdate)),
            ("another's CID", Header { src_cid: 9, ..packet(Op::Request) }),
            ("not for the host", Header { dst_cid: 1, ..packet(Op::Request) }),
            ("a type that is not served", Header { kind: 2, ..packet(Op::Request) }),
            ("an operation that is none", Header { op: None, ..packet(Op::Rw) }),
        ];
        for (what, header) in cases {
            let mut table = table();
            assert_eq!(table.hear(&header, 0), Verdict::Nothing, "{what}");
            assert_eq!(table.turn(), Some(Turn::Reply(header.rst_reply())), "{what}");
            table.take_reply();
            assert_eq!(table.hear(&Header { op: Some(Op::Rst), ..header }, 0), Verdict::Nothing, "{what}");
            assert_eq!(table.turn(), None, "{what}");
        }
    }

    #[test]
    fn breaking_the_protocol_ends_the_connection() {
        let cases = [
            ("port in use", packet(Op::Request), 0),
            ("an answer to nothing", packet(Op::Response), 0),
            ("an operation that is none", Header { op: None, ..packet(Op::Rw) }, 0),
            ("more payload than the credit", Header { len: 101, ..packet(Op::Rw) }, 101),
            ("less payload than it says", Header { len: 10, ..packet(Op::Rw) }, 9),
        ];
        for (what, header, payload) in cases {
            let (mut table, id) = connected();
            assert_eq!(table.hear(&header, payload), Verdict::Dropped(id, "a"), "{what}");
            assert_eq!(sent(&mut table), Some(Op::Rst), "{what}");
            assert_eq!(sent(&mut table), None, "{what}");
        }
    }

    #[test]
    fn payload_after_the_end_of_sending_ends_the_connection() {
        let (mut table, id) = connected();
        assert_eq!(table.hear(&Header { shut: Shut::SEND, ..packet(Op::Shutdown) }, 0), Verdict::Changed(id));
        assert_eq!(table.hear(&Header { len: 1, ..packet(Op::Rw) }, 1), Verdict::Dropped(id, "a"));
        assert_eq!(sent(&mut table), Some(Op::Rst));
    }

    #[test]
    fn connections_are_bounded() {
        let mut table = table();
        assert!(table.open(1, "a").is_ok());
        assert!(table.accept(&packet(Op::Request), "b").is_ok());
        assert_eq!(table.open(2, "c"), Err("c"));
        let third = Header { src_port: 6000, ..packet(Op::Request) };
        assert_eq!(table.accept(&third, "d"), Err("d"));
        assert_eq!(table.turn(), Some(Turn::Reply(third.rst_reply())));
    }

    #[test]
    fn a_guest_that_takes_no_answers_is_not_listened_to() {
        let mut table = table();
        for _ in 0..REPLIES_MAX {
            assert!(!table.is_congested());
            table.hear(&packet(Op::Rw), 0);
        }
        assert!(table.is_congested());
        table.take_reply();
        assert!(!table.is_congested());
    }

    #[test]
    fn a_refused_request_of_the_host_is_dropped_without_a_word() {
        let mut table = table();
        let id = table.open(5000, "a").expect("room");
        let Some(Turn::Link(turn)) = table.turn() else { panic!("no turn") };
        let request = table.control(turn).expect("a request");
        table.end_turn();
        assert_eq!(request.op, Some(Op::Request));
        assert_eq!(request.dst_port, 5000);
        let refusal = Header { dst_port: request.src_port, ..packet(Op::Rst) };
        assert_eq!(table.hear(&refusal, 0), Verdict::Dropped(id, "a"));
        assert_eq!(table.turn(), None);
    }

    #[test]
    fn giving_up_a_request_tells_the_guest_only_if_it_knows() {
        let mut table = table();
        let id = table.open(5000, "a").expect("room");
        assert_eq!(table.abort(id), Some("a"));
        assert_eq!(table.turn(), None);
        let id = table.open(5000, "b").expect("room");
        assert_eq!(sent(&mut table), Some(Op::Request));
        assert_eq!(table.abort(id), Some("b"));
        assert_eq!(sent(&mut table), Some(Op::Rst));
    }

    #[test]
    fn bytes_before_the_guests_close_are_kept_for_the_host() {
        let (mut table, id) = connected();
        assert_eq!(table.hear(&Header { len: 60, ..packet(Op::Rw) }, 60), Verdict::Data(id));
        assert_eq!(table.hear(&Header { shut: Shut::BOTH, ..packet(Op::Shutdown) }, 0), Verdict::Changed(id));
        // The RST goes out at once: the ports are free for the guest's next connection while the host still reads.
        assert_eq!(sent(&mut table), Some(Op::Rst));
        assert_eq!(table.hear(&packet(Op::Request), 0), Verdict::Request);
        let link = table.link(id).expect("still there");
        assert_eq!(link.connection.host_half_close(), Shut::RECEIVE);
        link.connection.host_took(60);
        assert_eq!(link.connection.host_half_close(), Shut::SEND);
        assert!(link.connection.is_ended());
    }

    #[test]
    fn a_busy_connection_does_not_keep_others_waiting() {
        let mut table = table();
        for (at, port) in [5000, 5001].into_iter().enumerate() {
            let request = Header { src_port: port, ..packet(Op::Request) };
            let id = table.accept(&request, "x").expect("room");
            assert_eq!(id, at as Id);
        }
        assert_eq!((sent(&mut table), sent(&mut table)), (Some(Op::Response), Some(Op::Response)));
        for id in [0, 1] {
            table.link(id).expect("there").connection.host_readable();
            table.touch(id);
        }
        let mut order = Vec::new();
        for _ in 0..6 {
            let Some(Turn::Link(id)) = table.turn() else { panic!("no turn") };
            table.data(id, 10);
            table.end_turn();
            order.push(id);
        }
        assert_eq!(order, [0, 1, 0, 1, 0, 1]);
    }
}
