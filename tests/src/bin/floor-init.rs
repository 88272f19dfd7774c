//! The benchmark's baseline: the smallest possible guest. As `/init` it listens on vsock, reports its boot timeline to
//! the host, and waits until the host closes the connection. What husk's init takes beyond this is husk's own cost.

use std::io::{self, Write};
use std::process::ExitCode;

/// The values of `husk_protos`, repeated because this program depends on libc only.
const TASK_PORT: u32 = 1024;
const READY_PORT: u32 = 1026;
const PROTOCOL: u8 = 1;
/// `BootStep` of `protos/proto/system.proto`: `INIT` and `READY`.
const INIT: u8 = 1;
const READY: u8 = 8;

fn main() -> ExitCode {
    let started = boottime_ns();
    if let Err(error) = serve(started) {
        // Without a console, the error cannot be reported anyway.
        let _ = writeln!(io::stderr(), "floor-init: {error}");
    }
    // SAFETY: reboot(2) takes integers. PID 1 has nothing to lose.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    ExitCode::FAILURE
}

fn serve(started: u64) -> io::Result<()> {
    let listener = socket()?;
    let any = address(libc::VMADDR_CID_ANY, TASK_PORT);
    // SAFETY: the address is a sockaddr_vm of the given size.
    check(unsafe { libc::bind(listener, (&raw const any).cast(), size_of_val(&any) as u32) })?;
    // SAFETY: listen(2) takes integers.
    check(unsafe { libc::listen(listener, 16) })?;

    let hello = hello(&[(INIT, started), (READY, boottime_ns())]);
    let host = socket()?;
    let ready = address(libc::VMADDR_CID_HOST, READY_PORT);
    // SAFETY: as for bind.
    check(unsafe { libc::connect(host, (&raw const ready).cast(), size_of_val(&ready) as u32) })?;
    // SAFETY: the buffer has the given length. A write this short is not split.
    check(unsafe { libc::write(host, hello.as_ptr().cast(), hello.len()) as i32 })?;
    let mut byte = 0_u8;
    // SAFETY: one byte into a variable of one byte. Returns when the host closes the connection.
    check(unsafe { libc::read(host, (&raw mut byte).cast(), 1) as i32 })
}

fn socket() -> io::Result<i32> {
    // SAFETY: socket(2) takes integers and returns a descriptor, which lives as long as the process.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) };
    check(fd).map(|()| fd)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros are a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn boottime_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, into a local variable. Every kernel built here has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The frame of a `husk.v1.Hello` (protos/proto/system.proto) with this timeline, encoded by hand.
fn hello(timeline: &[(u8, u64)]) -> Vec<u8> {
    const BYTES: u8 = 2;
    let mut message = vec![1 << 3 | BYTES, 5];
    message.extend(b"floor");
    message.extend([2 << 3, PROTOCOL]);
    for (step, ns) in timeline {
        let mut milestone = vec![1 << 3, *step, 2 << 3];
        let mut rest = *ns;
        while rest >= 0x80 {
            milestone.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        milestone.push(rest as u8);
        message.extend([4 << 3 | BYTES, milestone.len() as u8]);
        message.extend(milestone);
    }
    let mut frame = (message.len() as u32).to_be_bytes().to_vec();
    frame.extend(message);
    frame
}
