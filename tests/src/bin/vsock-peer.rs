//! The other end of the vsock tests: `/init` of a bare VM. It listens on port 100; each connection says in its first line what its peer
//! wants to see, see [`serve`]. Only `std` and libc, so that it builds for musl in seconds.

#[path = "../pattern.rs"]
mod pattern;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, ExitCode};
use std::sync::{Condvar, Mutex};

const COMMANDS: u32 = 100;
/// The seed of what the guest sends, and of what it expects.
const OURS: u64 = 1;
const THEIRS: u64 = 2;

static RELEASED: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());
/// How many sinks are done, and the bytes that they have seen.
static TALLY: (Mutex<(u64, u64)>, Condvar) = (Mutex::new((0, 0)), Condvar::new());

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    // The kernel passes what it does not know of its command line to init: only this one is ours.
    if arguments.next().as_deref() == Some("die") {
        let port = arguments.next().and_then(|port| port.parse().ok()).unwrap_or(0);
        die(port);
    }
    match listen() {
        Ok(never) => never,
        Err(error) => {
            let _no_console = writeln!(io::stderr(), "vsock-peer: listen on port {COMMANDS}: {error}");
            power_off();
        }
    }
}

fn listen() -> io::Result<ExitCode> {
    let listener = socket()?;
    let address = address(libc::VMADDR_CID_ANY, COMMANDS);
    // SAFETY: `address` is a sockaddr_vm, and its size is given.
    check(unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::listen(listener.as_raw_fd(), 1024) })?;
    // Says that connections are taken from now on. A host that does not want to know refuses.
    drop(dial(99));
    loop {
        // SAFETY: null says that the peer's address is not wanted.
        let fd = check(unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) })?;
        // SAFETY: the fd is fresh, and nobody else's.
        let stream = unsafe { File::from_raw_fd(fd) };
        std::thread::spawn(move || {
            if let Err(error) = first_line(&stream).and_then(|line| serve(stream, &line)) {
                let _no_console = writeln!(io::stderr(), "vsock-peer: {error}");
            }
        });
    }
}

/// Does what a line asks for, on the connection that it came from:
///
/// | line                  | what happens                                                                          |
/// |-----------------------|---------------------------------------------------------------------------------------|
/// | `echo`                | sends back what comes, until the end of file                                          |
/// | `sink`                | checks what comes to the end of file, answers `<bytes>`                               |
/// | `tally N`             | answers how many bytes the sinks have seen together, once N of them are done          |
/// | `say N PORT`          | sends N bytes; then connects to the host's PORT, which says that they are on the way  |
/// | `source N BLOCK`      | sends N bytes in writes of BLOCK, ends sending, waits for the host's end of file      |
/// | `duplex N BLOCK`      | both at once: N bytes are sent, then `<bytes>` that came, as a line                   |
/// | `stall`               | answers `ok`, reads nothing until there was a `release`, then goes on as `sink`       |
/// | `release`             | see `stall`                                                                           |
/// | `dial PORT LINE...`   | connects to the host's PORT and does LINE there; answers `ok` or `error <errno>`      |
/// | `deaf`                | ends receiving (`SHUT_RD`), sends `ok`, ends sending when the next `release` comes    |
/// | `die PORT`            | a process connects to the host's PORT, writes `last words`, and is killed             |
/// | `off`                 | ends the VM                                                                           |
fn serve(mut stream: File, line: &str) -> io::Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    match words.first().copied() {
        Some("echo") => {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    n => stream.write_all(&buffer[..n])?,
                }
            }
        }
        Some("sink") => sink(&mut stream),
        Some("tally") => {
            let tally = TALLY.0.lock().map_err(|_| io::ErrorKind::Other)?;
            let tally = TALLY.1.wait_while(tally, |tally| tally.0 < number(1)).map_err(|_| io::ErrorKind::Other)?;
            writeln!(stream, "{}", tally.1)
        }
        Some("say") => {
            pattern::write(&mut stream, OURS, number(1), 65536)?;
            drop(dial(number(2) as u32));
            // Keeps the stream open: its end is to come from the VM's.
            wait_for_release()
        }
        Some("source") => {
            pattern::write(&mut stream, OURS, number(1), number(2) as usize)?;
            shutdown(&stream, libc::SHUT_WR)?;
            stream.read(&mut [0]).map(|_| ())
        }
        Some("duplex") => {
            let mut reader = stream.try_clone()?;
            let reading = std::thread::spawn(move || pattern::check(&mut reader, THEIRS, u64::MAX));
            pattern::write(&mut stream, OURS, number(1), number(2) as usize)?;
            let read = reading.join().map_err(|_| io::Error::other("the reader panicked"))??;
            writeln!(stream, "{read}")
        }
        Some("stall") => {
            stream.write_all(b"ok\n")?;
            wait_for_release()?;
            sink(&mut stream)
        }
        Some("release") => {
            *RELEASED.0.lock().map_err(|_| io::ErrorKind::Other)? = true;
            RELEASED.1.notify_all();
            stream.write_all(b"ok\n")
        }
        Some("deaf") => {
            shutdown(&stream, libc::SHUT_RD)?;
            stream.write_all(b"ok\n")?;
            wait_for_release()
        }
        Some("dial") => {
            let rest = line.splitn(3, ' ').nth(2).unwrap_or("");
            match dial(number(1) as u32) {
                Ok(dialled) => {
                    stream.write_all(b"ok\n")?;
                    serve(dialled, rest)
                }
                Err(error) => writeln!(stream, "error {}", error.raw_os_error().unwrap_or(0)),
            }
        }
        Some("die") => {
            let status = Command::new("/init").args(["die", words.get(1).unwrap_or(&"0")]).status()?;
            writeln!(stream, "{status}")
        }
        Some("off") => power_off(),
        _ => Err(io::Error::other(format!("no such request: {line}"))),
    }
}

fn sink(stream: &mut File) -> io::Result<()> {
    let result = pattern::check(stream, THEIRS, u64::MAX);
    if let Ok(bytes) = result
        && let Ok(mut tally) = TALLY.0.lock()
    {
        *tally = (tally.0 + 1, tally.1 + bytes);
        TALLY.1.notify_all();
    }
    match result {
        Ok(bytes) => writeln!(stream, "{bytes}"),
        Err(error) => writeln!(stream, "{error}"),
    }
}

fn wait_for_release() -> io::Result<()> {
    let released = RELEASED.0.lock().map_err(|_| io::ErrorKind::Other)?;
    let mut released = RELEASED.1.wait_while(released, |released| !*released).map_err(|_| io::ErrorKind::Other)?;
    *released = false;
    Ok(())
}

fn first_line(mut stream: &File) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8(line).map_err(io::Error::other)
}

fn die(port: u32) -> ! {
    if let Ok(mut stream) = dial(port) {
        let _at_deaths_door = stream.write_all(b"last words");
    }
    std::process::abort()
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the fd is fresh, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn dial(port: u32) -> io::Result<File> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: `address` is a sockaddr_vm, and its size is given.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    Ok(File::from(socket))
}

fn shutdown(stream: &File, how: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::shutdown(stream.as_raw_fd(), how) }).map(|_| ())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn power_off() -> ! {
    // SAFETY: no memory is passed. QEMU runs with -no-reboot, so this ends it.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    std::process::abort()
}
