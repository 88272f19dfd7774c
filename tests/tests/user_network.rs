//! User mode: a container has a network that needs neither privileges nor a network namespace, and ports of the host
//! lead to it.
#![cfg(not(target_env = "musl"))]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Containerd, Setup};
use husk_tests::leftovers::Leftovers;
use husk_tests::operator;

const SLEEP: [&str; 2] = ["sleep", "1000"];
const USER: [&str; 2] = ["--annotation", "io.husk.network=user"];
/// The host's programs: the image has no UDP server.
const HOST: [&str; 2] = ["--mount", "type=bind,src=/,dst=/host,options=bind:ro"];
/// Deadline of one read or write of the test's sockets.
const DEADLINE: Duration = Duration::from_secs(60);
const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A server of the host on threads of its own, until it is dropped.
struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Calls `serve` until the server is dropped. `serve` must return after a moment without clients.
    fn run(address: SocketAddr, mut serve: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                serve();
            }
        });
        Self { address, stop, thread: Some(thread) }
    }

    /// Sends `text` to everyone who connects.
    fn greeting(host: &Containerd, address: &str, text: &'static str) -> Result<Self> {
        let listener = host.in_network(|| Ok(TcpListener::bind(address)?))?;
        let address = listener.local_addr()?;
        let poll = move || {
            let mut fds = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&listener), nix::poll::PollFlags::POLLIN)];
            if matches!(nix::poll::poll(&mut fds, 100_u16), Ok(1..))
                && let Ok((mut client, _)) = listener.accept()
            {
                // The client may be gone.
                let _ = client.write_all(text.as_bytes());
            }
        };
        Ok(Self::run(address, poll))
    }

    /// Answers datagrams with what `reply` makes of them.
    fn udp(host: &Containerd, address: &str, reply: fn(&[u8]) -> Vec<u8>) -> Result<Self> {
        let socket = host.in_network(|| Ok(UdpSocket::bind(address)?))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let address = socket.local_addr()?;
        let answer = move || {
            let mut datagram = [0; 512];
            if let Ok((length, client)) = socket.recv_from(&mut datagram) {
                let _ = socket.send_to(&reply(&datagram[..length]), client);
            }
        };
        Ok(Self::run(address, answer))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// A reply to a DNS query for an address (RFC 1035, section 4): 192.0.2.77, or no address to any other query.
fn dns(query: &[u8]) -> Vec<u8> {
    // The header has 12 bytes. The name ends with an empty label; type and class follow.
    let name = query.iter().skip(12).position(|byte| *byte == 0).unwrap_or(0);
    let Some(question) = query.get(..12 + name + 5) else { return Vec::new() };
    let is_a = question.ends_with(&[0, 1, 0, 1]);
    let mut reply = question.to_vec();
    // A response, recursion desired and available, no error; one question, and one answer or none.
    reply[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
    if is_a {
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 77]);
    }
    reply
}

/// A port of the host that nothing uses at the moment.
fn free_port(host: &Containerd) -> Result<u16> {
    host.in_network(|| Ok(TcpListener::bind((LOCALHOST, 0))?.local_addr()?.port()))
}

fn ports(list: &str) -> String {
    format!("io.husk.ports={list}")
}

