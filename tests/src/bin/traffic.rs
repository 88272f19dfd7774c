//! Both ends of the network tests' traffic, inside a container and outside. Every byte that arrives is checked.
//!
//! `traffic serve PORT` listens on TCP and UDP, then continues in the background.
//! `traffic get ADDRESS:PORT BYTES CONNECTIONS` receives this many bytes over each of so many simultaneous connections.
//! `traffic put ADDRESS:PORT BYTES CONNECTIONS` sends them.
//! `traffic udp ADDRESS:PORT BYTES COUNT` sends datagrams of this size one by one, and expects each one back.
//! `traffic join GROUP:PORT` receives one datagram that is sent to a multicast group, and prints it. It prints `joined`
//! before.
//! `traffic cast GROUP:PORT SOURCE TEXT` sends one to the group, through the link that has the address SOURCE.

#[path = "../pattern.rs"]
#[allow(unreachable_pub)] // The library, which shares the file, exports these items.
mod pattern;

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes per write.
const BLOCK: usize = 256 * 1024;
/// Deadline for one datagram, and for one step of a connection.
const STEP: Duration = Duration::from_secs(20);
/// Largest UDP payload over IPv4 (RFC 768).
const DATAGRAM: usize = 65_507;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let request: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match request.as_slice() {
        ["serve", port] => number(port).and_then(serve),
        ["get" | "put", server, bytes, connections] => transfer(request[0], server, bytes, connections),
        ["udp", server, bytes, count] => datagrams(server, bytes, count),
        ["join", group] => join(group),
        ["cast", group, source, text] => cast(group, source, text),
        _ => Err(io::Error::other("usage: traffic serve|get|put|udp|join|cast …")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("traffic {}: {error}", request.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn number<T: std::str::FromStr<Err = std::num::ParseIntError>>(text: &str) -> io::Result<T> {
    text.parse().map_err(io::Error::other)
}

fn serve(port: u16) -> io::Result<()> {
    // The wildcard address of IPv6 accepts both families: ipv6(7).
    let listener = TcpListener::bind(("::", port))?;
    let socket = UdpSocket::bind(("::", port))?;
    // SAFETY: the process has one thread, so the child is a complete copy.
    match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {}
        // Both sockets are ready.
        _ => return Ok(()),
    }
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    for stream in 0..3 {
        // Whoever waits for the end of the output must not wait for this process.
        // SAFETY: dup2(2) takes integers.
        unsafe { libc::dup2(null.as_raw_fd(), stream) };
    }
    thread::spawn(move || echo(&socket));
    for stream in listener.incoming() {
        let stream = stream?;
        // The client reports what is missing.
        thread::spawn(move || drop(respond(&stream)));
    }
    Ok(())
}

fn echo(socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let (length, client) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..length], client)?;
    }
}

fn respond(stream: &TcpStream) -> io::Result<()> {
    let mut from = BufReader::with_capacity(BLOCK, stream);
    let mut line = String::new();
    (&mut from).take(100).read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["get" | "put", bytes, seed] = words.as_slice() else { return Err(io::Error::other(line)) };
    let (bytes, seed) = (number(bytes)?, number(seed)?);
    if words[0] == "get" {
        pattern::write(&mut &*stream, seed, bytes, BLOCK)?;
    } else {
        let received = pattern::check(&mut from, seed, bytes)?;
        writeln!(&mut &*stream, "{received}")?;
    }
    stream.shutdown(Shutdown::Write)
}

fn transfer(direction: &str, server: &str, bytes: &str, connections: &str) -> io::Result<()> {
    let server: SocketAddr = server.parse().map_err(io::Error::other)?;
    let (bytes, connections): (u64, u64) = (number(bytes)?, number(connections)?);
    let put = direction == "put";
    let connected = Arc::new(Barrier::new(connections as usize));
    let started = Instant::now();
    let connection = |seed: u64| {
        let connected = connected.clone();
        thread::spawn(move || {
            let stream = TcpStream::connect_timeout(&server, STEP);
            connected.wait();
            one(&stream?, put, bytes, seed)
        })
    };
    let connections: Vec<_> = (1..=connections).map(connection).collect();
    let count = connections.len();
    for connection in connections {
        let received = connection.join().map_err(|_| io::Error::other("a connection panicked"))??;
        if received != bytes {
            return Err(io::Error::other(format!("{received} of {bytes} bytes arrived")));
        }
    }
    let took = started.elapsed();
    let rate = (bytes * count as u64) as f64 * 8.0 / took.as_secs_f64() / 1e6;
    // Only stderr depends on the time.
    eprintln!("{direction} {bytes} x {count}: {:.2} s, {rate:.0} Mbit/s", took.as_secs_f64());
    writeln!(io::stdout(), "{count} connections, {bytes} bytes each")
}

fn one(stream: &TcpStream, put: bool, bytes: u64, seed: u64) -> io::Result<u64> {
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    let (mut to, mut from) = (stream, BufReader::with_capacity(BLOCK, stream));
    writeln!(to, "{} {bytes} {seed}", if put { "put" } else { "get" })?;
    if !put {
        return pattern::check(&mut from, seed, bytes + 1);
    }
    pattern::write(&mut to, seed, bytes, BLOCK)?;
    let mut line = String::new();
    from.take(100).read_line(&mut line)?;
    line.trim().parse().map_err(|_| io::Error::other(format!("the server has replied {line:?}")))
}

fn datagrams(server: &str, bytes: &str, count: &str) -> io::Result<()> {
    let server: SocketAddr = server.parse().map_err(io::Error::other)?;
    let (bytes, count): (usize, u64) = (number(bytes)?, number(count)?);
    let socket = UdpSocket::bind(if server.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(STEP))?;
    let mut buffer = vec![0; DATAGRAM];
    for seed in 1..=count {
        let pattern = pattern::Pattern::new(seed, bytes);
        socket.send(pattern.at(0, bytes))?;
        let length = socket.recv(&mut buffer)?;
        if buffer[..length] != *pattern.at(0, bytes) {
            return Err(io::Error::other(format!("datagram {seed} came back changed, with {length} bytes")));
        }
    }
    writeln!(io::stdout(), "{count} datagrams of {bytes} bytes")
}

fn join(group: &str) -> io::Result<()> {
    let group: SocketAddrV4 = group.parse().map_err(io::Error::other)?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, group.port()))?;
    socket.join_multicast_v4(group.ip(), &Ipv4Addr::UNSPECIFIED)?;
    socket.set_read_timeout(Some(STEP))?;
    writeln!(io::stdout(), "joined")?;
    let mut buffer = vec![0; DATAGRAM];
    let length = socket.recv(&mut buffer)?;
    writeln!(io::stdout(), "{}", String::from_utf8_lossy(&buffer[..length]))
}

fn cast(group: &str, source: &str, text: &str) -> io::Result<()> {
    let group: SocketAddrV4 = group.parse().map_err(io::Error::other)?;
    let source: Ipv4Addr = source.parse().map_err(io::Error::other)?;
    UdpSocket::bind((source, 0))?.send_to(text.as_bytes(), group)?;
    Ok(())
}
