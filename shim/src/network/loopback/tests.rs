//! In namespaces of the kernel, with `nft` as the observer.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use super::*;
use crate::network::netns::claim;
use crate::network::testing::Namespace;

const LIMIT: Duration = Duration::from_secs(10);

/// Connects inside the namespace.
fn connect(claim: &Claim, to: &str) -> TcpStream {
    let to: SocketAddr = to.parse().unwrap();
    claim.run(LIMIT, move |_| Ok(TcpStream::connect_timeout(&to, LIMIT).unwrap())).unwrap()
}

fn tables(namespace: &Namespace) -> String {
    namespace.nft("list ruleset")
}

#[test]
fn connections_to_any_address_of_the_namespace_arrive_with_the_address_that_was_meant() {
    let (pod, _peer) = Namespace::pair();
    pod.ip("addr add 10.88.0.7/24 dev eth0");
    pod.ip("addr add fd00:88::7/64 dev eth0 nodad");
    let claim = claim(&pod.path()).unwrap();
    let listeners = intercept(&claim, "s1", LIMIT).unwrap();
    let port = listeners[0].local_addr().unwrap().port();
    let own = format!("127.0.0.1:{port}");
    for meant in ["127.0.0.1:80", "127.0.0.9:65535", "[::1]:80", "10.88.0.7:8080", "[fd00:88::7]:1", &own] {
        let meant: SocketAddr = meant.parse().unwrap();
        let mut client = connect(&claim, &meant.to_string());
        let listener = &listeners[usize::from(meant.is_ipv6())];
        listener.set_nonblocking(false).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        assert_eq!(original_destination(&server, listener.local_addr().unwrap()).unwrap(), meant);
        server.write_all(b"x").unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 1);
    }
}

