//! The guest's end of the vsock tests: `/init` of a bare VM. It listens on port 100. The first line of each connection
//! is a request, see [`serve`]. It uses only `std` and libc, so it builds for musl in seconds.

#[path = "../pattern.rs"]
#[allow(unreachable_pub)] // The library, which shares the file, exports these items.
mod pattern;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, ExitCode};
use std::sync::{Condvar, Mutex};

const COMMANDS: u32 = 100;
/// Seeds of the bytes that the guest sends, and of those that it expects.
const OURS: u64 = 1;
const THEIRS: u64 = 2;

static RELEASED: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());
/// Number of sinks that are done, and the bytes that they received.
static TALLY: (Mutex<(u64, u64)>, Condvar) = (Mutex::new((0, 0)), Condvar::new());

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    // The kernel passes unknown parameters of its command line to init; `die` is the only argument of this program.
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
    // SAFETY: `address` is a sockaddr_vm, passed with its size.
    check(unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::listen(listener.as_raw_fd(), 1024) })?;
    // Signals the host that connections are accepted from now on. A host that does not listen refuses.
    drop(dial(99));
    loop {
        // SAFETY: null pointers decline the peer's address.
        let fd = check(unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) })?;
        // SAFETY: the descriptor is new and owned by nobody else.
        let stream = unsafe { File::from_raw_fd(fd) };
        std::thread::spawn(move || {
            if let Err(error) = first_line(&stream).and_then(|line| serve(stream, &line)) {
                let _no_console = writeln!(io::stderr(), "vsock-peer: {error}");
            }
        });
    }
}

/// Executes a request line on its connection:
///
/// | line                  | effect                                                                                |
/// |-----------------------|---------------------------------------------------------------------------------------|
/// | `echo`                | sends back everything up to the end of file                                           |
/// | `sink`                | checks everything up to the end of file, responds with `<bytes>`                      |
/// | `tally N`             | responds with the total bytes of all sinks, once N of them are done                   |
/// | `send N PORT`         | sends N bytes, then connects to the host's PORT to signal that they are on the way    |
/// | `source N BLOCK`      | sends N bytes in writes of BLOCK, shuts down sending, waits for the host's end of file |
/// | `duplex N BLOCK`      | sends N bytes while receiving, then a line with the number of `<bytes>` received      |
/// | `stall`               | responds `ok`, reads nothing until a `release`, then continues as `sink`              |
/// | `release`             | releases a `stall` or `shut-read`                                                     |
/// | `dial PORT LINE...`   | connects to the host's PORT and executes LINE there; responds `ok` or `error <errno>` |
/// | `shut-read`           | shuts down receiving (`SHUT_RD`), sends `ok`, closes at the next `release`            |
/// | `die PORT`            | a process connects to the host's PORT, writes `last words`, and aborts                |
/// | `off`                 | ends the VM                                                                           |
fn serve(mut stream: File, line: &str) -> io::Result<()> {
    let arguments: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| arguments.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    match arguments.first().copied() {
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
        Some("send") => {
            pattern::write(&mut stream, OURS, number(1), 65536)?;
            drop(dial(number(2) as u32));
            // Keeps the stream open: it must end with the VM.
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
        Some("shut-read") => {
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
            let status = Command::new("/init").args(["die", arguments.get(1).unwrap_or(&"0")]).status()?;
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
        let _aborting_anyway = stream.write_all(b"last words");
    }
    std::process::abort()
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros are a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn dial(port: u32) -> io::Result<File> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: `address` is a sockaddr_vm, passed with its size.
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
    // SAFETY: no memory is passed. QEMU runs with -no-reboot, so the reboot ends it.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    std::process::abort()
}
