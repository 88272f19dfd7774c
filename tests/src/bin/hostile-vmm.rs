//! A machine that was taken over by its guest: in QEMU's place and in QEMU's jail, it attacks virtiofsd as a vhost-user
//! front end (QEMU's docs/interop/vhost-user.rst) and as the driver of a queue, and then never ends. The file `attack`
//! beside the program names what it does.

use std::env;
use std::fs::{self, File};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// The guest's memory, bytes.
const MEMORY: u64 = 1 << 20;
/// Where the front end claims to have mapped it.
const MAPPED: u64 = 0x7000_0000;
/// virtiofsd has a queue for urgent requests and one for all others.
const QUEUES: u64 = 2;
const REQUESTS: u64 = 1;
/// Descriptors of a queue.
const SIZE: u16 = 64;
/// Parts of a queue, bytes from its beginning.
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where requests and replies are in the memory.
const DATA: u64 = 0x8_0000;
/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;
/// VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a reader, the error cannot be reported anyway.
            let _ = writeln!(io::stderr(), "hostile-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let args: Vec<String> = env::args().collect();
    let attack = fs::read_to_string(Path::new(&args[0]).with_file_name("attack"))?;
    let mut machine = Machine::new(&args)?;
    match machine.attack(attack.trim()) {
        // virtiofsd closes the connection, but the machine does not end.
        Err(error) if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            return Err(error);
        }
        _ => {}
    }
    let mut rest = [0; 4096];
    while machine.share.read(&mut rest).is_ok_and(|length| length > 0) {}
    loop {
        std::thread::park();
    }
}

struct Machine {
    share: UnixStream,
    memory: File,
    /// Wakes virtiofsd for each queue.
    kicks: Vec<OwnedFd>,
}

impl Machine {
    fn new(args: &[String]) -> io::Result<Self> {
        let number =
            args.iter().find_map(|arg| arg.strip_prefix("socket,id=share,fd=")).ok_or(io::ErrorKind::NotFound)?;
        let number = number.parse().map_err(io::Error::other)?;
        // SAFETY: the shim passes this descriptor, and nothing else uses it.
        let share = unsafe { UnixStream::from_raw_fd(number) };
        let memory = File::from(memfd_create(c"guest", MFdFlags::empty())?);
        memory.set_len(MEMORY)?;
        Ok(Self { share, memory, kicks: Vec::new() })
    }

    fn attack(&mut self, attack: &str) -> io::Result<()> {
        match attack {
            "silence" => Ok(()),
            "half-message" => self.share.write_all(&header(5, 40)[..7]),
            "huge-message" => self.share.write_all(&header(5, u32::MAX)),
            "garbage" => self.share.write_all(&noise(4096)),
            "memory-beyond-the-file" => self.map(&[0, MEMORY << 20, MAPPED, 0]),
            "overlapping-memory" => self.map(&[0, MEMORY, MAPPED, 0, 4096, MEMORY, MAPPED + 4096, 0]),
            "many-descriptors" => self.send(5, &[1, 0, MEMORY, MAPPED, 0], 32),
            other => {
                self.set_up()?;
                self.attack_queue(other)
            }
        }
    }

    /// Sends a request, with as many copies of the memory's descriptor.
    fn send(&self, number: u32, words: &[u64], copies: usize) -> io::Result<()> {
        self.send_with(number, words, &vec![self.memory.as_fd(); copies])
    }

    fn send_with(&self, number: u32, words: &[u64], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let message = [header(number, payload.len() as u32).to_vec(), payload].concat();
        let numbers: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &control[..0] } else { &control[..] };
        let sent =
            sendmsg::<()>(self.share.as_raw_fd(), &[IoSlice::new(&message)], control, MsgFlags::MSG_NOSIGNAL, None)?;
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Offers regions of four words each: the guest's address, the size, the front end's address, the offset in the file.
    fn map(&self, regions: &[u64]) -> io::Result<()> {
        let count = regions.len() / 4;
        self.send(5, &[&[count as u64], regions].concat(), count)
    }

    /// What QEMU does before the guest's driver can use the queues.
    fn set_up(&mut self) -> io::Result<()> {
        self.send(1, &[], 0)?;
        let mut reply = [0; 12 + 8];
        self.share.read_exact(&mut reply)?;
        self.send(2, &[FEATURES], 0)?;
        self.send(3, &[], 0)?;
        self.map(&[0, MEMORY, MAPPED, 0])?;
        for queue in 0..QUEUES {
            self.send(8, &[queue | u64::from(SIZE) << 32], 0)?;
            self.send(10, &[queue], 0)?;
            self.place(queue, MAPPED + begin(queue))?;
            let (kick, call) = (eventfd()?, eventfd()?);
            self.send_with(13, &[queue], &[call.as_fd()])?;
            self.send_with(12, &[queue], &[kick.as_fd()])?;
            self.kicks.push(kick);
            self.send(18, &[queue | 1 << 32], 0)?;
        }
        Ok(())
    }

