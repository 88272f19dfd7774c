//! Drives the device's packet path with hostile rings in test memory: descriptor chains that no Linux driver builds,
//! and corrupted rings.

#![allow(clippy::expect_used, reason = "a failed expectation fails the test")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use tokio::sync::mpsc;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::QueueT;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::Epoll;

use husk_vsock::WINDOW;
use husk_vsock::testing::{
    Forwarder, HEADER_LEN, HOST_CID, Header, LINGER, Op, Progress, Ring, Shut, TYPE_STREAM, forwarder, ring, serve_host,
};

const CID: u64 = 3;
const PORT: u32 = 1027;
const SIZE: u16 = 256;
const MEMORY: usize = 4 << 20;
/// Address of the packets.
const DATA: u64 = 1 << 20;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// The packet path with two rings in test memory, and a listener on [`PORT`].
struct Rig {
    forwarder: Forwarder,
    memory: GuestMemoryMmap,
    epoll: Arc<Epoll>,
    rx: Ring,
    tx: Ring,
    incoming: mpsc::Receiver<UnixStream>,
}

impl Rig {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let (forwarder, epoll, incoming) = forwarder(CID, PORT).expect("a forwarder");
        let ring = |base| ring(base, SIZE).expect("a ring");
        Rig { forwarder, memory, epoll, rx: ring(0x1_0000), tx: ring(0x2_0000), incoming }
    }

    /// Writes a descriptor into the table at `table`.
    fn describe(&self, table: u64, at: u16, address: u64, len: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags, next));
        self.memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(at))).expect("descriptor");
    }

    /// Makes the chain at `head` available in a ring.
    fn offer(&self, ring: &Ring, head: u16) {
        let avail = ring.queue.avail_ring();
        let idx: u16 = self.memory.read_obj(GuestAddress(avail + 2)).expect("index");
        self.memory.write_obj(head, GuestAddress(avail + 4 + 2 * u64::from(idx % SIZE))).expect("entry");
        self.memory.write_obj(idx.wrapping_add(1), GuestAddress(avail + 2)).expect("index");
    }

    /// The number of chains that the device has returned, and the length of the last.
    fn used(&self, ring: &Ring) -> (u16, u32) {
        let used = ring.queue.used_ring();
        let idx: u16 = self.memory.read_obj(GuestAddress(used + 2)).expect("index");
        let at = used + 4 + 8 * u64::from(idx.wrapping_sub(1) % SIZE);
        (idx, self.memory.read_obj(GuestAddress(at + 4)).expect("length"))
    }

    /// Sends a packet in pieces of these lengths and, if bytes are left, one more piece.
    fn send(&mut self, packet: &[u8], pieces: &[usize], indirect: bool) {
        self.memory.write_slice(packet, GuestAddress(DATA)).expect("packet");
        let table = if indirect { 0x3_0000 } else { self.tx.queue.desc_table() };
        let (mut at, mut left, mut n) = (DATA, packet.len(), 1);
        for &piece in pieces.iter().chain([&usize::MAX]) {
            let len = piece.min(left);
            left -= len;
            let flags = if left > 0 { NEXT } else { 0 };
            self.describe(table, n, at, len as u32, flags, n + 1);
            at += len as u64;
            n += 1;
            if left == 0 {
                break;
            }
        }
        if indirect {
            // The indirect table starts at the second slot.
            self.describe(self.tx.queue.desc_table(), 1, table + 16, u32::from(n - 1) * 16, INDIRECT, 0);
            for slot in 1..n {
                let next = if slot + 1 < n { (NEXT, slot) } else { (0, 0) };
                let address: u64 = self.memory.read_obj(GuestAddress(table + 16 * u64::from(slot))).expect("address");
                let len: u32 = self.memory.read_obj(GuestAddress(table + 16 * u64::from(slot) + 8)).expect("length");
                self.describe(table, slot, address, len, next.0, next.1);
            }
        }
        self.offer(&self.tx, 1);
        self.forwarder.receive_from_guest(&self.memory, &mut self.tx);
    }

    /// Offers a buffer in pieces of these lengths and returns the packet that the device writes, if any.
    fn receive(&mut self, pieces: &[usize]) -> Option<(Header, Vec<u8>)> {
        let mut at = DATA + (2 << 20);
        for (n, &piece) in pieces.iter().enumerate() {
            let flags = if n + 1 < pieces.len() { NEXT | WRITE } else { WRITE };
            self.describe(self.rx.queue.desc_table(), n as u16, at, piece as u32, flags, n as u16 + 1);
            at += piece as u64;
        }
        self.offer(&self.rx, 0);
        self.take()
    }

    /// Returns the packet that the device writes into a buffer offered earlier, if any.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        let before = self.used(&self.rx).0;
        self.forwarder.send_to_guest(&self.memory, &mut self.rx);
        let (used, len) = self.used(&self.rx);
        if used == before {
            return None;
        }
        let mut packet = vec![0; len as usize];
        self.memory.read_slice(&mut packet, GuestAddress(DATA + (2 << 20))).expect("packet");
        let header = Header::decode(packet[..HEADER_LEN].try_into().expect("a header"));
        Some((header, packet.split_off(HEADER_LEN)))
    }

    /// Passes the pending epoll events to the packet path.
    fn poll(&mut self) {
        serve_host(&mut self.forwarder, &self.epoll).expect("events");
    }

    /// Opens a connection from the guest and takes the RESPONSE.
    fn connect(&mut self) -> UnixStream {
        self.send(&header(Op::Request, 0).encode(), &[], false);
        let (response, _) = self.receive(&[64]).expect("a response");
        assert_eq!(response.op, Some(Op::Response));
        self.poll();
        self.incoming.try_recv().expect("a stream")
    }
}

