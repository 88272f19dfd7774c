//! A hostile vhost-user front end, as QEMU would be after an escape: requests of any kind, order, size and content, with
//! any descriptors. The device serves or rejects them, and ends when the front end goes; its thread never panics.

#![allow(clippy::expect_used, reason = "a failed expectation fails the test")]

use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use husk_vsock::Device;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use proptest::prelude::*;

/// The requests that QEMU's first release of the device can send have numbers up to 40; the rest are unknown.
const REQUESTS: u32 = 48;
/// Bytes of the guest's memory that the front end offers.
const MEMORY: u64 = 1 << 20;

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// What accompanies a request.
#[derive(Debug, Clone, Copy)]
enum Passed {
    Nothing,
    /// Memory that cannot shrink.
    Sealed,
    /// Memory that can.
    Unsealed,
    Eventfd,
    /// Many descriptors.
    Many,
}

#[derive(Debug, Clone)]
struct Request {
    number: u32,
    flags: u32,
    /// What the header says of the length, if it lies.
    claimed: Option<u32>,
    words: Vec<u64>,
    passed: Passed,
}

impl Request {
    fn send(&self, socket: &UnixStream) -> nix::Result<()> {
        let payload: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let length = self.claimed.unwrap_or(payload.len() as u32);
        let mut message = Vec::new();
        for field in [self.number, self.flags, length] {
            message.extend_from_slice(&field.to_le_bytes());
        }
        message.extend_from_slice(&payload);
        let descriptors = self.passed.descriptors();
        let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &control[..0] } else { &control[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&message)], control, flags, None).map(drop)
    }
}

impl Passed {
    fn descriptors(self) -> Vec<OwnedFd> {
        let memory = || {
            let memory = memfd_create(c"guest", MFdFlags::MFD_ALLOW_SEALING).expect("memory");
            nix::unistd::ftruncate(&memory, MEMORY as i64).expect("its size");
            memory
        };
        match self {
            Self::Nothing => Vec::new(),
            Self::Unsealed => vec![memory()],
            Self::Sealed => {
                let memory = memory();
                let seals = nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_SHRINK);
                nix::fcntl::fcntl(&memory, seals).expect("its seals");
                vec![memory]
            }
            Self::Eventfd => {
                // SAFETY: eventfd(2) takes integers.
                let descriptor = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
                assert!(descriptor >= 0, "eventfd");
                // SAFETY: the descriptor is new.
                vec![unsafe { OwnedFd::from_raw_fd(descriptor) }]
            }
            Self::Many => (0..32).map(|_| memory()).collect(),
        }
    }
}

/// Words that pass the first checks: small numbers, and addresses in and around the memory.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..4u64,
        2 => 0..MEMORY,
        1 => prop::sample::select(vec![MEMORY, 1 << 32, 1 | 1 << 32, u64::MAX, 1 << 63, 256, 0x1_0000_0100]),
        1 => any::<u64>(),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    let passed = prop::sample::select(vec![
        Passed::Nothing,
        Passed::Nothing,
        Passed::Sealed,
        Passed::Unsealed,
        Passed::Eventfd,
        Passed::Eventfd,
        Passed::Many,
    ]);
    // Version 1, as most are, with or without the demand for a reply.
    let flags = prop_oneof![8 => prop::sample::select(vec![1u32, 9]), 1 => any::<u32>()];
    let claimed = prop_oneof![15 => Just(None), 1 => any::<u32>().prop_map(Some)];
    (0..REQUESTS, flags, claimed, prop::collection::vec(word(), 0..10), passed)
        .prop_map(|(number, flags, claimed, words, passed)| Request { number, flags, claimed, words, passed })
}

/// The requests with which QEMU sets a device up, so that what follows finds rings that run.
fn set_up() -> Vec<Request> {
    let request =
        |number, words: &[u64], passed| Request { number, flags: 1, claimed: None, words: words.to_vec(), passed };
    let mut all = vec![
        request(3, &[], Passed::Nothing),
        request(2, &[1 << 32 | 1 << 30], Passed::Nothing),
        // One region: guest address 0, its size, QEMU's address, offset 0.
        request(5, &[1, 0, MEMORY, 0x7000_0000, 0], Passed::Sealed),
    ];
    for ring in 0..2u64 {
        let base = 0x7000_0000 + ring * 0x1_0000;
        all.push(request(8, &[ring | 64 << 32], Passed::Nothing));
        all.push(request(10, &[ring], Passed::Nothing));
        all.push(request(9, &[ring, base, base + 0x8000, base + 0x4000, 0], Passed::Nothing));
        all.push(request(12, &[ring], Passed::Eventfd));
        all.push(request(13, &[ring], Passed::Eventfd));
        all.push(request(18, &[ring | 1 << 32], Passed::Nothing));
    }
    all
}

/// Sends the requests and goes. The device must end.
fn attack(requests: &[Request]) {
    count_panics();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (device, socket) = Device::start(3).expect("a device");
        let socket = UnixStream::from(socket);
        for request in requests {
            // The device closes its end after a request that is no request.
            if request.send(&socket).is_err() {
                break;
            }
        }
        // What it has not read yet is read before the end of the connection.
        drop(socket);
        tokio::time::timeout(Duration::from_secs(30), device.closed()).await.expect("the device has not ended");
    });
    assert_eq!(PANICS.load(Ordering::Relaxed), 0, "the device's thread has panicked");
}

/// Counts the panics of devices' threads.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().name() == Some("vsock") {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            report(info);
        }));
    });
}

#[test]
fn a_front_end_that_sets_a_device_up_and_goes_ends_it() {
    attack(&set_up());
    attack(&[]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_requests_are_served_or_rejected(ready in any::<bool>(), requests in prop::collection::vec(request(), 1..12)) {
        let mut all = if ready { set_up() } else { Vec::new() };
        all.extend(requests);
        attack(&all);
    }
}