    /// Tells virtiofsd where a queue is.
    fn place(&self, queue: u64, at: u64) -> io::Result<()> {
        self.send(9, &[queue, at, at.wrapping_add(USED), at.wrapping_add(AVAIL), 0], 0)
    }

    fn attack_queue(&mut self, attack: &str) -> io::Result<()> {
        match attack {
            "index-jump" => self.offer(5000)?,
            "queue-outside-memory" => {
                for at in [MAPPED + MEMORY - 16, MAPPED + MEMORY * 2, u64::MAX - 15, MAPPED + 7, 0] {
                    self.place(REQUESTS, at)?;
                    self.offer(1)?;
                }
            }
            "descriptor-loop" => {
                for (slot, next) in [(0, 1), (1, 2), (2, 0)] {
                    self.describe(slot, DATA, 64, NEXT, next)?;
                }
                self.offer(1)?;
            }
            "descriptor-outside-table" => {
                self.describe(0, DATA, 64, NEXT, u16::MAX)?;
                self.offer(1)?;
            }
            "sizes" => {
                self.describe(0, DATA, u32::MAX, NEXT, 1)?;
                self.describe(1, u64::MAX - 8, u32::MAX, WRITABLE, 0)?;
                self.offer(1)?;
            }
            "indirect-loop" => {
                // The table contains itself, and its size is no multiple of a descriptor's.
                self.describe(0, begin(REQUESTS), 16 * 3 + 5, INDIRECT | NEXT, 0)?;
                self.offer(1)?;
            }
            "request-that-lies" => {
                // A request that claims to have 4 GiB, and has the opcode INIT and no body.
                self.memory.write_all_at(&[u32::MAX.to_le_bytes(), 26_u32.to_le_bytes()].concat(), DATA)?;
                self.describe(0, DATA, 40, NEXT, 1)?;
                self.describe(1, DATA + 4096, 4096, WRITABLE, 0)?;
                self.offer(1)?;
            }
            "noise" => {
                for round in 0..2000 {
                    let bytes = noise(16 * usize::from(SIZE) + 16 * round);
                    self.memory.write_all_at(&bytes[16 * round..], begin(REQUESTS))?;
                    self.offer(round as u16 * 7)?;
                }
            }
            "memory-that-shrinks" => {
                self.describe(0, DATA, 40, NEXT, 1)?;
                self.describe(1, DATA + 4096, 4096, WRITABLE, 0)?;
                self.memory.set_len(0)?;
                self.kick()?;
            }
            "queue-that-moves" => {
                // Without a stop in between.
                for _ in 0..100 {
                    self.map(&[0, MEMORY / 2, MAPPED, 0])?;
                    self.place(REQUESTS, MAPPED + begin(REQUESTS))?;
                    self.offer(1)?;
                }
            }
            other => return Err(io::Error::other(format!("unknown attack {other:?}"))),
        }
        Ok(())
    }

    fn describe(&self, slot: u16, at: u64, length: u32, flags: u16, next: u16) -> io::Result<()> {
        let words = [at.to_le_bytes().to_vec(), length.to_le_bytes().to_vec()].concat();
        let bytes = [words, flags.to_le_bytes().to_vec(), next.to_le_bytes().to_vec()].concat();
        self.memory.write_all_at(&bytes, begin(REQUESTS) + 16 * u64::from(slot))
    }

    /// Claims that as many requests are available, each of the chain that begins with descriptor 0.
    fn offer(&self, count: u16) -> io::Result<()> {
        self.memory.write_all_at(&count.to_le_bytes(), begin(REQUESTS) + AVAIL + 2)?;
        self.kick()
    }

    fn kick(&self) -> io::Result<()> {
        nix::unistd::write(&self.kicks[REQUESTS as usize], &1_u64.to_ne_bytes())?;
        Ok(())
    }
}

/// The beginning of a queue in the memory.
fn begin(queue: u64) -> u64 {
    0x1_0000 * (queue + 1)
}

/// A message's header: number, version 1, and length.
fn header(number: u32, length: u32) -> [u8; 12] {
    let mut header = [0; 12];
    for (field, bytes) in [number, 1, length].iter().zip(header.chunks_exact_mut(4)) {
        bytes.copy_from_slice(&field.to_le_bytes());
    }
    header
}

/// Bytes of an xorshift generator (Marsaglia 2003), the same in each run.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: eventfd(2) takes integers.
    let descriptor = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
