//! The vsock device's packet path: the input is a program of the guest's driver, which fills two virtqueues with anything.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use husk_vsock::testing::{
    Forwarder, HEADER_LEN, HOST_CID, Header, Op, Ring, Shut, TYPE_STREAM, forwarder, ring, serve_host,
};
use tokio::sync::mpsc;
use virtio_queue::QueueT;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::Epoll;

const CID: u64 = 3;
const PORT: u32 = 1027;
const SIZE: u16 = 64;
const MEMORY: usize = 1 << 20;
/// Where the rings begin: receive, send.
const RINGS: [u64; 2] = [0x1_0000, 0x2_0000];
/// Address of the packets.
const DATA: u64 = 0x4_0000;
/// Bytes of an instruction.
const LENGTH: usize = 12;
/// Instructions of a program. A pass over the rings costs the most.
const MOST: usize = 256;

struct Rig {
    forwarder: Forwarder,
    memory: GuestMemoryMmap,
    epoll: Arc<Epoll>,
    rings: [Ring; 2],
    incoming: mpsc::Receiver<UnixStream>,
    accepted: Vec<UnixStream>,
}

/// Runs a program.
pub fn run(program: &[u8]) {
    let mut rig = Rig::new();
    for instruction in program.as_chunks::<LENGTH>().0.iter().take(MOST) {
        rig.step(instruction);
    }
    rig.pass();
}

impl Rig {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let (forwarder, epoll, incoming) = forwarder(CID, PORT).expect("a forwarder");
        Self {
            forwarder,
            memory,
            epoll,
            rings: RINGS.map(|base| ring(base, SIZE).expect("a ring")),
            incoming,
            accepted: Vec::new(),
        }
    }

    /// The first byte selects the operation, the others are its operands.
    fn step(&mut self, [operation, ring, at, next, flags, rest @ ..]: &[u8; LENGTH]) {
        let ring = usize::from(ring % 2);
        let [address, length, value] = [0, 2, 4].map(|n| u16::from_le_bytes([rest[n], rest[n + 1]]));
        let slot = u16::from(*at) % (SIZE + 4);
        match operation % 8 {
            // A descriptor. Most addresses are of packets; some wrap around or lie outside the memory.
            0 | 1 => {
                let address = match address {
                    0xfff0.. => u64::MAX - u64::from(address & 0xf),
                    0xff00.. => MEMORY as u64 - u64::from(address & 0xff),
                    0xfe00.. => RINGS[ring] + u64::from(address & 0xff) * 16,
                    _ => DATA + u64::from(address % 4096) * 64,
                };
                let descriptor = Descriptor::new(address, u32::from(length), u16::from(*flags), u16::from(*next));
                let table = self.rings[ring].queue.desc_table();
                self.write(RawDescriptor::from(descriptor), table + 16 * u64::from(slot));
            }
            // A chain becomes available.
            2 => {
                let avail = self.rings[ring].queue.avail_ring();
                let index: u16 = self.memory.read_obj(GuestAddress(avail + 2)).expect("the rings are in the memory");
                self.write(slot, avail + 4 + 2 * u64::from(index % SIZE));
                self.write(index.wrapping_add(1), avail + 2);
            }
            // The index jumps.
            3 => self.write(value, self.rings[ring].queue.avail_ring() + 2),
            // A packet that is nearly valid.
            4 => {
                let mut bytes = header().encode();
                bytes[24..26].copy_from_slice(&length.to_le_bytes());
                bytes[30] = next % 10;
                bytes[32] = flags % 4;
                bytes[20] = bytes[20].wrapping_add(at % 4);
                bytes[36..38].copy_from_slice(&value.to_le_bytes());
                let _ = self.memory.write_slice(&bytes, GuestAddress(DATA + u64::from(address % 4096) * 64));
            }
            // Any byte of a packet.
            5 => self.write(*flags, DATA + u64::from(address % 4096) * 64 + u64::from(*at) % HEADER_LEN as u64),
            // The host's programs.
            6 => self.host(usize::from(length)),
            _ => self.pass(),
        }
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        // Fails outside the memory, as the guest's access would.
        let _ = self.memory.write_obj(value, GuestAddress(at));
    }

    /// The host's programs accept, read what there is, and write.
    fn host(&mut self, length: usize) {
        while let Ok(stream) = self.incoming.try_recv() {
            if self.accepted.len() < 8 {
                self.accepted.push(stream);
            }
        }
        let mut buffer = vec![0; length];
        for stream in &mut self.accepted {
            stream.set_nonblocking(true).expect("a socket");
            // A full or closed connection is part of the game.
            let _ = stream.read(&mut buffer);
            let _ = stream.write(&buffer);
        }
    }

    /// The device serves both rings once.
    fn pass(&mut self) {
        self.forwarder.receive_from_guest(&self.memory, &mut self.rings[1]);
        serve_host(&mut self.forwarder, &self.epoll).expect("events");
        self.forwarder.send_to_guest(&self.memory, &mut self.rings[0]);
    }
}

/// A packet that asks for a connection.
fn header() -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 5000,
        dst_port: PORT,
        len: 0,
        socket_type: TYPE_STREAM,
        op: Some(Op::Request),
        shut: Shut::NONE,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}