/// Everything that a TCP server of the host sends.
fn receive(host: &Containerd, port: u16, request: &str) -> Result<String> {
    let mut stream = host.in_network(|| Ok(TcpStream::connect((LOCALHOST, port))?))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The local addresses of the listening TCP sockets with this port.
fn listeners(containerd: &Containerd, port: u16) -> Result<String> {
    Ok(containerd.sh(&format!("ss -Hltn 'sport = :{port}' | awk '{{print $4}}'"))?.text())
}

fn refusal(containerd: &Containerd, flags: &[&str]) -> Result<String> {
    Ok(containerd.run(flags, &containerd.id("refused"), &["true"]).expect_code(1)?.errors())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_container_in_user_mode_reaches_the_host_and_resolves_names() -> Result<()> {
    let configured = Configured::start("network = \"user\"\nport_addresses = [\"0.0.0.0\"]\nport_ranges = true\n")?;
    let containerd = &configured.containerd;
    let resolver = Server::udp(containerd, "127.77.0.1:53", dns)?;
    containerd.sh(&format!(
        "printf 'search husk.test\\nnameserver {}\\n' >/run/resolv.conf; mount --bind /run/resolv.conf /etc/resolv.conf",
        resolver.address.ip()
    ))?;
    let tcp = Server::greeting(containerd, "127.0.0.1:0", "over IPv4")?;
    let tcp6 = Server::greeting(containerd, "[::1]:0", "over IPv6")?;
    let first = free_port(containerd)?;
    let flags = ["--annotation", &ports(&format!("tcp:0.0.0.0:{first}-{first}:80-80"))];
    let container = containerd.detached(&[&flags[..], &HOST].concat(), "user", &SLEEP)?;
    let shown = container.script(
        "ip -o -4 addr show eth0 | awk '{print $4}'; ip -o -6 addr show eth0 scope site | awk '{print $4}'
        ip -4 route | sed 's/ *$//'; ip -6 route | grep -c '^default via fec0::2 dev eth0'; cat /etc/resolv.conf",
    )?;
    let expected = "10.0.2.15/24\nfec0::15/64\ndefault via 10.0.2.2 dev eth0\n\
                    10.0.2.0/24 dev eth0 scope link  src 10.0.2.15\n1\nnameserver 10.0.2.3\nsearch husk.test";
    ensure!(shown == expected, "{shown}\nexpected:\n{expected}");
    let greetings = format!("nc 10.0.2.2 {}; nc fec0::2 {}", tcp.address.port(), tcp6.address.port());
    let greetings = container.script(&greetings)?;
    ensure!(greetings == "over IPv4over IPv6", "{greetings}");
    // A name of the search list.
    let resolved = container.script("nslookup db.husk.test; ping -c 1 -w 1 db 2>&1 | head -1")?;
    ensure!(resolved.contains("Address: 192.0.2.77") && resolved.contains("PING db (192.0.2.77)"), "{resolved}");
    let udp = Server::udp(containerd, "127.0.0.1:0", <[u8]>::to_ascii_uppercase)?;
    let client = "import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(60)
s.sendto(b'hello', ('10.0.2.2', int(sys.argv[1]))); print(s.recv(100).decode())";
    let port = udp.address.port().to_string();
    let reply = container.exec(&["chroot", "/host", "python3", "-c", client, &port]).ok()?.text();
    ensure!(reply == "HELLO", "{reply}");
    // Allowed by the configuration: all addresses.
    let addresses = listeners(containerd, first)?;
    ensure!(addresses == format!("0.0.0.0:{first}"), "{addresses}");
    // The file of the spec wins.
    containerd.sh("echo 'nameserver 192.0.2.1' >/run/own.conf")?;
    let own = ["--mount", "type=bind,src=/run/own.conf,dst=/etc/resolv.conf,options=bind:ro"];
    let own = containerd.script(&own, "own", "cat /etc/resolv.conf")?;
    ensure!(own == "nameserver 192.0.2.1", "{own}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn without_the_annotation_a_container_has_a_loopback_only() -> Result<()> {
    let links = Containerd::shared()?.script(&[], "none", "ls /sys/class/net; ls /etc/resolv.conf || true")?;
    ensure!(links == "lo", "{links}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn mapped_ports_lead_to_the_container_and_are_released() -> Result<()> {
    // A daemon of its own: the test counts what is left behind.
    let containerd = &Containerd::with(Setup::default())?;
    containerd.script(&USER, "first", "true")?;
    let before = Leftovers::now(containerd);
    let (tcp, udp) = (free_port(containerd)?, free_port(containerd)?);
    let mapping = ports(&format!("tcp:{tcp}:80,udp:{udp}:5353"));
    let flags = [&USER[..], &["--annotation", &mapping], &HOST].concat();
    let container = containerd.detached(&flags, "mapped", &SLEEP)?;
    container.script("mkdir /www; echo it works >/www/index.html; httpd -p 80 -h /www")?;
    let page = receive(containerd, tcp, "GET / HTTP/1.0\r\n\r\n")?;
    ensure!(page.ends_with("it works\n"), "{page}");
    let server = "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 5353))
while True: d, a = s.recvfrom(100); s.sendto(d.upper(), a)";
    let mut exec = container.exec(&["chroot", "/host", "python3", "-c", server]).command();
    let exec = Killed(exec.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
    let socket = containerd.in_network(|| Ok(UdpSocket::bind((LOCALHOST, 0))?))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    // The server may not listen yet, and a datagram may be lost.
    let reply = wait_for(DEADLINE, "the container's UDP server replies", || {
        socket.send_to(b"hello", (LOCALHOST, udp)).ok()?;
        let mut reply = [0; 100];
        socket.recv(&mut reply).ok().map(|length| reply[..length].to_vec())
    })?;
    ensure!(reply == b"HELLO", "{reply:?}");
    drop(exec);
    // By default, only the host itself reaches them.
    let addresses = listeners(containerd, tcp)?;
    ensure!(addresses == format!("127.0.0.1:{tcp}"), "{addresses}");
    let status = operator::husk(containerd, &["status", container.id()])?.text();
    ensure!(
        status.contains(&format!("user mode, ports 127.0.0.1:{tcp}/tcp -> 80, 127.0.0.1:{udp}/udp -> 5353")),
        "{status}"
    );

    // A second sandbox cannot have one of them, and does not disturb the first one.
    let one = ports(&format!("udp:{udp}:53"));
    let one = [&USER[..], &["--annotation", &one]].concat();
    let refused = refusal(containerd, &one)?;
    let expected = format!(
        "annotation io.husk.ports: the host's port 127.0.0.1:{udp}/udp is in use by sandbox {} in namespace husk-test",
        container.id()
    );
    ensure!(refused.contains(&expected), "{refused}");
    let page = receive(containerd, tcp, "GET / HTTP/1.0\r\n\r\n")?;
    ensure!(page.ends_with("it works\n"), "{page}");
    container.kill_and_wait()?;
    container.delete_task()?;
    drop(container);
    containerd.script(&one, "again", "true")?;
    let excused = |line: &str| line.contains("/.ports") || line.starts_with("network device");
    before.expect_none_since_but(containerd, excused)?;
    kill_the_shim_and_run_again(containerd, &one)
}

/// Containerd calls the shim's `delete` after the death of the server.
fn kill_the_shim_and_run_again(containerd: &Containerd, flags: &[&str]) -> Result<()> {
    let container = containerd.detached(flags, "killed", &SLEEP)?;
    let leases = || Ok::<_, anyhow::Error>(containerd.sh("ls /run/husk/.ports | grep -c - || true")?.text());
    ensure!(leases()? == "1", "{}", leases()?);
    containerd.shim_of(container.id())?.0.kill();
    wait_for(DEADLINE, "the leases are released", || {
        leases().map(|leases| (leases == "0").then_some(())).transpose()
    })??;
    drop(container);
    containerd.script(flags, "after", "true")?;
    Ok(())
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn two_vms_talk_through_a_mapped_port() -> Result<()> {
    let containerd = Containerd::shared()?;
    let port = free_port(containerd)?;
    let mapping = ports(&format!("tcp:{port}:80"));
    let server = [&USER[..], &["--annotation", &mapping]].concat();
    let server = containerd.detached(&server, "server", &SLEEP)?;
    server.script("mkdir /www; echo from the other VM >/www/index.html; httpd -p 80 -h /www")?;
    let page = containerd.script(&USER, "client", &format!("wget -q -O - http://10.0.2.2:{port}/"))?;
    ensure!(page == "from the other VM", "{page}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_port_that_cannot_be_mapped_is_named_before_anything_starts() -> Result<()> {
    let containerd = Containerd::shared()?;
    let listener = "import os, socket, sys
s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], os.getpid(), flush=True)
sys.stdin.read()";
    let mut command = containerd.enter("python3");
    let mut owner = Killed(command.args(["-c", listener]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    let mut line = String::new();
    BufReader::new(owner.0.stdout.take().context("no pipe")?).read_line(&mut line)?;
    let (port, pid) = line.trim().split_once(' ').context("no port and PID")?;
    containerd.sh(&format!("ip netns add cni-{port}"))?;
    let with_ns = format!("network:/run/netns/cni-{port}");
    let user = "io.husk.network=user";
    let table: [(&[&str], String); 6] = [
        (
            &["--annotation", user, "--annotation", &ports(&format!("tcp:{port}:80"))],
            format!("annotation io.husk.ports: the host's port 127.0.0.1:{port}/tcp is in use by python3 (PID {pid})"),
        ),
        (
            &["--annotation", user, "--annotation", &ports("tcp:0.0.0.0:18080:80")],
            "the host's address 0.0.0.0 is not a loopback address and not among the configuration's port_addresses"
                .into(),
        ),
        (
            &["--annotation", user, "--annotation", &ports("tcp:18080-18081:80-81")],
            "ranges need port_ranges = true in husk's configuration".into(),
        ),
        (
            &["--annotation", &ports("tcp:18080:80")],
            "annotation io.husk.ports = 127.0.0.1:18080/tcp -> 80: ports need user-mode networking".into(),
        ),
        (
            &["--annotation", user, "--with-ns", &with_ns],
            format!(
                "annotation io.husk.network = \"user\": the spec names the network namespace /run/netns/cni-{port}"
            ),
        ),
        (&["--annotation", "io.husk.network=host"], "\"host\": must be one of \"none\", \"user\"".into()),
    ];
    for (flags, expected) in table {
        let refused = refusal(containerd, flags)?;
        ensure!(refused.contains(&expected), "{flags:?}: {refused}");
    }
    containerd.sh(&format!("ip netns delete cni-{port}"))?;
    Ok(())
}
