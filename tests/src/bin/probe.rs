//! Makes kernel requests that a shell cannot make, from inside a container, and reports whether they succeed.
//!
//! `probe socket FAMILY` opens a stream socket of an address family (a number of linux/socket.h).
//! `probe uring FAMILY` opens such a socket through io_uring.
//! `probe ask CID PORT HEX` sends these bytes to a vsock port, shuts down sending, and prints what the peer sends until
//! it closes the connection, in hexadecimal.
//! `probe echo ADDRESS` listens on a TCP address and returns what each client sends, one client at a time.
//! `probe ping ADDRESS COUNT` sends a byte to such a server and waits for its return, and prints how long each took, in
//! microseconds.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let request: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    let response = match request.as_slice() {
        ["socket", family] => family.parse().map_err(io::Error::other).and_then(socket).map(|_| "granted".to_owned()),
        ["uring", family] => family.parse().map_err(io::Error::other).and_then(uring).map(|()| "granted".to_owned()),
        ["ask", cid, port, bytes] => ask(cid, port, bytes),
        ["echo", address] => echo(address),
        ["ping", address, count] => ping(address, count),
        _ => Err(io::Error::other(
            "usage: probe socket FAMILY | uring FAMILY | ask CID PORT HEX | echo ADDRESS | ping ADDRESS COUNT",
        )),
    };
    let (line, code) = match response {
        Ok(response) => (response, ExitCode::SUCCESS),
        Err(e) => (format!("refused: {e}"), ExitCode::FAILURE),
    };
    // Without a stdout, the exit code has to do.
    let _ = writeln!(io::stdout(), "{line}");
    code
}

fn socket(family: i32) -> io::Result<File> {
    // SAFETY: socket(2) takes integers and returns a descriptor.
    match unsafe { libc::socket(family, libc::SOCK_STREAM, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the descriptor is new and owned by nobody else. Sockets are read and written like files.
        fd => Ok(unsafe { File::from_raw_fd(fd) }),
    }
}

/// Submits one IORING_OP_SOCKET, see io_uring(7) and linux/io_uring.h.
fn uring(family: i32) -> io::Result<()> {
    const IORING_OP_SOCKET: u32 = 45;
    const IORING_ENTER_GETEVENTS: u32 = 1;
    const IORING_OFF_SQES: i64 = 0x1000_0000;
    /// Indices into `struct io_uring_params` as 32-bit words: of the offsets in the queues' shared memory.
    const SQ_TAIL: usize = 11;
    const SQ_ARRAY: usize = 16;
    const CQ_CQES: usize = 25;
    const LENGTH: usize = 4096;

    let mut params = [0u32; 30];
    // SAFETY: the kernel fills the 120 bytes of the parameters.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) } as i32;
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    let map = |offset| {
        // SAFETY: a new mapping of the ring. Both of its areas are smaller than a page with one entry.
        let at = unsafe {
            let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            libc::mmap(std::ptr::null_mut(), LENGTH, access, flags, ring, offset)
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast::<u32>()) }
    };
    let (queues, request) = (map(0)?, map(IORING_OFF_SQES)?);
    // SAFETY: the kernel's offsets are below the mapping's length. An SQE has the opcode at byte 0, the domain at 4, the
    // type at 8; a CQE has its result at byte 8. The kernel does not use the queues outside of io_uring_enter.
    unsafe {
        request.write(IORING_OP_SOCKET);
        request.add(1).write(family as u32);
        request.add(2).write(libc::SOCK_STREAM as u32);
        queues.byte_add(params[SQ_ARRAY] as usize).write(0);
        queues.byte_add(params[SQ_TAIL] as usize).write_volatile(1);
        if libc::syscall(libc::SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        let result = queues.byte_add(params[CQ_CQES] as usize + 8).read_volatile() as i32;
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
    }
}

fn ask(cid: &str, port: &str, bytes: &str) -> io::Result<String> {
    let number = |text: &str| text.parse::<u32>().map_err(io::Error::other);
    let digits = |at| u8::from_str_radix(bytes.get(at..at + 2).unwrap_or("none"), 16).map_err(io::Error::other);
    let bytes = (0..bytes.len()).step_by(2).map(digits).collect::<io::Result<Vec<u8>>>()?;
    let mut stream = socket(libc::AF_VSOCK)?;
    // SAFETY: all zeros are a valid address, without a port.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    (address.svm_family, address.svm_cid, address.svm_port) = (libc::AF_VSOCK as u16, number(cid)?, number(port)?);
    let length = size_of::<libc::sockaddr_vm>() as u32;
    // SAFETY: the address is a sockaddr_vm of that length and outlives the call.
    if unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    stream.write_all(&bytes)?;
    // SAFETY: shutdown(2) takes integers.
    if unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut response = Vec::new();
    stream.read_to_end(&mut response)?;
    Ok(response.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn echo(address: &str) -> io::Result<String> {
    let listener = TcpListener::bind(address)?;
    writeln!(io::stdout(), "listening")?;
    loop {
        let (mut client, _) = listener.accept()?;
        client.set_nodelay(true)?;
        let mut byte = [0];
        // A client that breaks off is not the server's failure.
        while client.read(&mut byte).is_ok_and(|read| read > 0) && client.write_all(&byte).is_ok() {}
    }
}

fn ping(address: &str, count: &str) -> io::Result<String> {
    let count: usize = count.parse().map_err(io::Error::other)?;
    let mut server = TcpStream::connect(address)?;
    server.set_nodelay(true)?;
    server.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut once = || {
        let started = Instant::now();
        server.write_all(&[1])?;
        server.read_exact(&mut [0])?;
        Ok(started.elapsed().as_micros().to_string())
    };
    Ok((0..count).map(|_| once()).collect::<io::Result<Vec<_>>>()?.join("\n"))
}