fn header(op: Op, len: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 5000,
        dst_port: PORT,
        len,
        socket_type: TYPE_STREAM,
        op: Some(op),
        shut: Shut::NONE,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn a_packet_in_any_number_of_pieces_arrives_complete() {
    let cases: [(&str, usize, Vec<usize>); 6] = [
        ("one piece", 1000, vec![]),
        ("separate header", 1000, vec![HEADER_LEN]),
        ("header in small pieces", 1000, vec![1, 2, 3, 20, 10]),
        ("empty pieces in between", 1000, vec![0, 44, 0, 0, 500, 0]),
        ("64 KiB in pages", 65536, [HEADER_LEN].into_iter().chain([4096; 15]).collect()),
        ("200 pieces", 4000, vec![20; 200]),
    ];
    for (what, len, pieces) in &cases {
        for indirect in [false, true] {
            let mut rig = Rig::new();
            let mut stream = rig.connect();
            let payload = payload(*len);
            let packet = [&header(Op::Rw, *len as u32).encode()[..], &payload].concat();
            rig.send(&packet, pieces, indirect);
            let mut got = vec![0; *len];
            stream.set_nonblocking(false).expect("blocking");
            stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).expect("deadline");
            stream.read_exact(&mut got).unwrap_or_else(|error| panic!("{what}, indirect {indirect}: {error}"));
            assert!(got == payload, "{what}, indirect {indirect}");
            assert_eq!(rig.used(&rig.tx).0, 2);
        }
    }
}

#[test]
fn bytes_for_the_guest_fill_buffers_of_any_shape() {
    for pieces in [&[2000][..], &[44, 1956], &[10, 30, 4, 1, 1955], &[1; 100]] {
        let mut rig = Rig::new();
        let mut stream = rig.connect();
        let sent = payload(1500);
        stream.write_all(&sent).expect("room");
        rig.poll();
        let (header, got) = rig.receive(pieces).expect("a packet");
        let room = pieces.iter().sum::<usize>() - HEADER_LEN;
        assert_eq!(header.op, Some(Op::Rw));
        assert_eq!(header.len as usize, 1500.min(room));
        assert!(got == sent[..got.len()], "pieces of {pieces:?}");
    }
}

