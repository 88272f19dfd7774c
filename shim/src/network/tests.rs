//! Connects namespaces of the running kernel, without a VM: a thread plays the guest at the tap's descriptor.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use husk_protos::chain::Chain;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::testing::Namespace;
use super::{Claim, Connected, NetworkError, claim, connect, disconnect};

const LIMIT: Duration = Duration::from_secs(10);
const POD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Length of the virtio header before each frame.
const HEADER: usize = 12;

/// A pod's namespace with an address, its peer with the other, and the pod's claim.
fn pod() -> (Namespace, Namespace, Claim) {
    let (pod, peer) = Namespace::pair();
    pod.ip("link set eth0 address 02:00:00:00:00:01 mtu 1400");
    pod.ip(&format!("addr add {POD}/24 dev eth0"));
    peer.ip(&format!("addr add {PEER}/24 dev peer"));
    let claim = claim(&pod.path()).unwrap();
    (pod, peer, claim)
}

fn qdiscs(namespace: &Namespace) -> String {
    namespace.tc("qdisc show")
}

/// Answers ARP requests and echoes UDP datagrams until `count` datagrams are echoed.
fn play_guest(mut tap: File, mac: [u8; 6], count: usize) {
    let (mut echoed, deadline) = (0, Instant::now() + LIMIT);
    let mut buffer = [0; 2048];
    while echoed < count {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "{echoed} datagrams instead of {count}");
        let timeout = PollTimeout::try_from(left).unwrap();
        if poll(&mut [PollFd::new(tap.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 0 {
            continue;
        }
        let length = tap.read(&mut buffer).unwrap();
        let frame = &mut buffer[HEADER..length];
        let (ethernet, packet) = frame.split_at_mut(14);
        match (ethernet[12], ethernet[13]) {
            // ARP: a request for the pod's address becomes the reply.
            (0x08, 0x06) if packet[7] == 1 && packet[24..28] == POD.octets() => {
                packet[7] = 2;
                packet.copy_within(8..18, 18);
                packet[8..14].copy_from_slice(&mac);
                packet[14..18].copy_from_slice(&POD.octets());
            }
            // UDP: both addresses and both ports change places, so the checksums stay.
            (0x08, 0x00) if packet[9] == 17 && packet[16..20] == POD.octets() => {
                let (source, destination) = packet[12..20].split_at_mut(4);
                source.swap_with_slice(destination);
                let (source, destination) = packet[20..24].split_at_mut(2);
                source.swap_with_slice(destination);
                echoed += 1;
            }
            // Neighbour discovery and others.
            _ => continue,
        }
        let (destination, source) = ethernet[..12].split_at_mut(6);
        destination.copy_from_slice(source);
        source.copy_from_slice(&mac);
        buffer[..HEADER].fill(0);
        tap.write_all(&buffer[..length]).unwrap();
    }
}

/// Sends datagrams from the peer's namespace to the pod's address and expects them back.
fn expect_echo(peer: &Namespace, count: u8) {
    let run = move |_| {
        let socket = UdpSocket::bind((PEER, 0)).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.connect((POD, 7)).unwrap();
        for number in 0..count {
            socket.send(&[number; 1000]).unwrap();
            let mut buffer = [0; 2000];
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..length], [number; 1000]);
        }
        Ok(())
    };
    claim(&peer.path()).unwrap().run(LIMIT, run).unwrap();
}

#[test]
fn a_guest_takes_over_the_pods_link() {
    let (pod, peer, claim) = pod();
    let Connected { mut nics, config } = connect(&claim, 1, LIMIT).unwrap();
    let nic = nics.remove(0);
    assert_eq!(format!("{nic:?}"), "eth0 (MAC 02:00:00:00:00:01, MTU 1400, tap husk-2, 1 queues)");
    assert_eq!(config.links.len(), 1);
    assert_eq!(config.links[0].addresses[0].local, POD.octets());

    let [tap] = <[_; 1]>::try_from(nic.taps).unwrap();
    let guest = thread::spawn(move || play_guest(tap.into(), nic.mac, 3));
    expect_echo(&peer, 3);
    guest.join().unwrap();

    // The guest's descriptor is closed.
    pod.wait_until_taps_are_gone();
    assert!(qdiscs(&pod).contains("ingress"));
    for _ in 0..2 {
        disconnect(&claim, LIMIT).unwrap();
        assert!(!qdiscs(&pod).contains("ingress"), "{}", qdiscs(&pod));
    }
    // The pod's own stack is back.
    let (bound, is_bound) = mpsc::channel();
    let server = thread::spawn(move || {
        claim.run(LIMIT, move |_| {
            let socket = UdpSocket::bind((POD, 7)).unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            bound.send(()).unwrap();
            let mut buffer = [0; 2000];
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&buffer[..length], from).unwrap();
            Ok(())
        })
    });
    is_bound.recv_timeout(LIMIT).unwrap();
    expect_echo(&peer, 1);
    server.join().unwrap().unwrap();
}