/// A socket inside the namespace that sends to this address.
fn datagrams(claim: &Claim, to: SocketAddr) -> UdpSocket {
    let connect = move |_| {
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(to).unwrap();
        Ok(socket)
    };
    let socket = claim.run(LIMIT, connect).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

#[test]
fn dns_queries_to_any_server_but_dockers_arrive_with_the_address_that_was_meant() {
    let (pod, _peer) = Namespace::pair();
    pod.ip("addr add 10.88.0.7/24 dev eth0");
    pod.ip("addr add fd00:88::7/64 dev eth0 nodad");
    let claim = claim(&pod.path()).unwrap();
    let Queries { streams, datagrams: sockets, connections } = intercept_queries(&claim, "s1", LIMIT).unwrap();
    for meant in ["10.88.0.9:53", "127.0.0.1:53", "10.88.0.7:53", "[fd00:88::9]:53", "[::1]:53"] {
        let meant: SocketAddr = meant.parse().unwrap();
        let (stream, socket) = (&streams[usize::from(meant.is_ipv6())], &sockets[usize::from(meant.is_ipv6())]);
        stream.set_nonblocking(false).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();

        let client = datagrams(&claim, meant);
        client.send(b"query").unwrap();
        let mut received = [0; 16];
        let (length, sender) = socket.recv_from(&mut received).unwrap();
        assert_eq!(&received[..length], b"query");
        assert_eq!(connections.original_destination(sender, socket.local_addr().unwrap()).unwrap(), meant);
        socket.send_to(b"answer", sender).unwrap();
        // The socket is connected: it receives nothing from another address.
        let length = client.recv(&mut received).unwrap();
        assert_eq!(&received[..length], b"answer");

        let _client = connect(&claim, &meant.to_string());
        let (server, _) = stream.accept().unwrap();
        assert_eq!(original_destination(&server, stream.local_addr().unwrap()).unwrap(), meant);
    }
    let stranger = "127.0.0.1:9".parse().unwrap();
    let error = connections.original_destination(stranger, sockets[0].local_addr().unwrap()).unwrap_err();
    let error = Chain(&error).to_string();
    assert!(error.starts_with("datagram of 127.0.0.1:9: find out which address was meant: No such file"), "{error}");
}

#[test]
fn dockers_dns_server_is_reached_past_all_rules() {
    let namespace = Namespace::new();
    let claim = claim(&namespace.path()).unwrap();
    let _listeners = intercept(&claim, "s1", LIMIT).unwrap();
    let _queries = intercept_queries(&claim, "s1", LIMIT).unwrap();
    let listen = |_| Ok((TcpListener::bind(NAME_SERVER).unwrap(), UdpSocket::bind(NAME_SERVER).unwrap()));
    let (stream, datagrams) = claim.run(LIMIT, listen).unwrap();
    let client = socket_to_name_server(&claim, LIMIT).unwrap();
    client.send(b"query").unwrap();
    let mut received = [0; 16];
    let (length, sender) = datagrams.recv_from(&mut received).unwrap();
    assert_eq!((&received[..length], sender), (&b"query"[..], client.local_addr().unwrap()));
    let client = connect_to_name_server(&claim, LIMIT).unwrap();
    assert_eq!(stream.accept().unwrap().1, client.local_addr().unwrap());
    drop(stream);
    let error = Chain(&connect_to_name_server(&claim, LIMIT).unwrap_err()).to_string();
    assert!(error.ends_with("127.0.0.11:53: connect: Connection refused (os error 111)"), "{error}");
}

#[test]
fn the_table_is_replaced_and_removed_and_others_stay() {
    let namespace = Namespace::new();
    namespace.nft("add table inet husk-other");
    let claim = claim(&namespace.path()).unwrap();
    let before = tables(&namespace);
    let first = intercept(&claim, "s1", LIMIT).unwrap();
    let second = intercept(&claim, "s1", LIMIT).unwrap();
    let port = second[0].local_addr().unwrap().port();
    assert_ne!(first[0].local_addr().unwrap().port(), port);
    let during = tables(&namespace);
    assert_eq!(during.matches("redirect to").count(), 1, "{during}");
    let queries = intercept_queries(&claim, "s1", LIMIT).unwrap();
    let queries = queries.streams[0].local_addr().unwrap().port();
    let during = tables(&namespace);
    let words: Vec<&str> = during.split_whitespace().collect();
    for expected in [
        "table inet husk-s1 {",
        "hook output priority",
        "ip daddr 127.0.0.11 tcp dport 53 accept",
        &format!("oif \"lo\" meta l4proto tcp redirect to :{port}"),
        "table inet husk-names-s1 {",
        "ip daddr 127.0.0.11 accept",
        &format!("udp dport 53 redirect to :{queries} tcp dport 53 redirect to :{queries}"),
    ] {
        assert!(words.join(" ").contains(expected), "no {expected} in {during}");
    }
    for _ in 0..2 {
        release(&claim, "s1", LIMIT).unwrap();
        assert_eq!(tables(&namespace), before);
    }
}

#[test]
fn a_namespace_without_loopback_and_one_that_is_gone_are_no_problem() {
    let namespace = Namespace::new();
    namespace.ip("link set lo down");
    let mut claim = claim(&namespace.path()).unwrap();
    let listeners = intercept(&claim, "s1", LIMIT).unwrap();
    namespace.ip("link set lo up");
    drop(connect(&claim, "127.0.0.1:80"));
    drop(listeners);
    claim.netns = "/nonexistent/netns".into();
    release(&claim, "s1", LIMIT).unwrap();
}

#[test]
fn a_table_of_another_owner_is_an_error_that_names_it() {
    let namespace = Namespace::new();
    let claim = claim(&namespace.path()).unwrap();
    // A table with an owner belongs to the socket that created it.
    let mut owner = namespace.nft_session("add table inet husk-s1 { flags owner; }\n");
    let error = Chain(&intercept(&claim, "s1", LIMIT).unwrap_err()).to_string();
    assert!(error.contains("nf_tables table husk-s1: add it: Operation not permitted"), "{error}");
    release(&claim, "s1", LIMIT).unwrap();
    drop(owner.stdin.take());
    owner.wait().unwrap();
    thread::yield_now();
    intercept(&claim, "s1", LIMIT).unwrap();
}
