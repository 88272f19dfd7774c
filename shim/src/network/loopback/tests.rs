//! In namespaces of the kernel, with `nft` as the observer.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
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
    for expected in ["table inet husk-s1 {", "hook output priority", &format!("redirect to :{port}")] {
        assert!(during.contains(expected), "no {expected} in {during}");
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
    let error = husk_protos::chain::Chain(&intercept(&claim, "s1", LIMIT).unwrap_err()).to_string();
    assert!(error.contains("nf_tables table husk-s1: add it: Operation not permitted"), "{error}");
    release(&claim, "s1", LIMIT).unwrap();
    drop(owner.stdin.take());
    owner.wait().unwrap();
    thread::yield_now();
    intercept(&claim, "s1", LIMIT).unwrap();
}