#[test]
fn a_slow_reader_throttles_the_guest_and_loses_nothing() {
    let mut rig = Rig::new();
    let mut stream = rig.connect();
    stream.set_nonblocking(true).expect("nonblocking");
    let mut read = |most: usize, got: &mut Vec<u8>| {
        let mut some = vec![0; most];
        match stream.read(&mut some) {
            Ok(n) => got.extend_from_slice(&some[..n]),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    };
    let sent_bytes = payload(8 << 20);
    let (mut sent, mut got) = (0, Vec::new());
    // The guest respects its credit. Each read makes room in the socket before the device learns of it, but held bytes
    // must still be delivered before new ones.
    let mut forwarded = 0;
    while sent + 32768 - forwarded <= WINDOW as usize {
        let packet = [&header(Op::Rw, 32768).encode()[..], &sent_bytes[sent..sent + 32768]].concat();
        rig.send(&packet, &[], false);
        sent += 32768;
        read(8000, &mut got);
        while let Some((update, _)) = rig.receive(&[64]) {
            assert_eq!(update.op, Some(Op::CreditUpdate));
            forwarded = update.fwd_cnt as usize;
        }
    }
    assert!(sent > WINDOW as usize, "the socket accepted nothing");
    while got.len() < sent {
        read(10_000, &mut got);
        rig.poll();
    }
    assert!(got == sent_bytes[..sent]);
}

#[test]
fn a_guest_that_exceeds_its_credit_gets_an_rst() {
    let mut rig = Rig::new();
    let _stream = rig.connect();
    let packet = [&header(Op::Rw, 65536).encode()[..], &payload(65536)].concat();
    for _ in 0..20 {
        rig.send(&packet, &[], false);
    }
    let rst = std::iter::from_fn(|| rig.receive(&[64])).find(|(header, _)| header.op == Some(Op::Rst));
    assert!(rst.is_some());
}

#[test]
fn credit_is_requested_once_until_the_guest_gives_some() {
    let mut rig = Rig::new();
    let mut stream = rig.connect();
    let update =
        |alloc: u32, forwarded: u32| Header { buf_alloc: alloc, fwd_cnt: forwarded, ..header(Op::CreditUpdate, 0) };
    rig.send(&update(0, 0).encode(), &[], false);
    stream.write_all(&payload(100)).expect("room");
    rig.poll();
    assert_eq!(rig.receive(&[256]).expect("a credit request").0.op, Some(Op::CreditRequest));
    // Updates without credit do not cause another request. The offered buffer has room for one packet.
    assert_eq!(rig.receive(&[256]), None);
    for _ in 0..3 {
        rig.send(&update(0, 0).encode(), &[], false);
        rig.poll();
        assert_eq!(rig.take(), None);
    }
    rig.send(&update(10, 0).encode(), &[], false);
    let (data, got) = rig.take().expect("a packet within the credit");
    assert_eq!((data.op, got), (Some(Op::Rw), payload(100)[..10].to_vec()));
    // The guest gave credit, which is used up: one more request is allowed.
    assert_eq!(rig.receive(&[256]).expect("a credit request").0.op, Some(Op::CreditRequest));
    assert_eq!(rig.receive(&[256]), None);
}

#[test]
fn a_guest_that_holds_connections_open_is_refused_further_ones() {
    let mut rig = Rig::new();
    let mut held = Vec::new();
    for port in 0..1000 {
        rig.send(&Header { src_port: port, ..header(Op::Request, 0) }.encode(), &[], false);
        let (answer, _) = rig.receive(&[64]).expect("an answer");
        assert_eq!(answer.op, Some(if port < 256 { Op::Response } else { Op::Rst }), "{port}");
        held.extend(rig.incoming.try_recv());
    }
    assert_eq!(held.len(), 256);
    // Dropped streams make room for others when the guest has acknowledged their end.
    held.clear();
    for _ in 0..256 / 16 {
        rig.poll();
    }
    for _ in 0..256 {
        let (end, _) = rig.receive(&[64]).expect("a packet");
        assert_eq!(end.op, Some(Op::Shutdown));
        rig.send(&Header { src_port: end.dst_port, ..header(Op::Rst, 0) }.encode(), &[], false);
    }
    rig.send(&Header { src_port: 5000, ..header(Op::Request, 0) }.encode(), &[], false);
    assert!(rig.incoming.try_recv().is_ok());
}

#[test]
fn a_dropped_stream_lingers_for_a_stalled_guest_but_not_forever() {
    let mut rig = Rig::new();
    let mut stream = rig.connect();
    let full = Header { buf_alloc: 0, ..header(Op::CreditUpdate, 0) };
    rig.send(&full.encode(), &[], false);
    stream.write_all(&payload(100)).expect("room");
    drop(stream);
    rig.poll();
    // The guest has received every packet that needs no credit, and gives no credit for the rest.
    while let Some((packet, _)) = rig.receive(&[256]) {
        assert_ne!(packet.op, Some(Op::Rst), "aborted at once");
    }
    let dropped = Instant::now();
    let left = rig.forwarder.check_lingering(dropped).expect("the connection lingers");
    assert!(left <= LINGER, "{left:?}");
    assert_eq!(rig.forwarder.check_lingering(dropped + LINGER), None);
    assert_eq!(rig.receive(&[256]).expect("an RST").0.op, Some(Op::Rst));
    assert_eq!(rig.receive(&[256]), None);
}

#[test]
fn invalid_chains_are_returned_empty() {
    let table = 0x2_0000;
    type Chain = fn(&Rig, u64);
    let cases: [(&str, Chain); 8] = [
        ("too short for a header", |rig, table| rig.describe(table, 0, DATA, 43, 0, 0)),
        ("outside of the memory", |rig, table| rig.describe(table, 0, u64::MAX - 10, 100, 0, 0)),
        ("across the end of the memory", |rig, table| rig.describe(table, 0, MEMORY as u64 - 10, 100, 0, 0)),
        ("only writable", |rig, table| rig.describe(table, 0, DATA, 100, WRITE, 0)),
        ("a loop", |rig, table| rig.describe(table, 0, DATA, 0, NEXT, 0)),
        ("a next descriptor that does not exist", |rig, table| rig.describe(table, 0, DATA, 10, NEXT, 9999)),
        ("an indirect table outside of the memory", |rig, table| {
            rig.describe(table, 0, u64::MAX - 15, 160, INDIRECT, 0);
        }),
        ("an indirect table in an indirect table", |rig, table| {
            rig.describe(table, 0, DATA, 16, INDIRECT, 0);
            rig.describe(DATA, 0, DATA, 16, INDIRECT, 0);
        }),
    ];
    for (what, chain) in cases {
        let mut rig = Rig::new();
        chain(&rig, table);
        rig.offer(&rig.tx, 0);
        assert_eq!(rig.forwarder.receive_from_guest(&rig.memory, &mut rig.tx), Progress::Drained, "{what}");
        assert_eq!(rig.used(&rig.tx), (1, 0), "{what}");
        // Packets after the invalid chain are served.
        rig.connect();
    }
}

#[test]
fn a_corrupted_ring_is_disabled() {
    let mut rig = Rig::new();
    let avail = rig.tx.queue.avail_ring();
    rig.memory.write_obj(9999u16, GuestAddress(avail + 2)).expect("index");
    assert_eq!(rig.forwarder.receive_from_guest(&rig.memory, &mut rig.tx), Progress::Drained);
    assert!(!rig.tx.is_running());
    // A head outside the descriptor table cannot be returned.
    let mut rig = Rig::new();
    rig.offer(&rig.tx, 9999);
    assert_eq!(rig.forwarder.receive_from_guest(&rig.memory, &mut rig.tx), Progress::Drained);
    assert!(!rig.tx.is_running());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// With any content of the rings, a pass over them ends and nothing panics.
    #[test]
    fn random_ring_contents_cause_neither_a_panic_nor_a_hang(
        descriptors in prop::collection::vec((0..MEMORY as u64 + 4096, 0..100_000u32, 0..8u16, 0..300u16), 64),
        heads in prop::collection::vec(0..260u16, 64),
        seed in any::<u64>(),
        event_idx in any::<bool>(),
    ) {
        let mut rig = Rig::new();
        for ring in [&mut rig.rx, &mut rig.tx] {
            ring.queue.set_event_idx(event_idx);
        }
        let stream = rig.connect();
        (&stream).write_all(&payload(5000)).expect("room");
        for at in 0..4096u64 {
            // Almost valid packets, so that they pass the first checks.
            let mut bytes = header(Op::Rw, 0).encode();
            let noise = seed.wrapping_mul(at + 1);
            bytes[24..28].copy_from_slice(&(noise as u32 % 70000).to_le_bytes());
            bytes[30] = (noise >> 32) as u8 % 9;
            bytes[32] = (noise >> 40) as u8;
            rig.memory.write_slice(&bytes, GuestAddress(DATA + at * 64)).expect("noise");
        }
        for base in [rig.rx.queue.desc_table(), rig.tx.queue.desc_table()] {
            for (at, &(address, len, flags, next)) in descriptors.iter().enumerate() {
                rig.describe(base, at as u16, address & !63, len, flags, next % 64);
            }
        }
        for &head in &heads {
            rig.offer(&rig.rx, head % 70);
            rig.offer(&rig.tx, head % 70);
        }
        for _ in 0..8 {
            rig.forwarder.receive_from_guest(&rig.memory, &mut rig.tx);
            rig.poll();
            rig.forwarder.send_to_guest(&rig.memory, &mut rig.rx);
        }
    }
}