#[test]
fn a_guest_with_several_queues_takes_over_too() {
    let (_pod, peer, claim) = pod();
    let mut nics = connect(&claim, 2, LIMIT).unwrap().nics;
    let nic = nics.remove(0);
    let [first, second] = <[_; 2]>::try_from(nic.taps).unwrap();
    // The kernel chooses the queue of a flow, and the guest of this test serves one.
    drop(second);
    let guest = thread::spawn(move || play_guest(first.into(), nic.mac, 2));
    expect_echo(&peer, 2);
    guest.join().unwrap();
}

#[test]
fn a_namespace_is_connected_again_after_a_vm_was_killed() {
    let (pod, peer, claim) = pod();
    // Nothing disconnects after the first VM.
    for _ in 0..2 {
        let nic = connect(&claim, 1, LIMIT).unwrap().nics.remove(0);
        let [tap] = <[_; 1]>::try_from(nic.taps).unwrap();
        let guest = thread::spawn(move || play_guest(tap.into(), nic.mac, 1));
        expect_echo(&peer, 1);
        guest.join().unwrap();
        pod.wait_until_taps_are_gone();
    }
}

#[test]
fn a_link_that_another_vm_uses_stays_its() {
    let (pod, peer, claim) = pod();
    let nic = connect(&claim, 1, LIMIT).unwrap().nics.remove(0);
    let text = Chain(&connect(&claim, 1, LIMIT).unwrap_err()).to_string();
    assert!(text.contains("tap husk-2 of link eth0: create it (busy if another VM uses the link): Device"), "{text}");
    disconnect(&claim, LIMIT).unwrap();
    assert_eq!(qdiscs(&pod).matches("ingress").count(), 2);
    let [tap] = <[_; 1]>::try_from(nic.taps).unwrap();
    let guest = thread::spawn(move || play_guest(tap.into(), nic.mac, 1));
    expect_echo(&peer, 1);
    guest.join().unwrap();
}

#[test]
fn several_links_are_connected_and_a_failure_leaves_nothing() {
    let (pod, _peer, claim) = pod();
    pod.ip("link add eth1 type veth peer name eth2");
    let connected = connect(&claim, 1, LIMIT).unwrap();
    let names: Vec<_> = connected.nics.iter().map(|nic| nic.link.as_str()).collect();
    assert_eq!(names, ["eth0", "eth2", "eth1"]);
    assert_eq!(qdiscs(&pod).matches("ingress").count(), 6);
    drop(connected);
    pod.wait_until_taps_are_gone();
    disconnect(&claim, LIMIT).unwrap();

    // The last link cannot be connected.
    pod.tc("qdisc add dev eth1 clsact");
    let text = Chain(&connect(&claim, 1, LIMIT).unwrap_err()).to_string();
    pod.wait_until_taps_are_gone();
    let expected = "link eth1: its ingress has a qdisc of kind clsact, which husk cannot share";
    assert!(text.ends_with(expected), "{text}");
    assert_eq!(qdiscs(&pod).matches("ingress").count(), 0, "{}", qdiscs(&pod));
    assert_eq!(qdiscs(&pod).matches("clsact").count(), 1);
}

#[test]
fn disconnecting_a_namespace_that_is_gone_is_fine() {
    let (pod, peer, claim) = pod();
    drop((pod, peer));
    disconnect(&claim, LIMIT).unwrap();
    let error = connect(&claim, 1, LIMIT).unwrap_err();
    let replaced = matches!(error, NetworkError::Replaced { .. } | NetworkError::NotANamespace { .. });
    assert!(replaced || error_kind(&error) == Some(ErrorKind::NotFound), "{error:?}");
    let claim = Claim { netns: PathBuf::from("/proc/self/ns/mnt"), device: 1, inode: 1 };
    disconnect(&claim, LIMIT).unwrap();
}

fn error_kind(error: &NetworkError) -> Option<ErrorKind> {
    match error {
        NetworkError::Open { source, .. } => Some(source.kind()),
        _ => None,
    }
}

#[test]
fn a_claim_survives_being_recorded() {
    let (_pod, _peer, claim) = pod();
    let text = serde_json::to_string(&claim).unwrap();
    assert_eq!(serde_json::from_str::<Claim>(&text).unwrap(), claim);
}
