//! Connects namespaces of the running kernel, without a VM: a thread plays the guest at the tap's descriptor.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use husk_protos::chain::Chain;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::subscription::News;
use super::testing::Namespace;
use super::{Claim, Connected, NetworkError, NicPlan, Settled, claim, connect, disconnect};

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

const VM: &str = "ns/pod";

fn plan(queues: u16, spare: usize) -> NicPlan {
    NicPlan { vm: VM.into(), queues, spare, most: 5, pluggable: 0 }
}

fn qdiscs(namespace: &Namespace) -> String {
    namespace.tc("qdisc show")
}

/// Answers ARP requests and echoes UDP datagrams until `count` datagrams are echoed. Serves all queues of a tap: the
/// kernel chooses one for each flow.
fn play_guest(queues: Vec<OwnedFd>, mac: [u8; 6], count: usize) {
    let mut queues: Vec<File> = queues.into_iter().map(File::from).collect();
    let (mut echoed, deadline) = (0, Instant::now() + LIMIT);
    let mut buffer = [0; 2048];
    while echoed < count {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "{echoed} datagrams instead of {count}");
        let timeout = PollTimeout::try_from(left).unwrap();
        let mut polled: Vec<_> = queues.iter().map(|queue| PollFd::new(queue.as_fd(), PollFlags::POLLIN)).collect();
        if poll(&mut polled, timeout).unwrap() == 0 {
            continue;
        }
        let ready = polled.iter().position(|queue| queue.any().unwrap()).unwrap();
        let length = queues[ready].read(&mut buffer).unwrap();
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
        queues[ready].write_all(&buffer[..length]).unwrap();
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
    let Connected { mut nics, follower, settled: Settled { config, problems, .. } } =
        connect(&claim, plan(1, 0), LIMIT).unwrap();
    let nic = nics.remove(0);
    let status = &follower.status().nics[0];
    assert_eq!((status.nic.as_str(), status.tap.as_str()), ("02:00:00:00:00:01", "husk-2"));
    assert_eq!(status.link.as_ref().map(|link| (link.name.as_str(), link.mtu)), Some(("eth0", 1400)));
    assert_eq!((config.links.len(), config.spare_nics.len(), problems.len()), (1, 0, 0));
    assert_eq!(config.links[0].addresses[0].local, POD.octets());

    let [tap] = <[_; 1]>::try_from(nic.taps).unwrap();
    let guest = thread::spawn(move || play_guest(vec![tap], nic.mac, 3));
    expect_echo(&peer, 3);
    guest.join().unwrap();

    // The guest's descriptor is closed.
    pod.wait_until_taps_are_gone();
    assert!(qdiscs(&pod).contains("ingress"));
    for _ in 0..2 {
        disconnect(&claim, VM, LIMIT).unwrap();
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
    let mut nics = connect(&claim, plan(2, 0), LIMIT).unwrap().nics;
    let nic = nics.remove(0);
    assert_eq!(nic.taps.len(), 2);
    let guest = thread::spawn(move || play_guest(nic.taps, nic.mac, 2));
    expect_echo(&peer, 2);
    guest.join().unwrap();
}

#[test]
fn a_namespace_is_connected_again_after_a_vm_was_killed() {
    let (pod, peer, claim) = pod();
    // Nothing disconnects after the first VM.
    for _ in 0..2 {
        let nic = connect(&claim, plan(1, 0), LIMIT).unwrap().nics.remove(0);
        let [tap] = <[_; 1]>::try_from(nic.taps).unwrap();
        let guest = thread::spawn(move || play_guest(vec![tap], nic.mac, 1));
        expect_echo(&peer, 1);
        guest.join().unwrap();
        pod.wait_until_taps_are_gone();
    }
}

#[test]
fn a_link_that_another_vm_uses_stays_its() {
    let (pod, peer, claim) = pod();
    let nic = connect(&claim, plan(1, 0), LIMIT).unwrap().nics.remove(0);
    let other = NicPlan { vm: "ns/po".into(), ..plan(1, 0) };
    let text = Chain(&connect(&claim, other, LIMIT).unwrap_err()).to_string();
    let expected = "tap husk-2: the namespace is in use (husk VM ns/pod: eth0), and its links serve one VM: put both containers into one pod, or connect each to the network";
    assert!(text.ends_with(expected), "{text}");
    disconnect(&claim, "ns/po", LIMIT).unwrap();
    let text = Chain(&disconnect(&claim, VM, LIMIT).unwrap_err()).to_string();
    assert!(text.ends_with("tap husk-2: still exists: the VM may still run"), "{text}");
    assert_eq!(qdiscs(&pod).matches("ingress").count(), 2);
    let [tap] = <[_; 1]>::try_from(nic.taps).unwrap();
    let guest = thread::spawn(move || play_guest(vec![tap], nic.mac, 1));
    expect_echo(&peer, 1);
    guest.join().unwrap();
}

#[test]
fn several_links_are_connected_and_a_failure_leaves_nothing() {
    let (pod, _peer, claim) = pod();
    pod.ip("link add eth1 type veth peer name eth2");
    let connected = connect(&claim, plan(1, 0), LIMIT).unwrap();
    assert_eq!(links(&connected), ["eth0", "eth2", "eth1"]);
    assert_eq!(qdiscs(&pod).matches("ingress").count(), 6);
    drop(connected);
    pod.wait_until_taps_are_gone();
    disconnect(&claim, VM, LIMIT).unwrap();

    // The last link cannot be connected.
    pod.tc("qdisc add dev eth1 clsact");
    let text = Chain(&connect(&claim, plan(1, 1), LIMIT).unwrap_err()).to_string();
    pod.wait_until_taps_are_gone();
    let expected = "link eth1: its ingress has a qdisc of kind clsact, which husk cannot share";
    assert!(text.ends_with(expected), "{text}");
    assert_eq!(qdiscs(&pod).matches("ingress").count(), 0, "{}", qdiscs(&pod));
    assert_eq!(qdiscs(&pod).matches("clsact").count(), 1);

    let few = NicPlan { most: 2, ..plan(1, 1) };
    let text = Chain(&connect(&claim, few, LIMIT).unwrap_err()).to_string();
    assert!(text.ends_with("link eth1: the machine can have 2 network cards only"), "{text}");
}

fn links(connected: &Connected) -> Vec<String> {
    let links = connected.follower.status().nics.into_iter();
    links.map(|nic| nic.link.map(|link| link.name).unwrap_or_else(|| nic.tap)).collect()
}

/// Brings the follower up to date, and returns the new configuration.
fn settle(connected: &mut Connected) -> Settled {
    connected.follower.settle(LIMIT).unwrap().expect("something has changed")
}

#[test]
fn a_link_that_appears_later_gets_a_spare_nic_and_gives_it_back() {
    let (pod, peer, claim) = pod();
    let mut connected = connect(&claim, plan(1, 1), LIMIT).unwrap();
    assert_eq!(links(&connected), ["eth0", "husk-s1"]);
    assert_eq!(connected.settled.config.spare_nics, [connected.nics[1].mac.to_vec()]);
    assert_eq!(connected.nics[1].mac[0] & 3, 2, "locally administered, of one station");
    assert!(connected.follower.settle(LIMIT).unwrap().is_none(), "its own changes are news");

    // The peer's end stays outside.
    let appear = |name: &str, mac: &str| {
        peer.ip(&format!("link add {name} address {mac} mtu 1300 type veth peer name out-{name}"));
        peer.ip(&format!("link set {name} netns {}", pod.path().display()));
        pod.ip(&format!("link set {name} up"));
    };
    appear("net1", "02:00:00:00:00:07");
    let settled = settle(&mut connected);
    assert!(settled.problems.is_empty());
    assert_eq!(links(&connected), ["eth0", "net1"]);
    let link = &settled.config.links[1];
    assert_eq!((link.mac.as_slice(), link.mtu), (&[2, 0, 0, 0, 0, 7][..], 1300));
    assert_eq!(link.nic, connected.nics[1].mac);
    let net1 = connected.follower.status().nics[1].link.as_ref().unwrap().index;
    let shown = &pod.ip_json(&format!("link show dev husk-{net1}"))[0];
    assert_eq!((&shown["mtu"], &shown["ifalias"]), (&1300.into(), &"husk VM ns/pod: net1".into()));
    assert_eq!(qdiscs(&pod).matches("ingress").count(), 4);

    // Beyond the spare NICs: the others keep working, and each further attempt names the link.
    appear("net2", "02:00:00:00:00:08");
    for _ in 0..2 {
        let Settled { config, problems, .. } = settle(&mut connected);
        assert!(problems[0].to_string().starts_with("link net2: the VM has no network card left"), "{problems:?}");
        assert_eq!(config.links.len(), 2);
    }
    peer.ip("link del out-net1");
    let settled = settle(&mut connected);
    assert!(settled.problems.is_empty());
    assert_eq!(links(&connected), ["eth0", "net2"]);

    // A link that has left and returned has lost its qdisc.
    for name in ["eth0", "net2"] {
        pod.ip(&format!("link set {name} netns {}", peer.path().display()));
        peer.ip(&format!("link set {name} netns {}", pod.path().display()));
        pod.ip(&format!("link set {name} up"));
    }
    settle(&mut connected);
    assert_eq!(links(&connected), ["eth0", "net2"]);
    assert_eq!(qdiscs(&pod).matches("ingress").count(), 4, "{}", qdiscs(&pod));

    for name in ["eth0", "net2"] {
        pod.ip(&format!("link del {name}"));
    }
    let Settled { config, problems, .. } = settle(&mut connected);
    assert_eq!((config.links.len(), config.spare_nics.len(), problems.len()), (0, 2, 0));
    assert_eq!(links(&connected), ["husk-s0", "husk-s1"]);
    assert!(!qdiscs(&pod).contains("ingress"), "{}", qdiscs(&pod));
    let Connected { nics, .. } = connected;
    drop(nics);
    pod.wait_until_taps_are_gone();
}

#[test]
fn a_link_without_a_nic_waits_for_one_that_is_plugged() {
    let (pod, _peer, claim) = pod();
    let mut connected = connect(&claim, NicPlan { pluggable: 1, ..plan(2, 0) }, LIMIT).unwrap();
    pod.ip("link add net1 address 02:00:00:00:00:07 type veth peer name net2");
    let settled = settle(&mut connected);
    assert_eq!((settled.waiting.len(), settled.problems.len(), settled.config.links.len()), (1, 1, 1));
    let text = settled.problems[0].to_string();
    assert!(text.starts_with("link net1: the VM has no network card left for it: it has 1,"), "{text}");
    let failed = settled.waiting[0].failed(&std::io::Error::other("QEMU says no")).to_string();
    assert_eq!(failed, "link net2: the VM has no network card left for it, and cannot be given one: QEMU says no");

    // After a failure, the next attempt uses the same tap, which is no news.
    let nic = connected.follower.new_nic(&settled.waiting[0], LIMIT).unwrap();
    drop(nic);
    let waiting = settle(&mut connected).waiting;
    let nic = connected.follower.new_nic(&waiting[0], LIMIT).unwrap();
    assert_eq!((nic.taps.len(), links(&connected)), (2, vec!["eth0".to_owned()]));
    connected.follower.plugged();
    let settled = settle(&mut connected);
    assert_eq!(links(&connected), ["eth0", "net2"]);
    assert_eq!((settled.config.links.len(), settled.waiting.len()), (2, 0));
    assert!(settled.config.links.iter().all(|link| link.nic.is_empty()), "the NIC has the link's MAC from the start");
    let text = settled.problems[0].to_string();
    let expected = "it has 2, all of which have links, and cannot be given more than the 1 that were plugged into it";
    assert!(text.starts_with("link net1: ") && text.contains(expected), "{text}");

    // From then on, it is as spare as the others.
    pod.ip("link del net1");
    settle(&mut connected);
    assert_eq!(links(&connected), ["eth0", "husk-s1"]);
    pod.ip("link add net3 type veth peer name net4");
    settle(&mut connected);
    assert_eq!(links(&connected), ["eth0", "net4"]);
    // Nobody but the machine has the tap.
    drop(nic);
    connected.nics.clear();
    pod.wait_until_taps_are_gone();
}

#[test]
fn after_lost_notifications_only_links_without_a_redirect_are_redirected_again() {
    let (pod, peer, claim) = pod();
    let appear = |number| {
        pod.ip(&format!("link add eth{number} type veth peer name peer{number} netns {}", peer.path().display()));
    };
    appear(1);
    let mut connected = connect(&claim, plan(1, 0), LIMIT).unwrap();
    let eth0 = connected.follower.status().nics[0].link.as_ref().unwrap().index;
    let redirected = |name: &str| pod.tc(&format!("filter show dev {name} ingress")).contains("mirred");
    assert!(redirected("eth0") && redirected("eth1"));

    // Nothing else would bring eth1's filter back, and a problem stays: no NIC is left for eth2.
    appear(2);
    pod.tc("filter del dev eth1 ingress");
    pod.tc("qdisc del dev eth0 ingress");
    pod.tc("qdisc add dev eth0 clsact");
    connected.follower.news.lost = true;
    let texts: Vec<_> = settle(&mut connected).problems.iter().map(ToString::to_string).collect();
    assert!(texts.len() == 2 && texts[0].contains("clsact") && texts[1].contains("no network card left"), "{texts:?}");
    assert_eq!(connected.follower.news, News { changed: true, lost: false, left: vec![eth0] });
    assert!(!redirected("eth1"), "a link with an ingress qdisc was redirected again");

    // The link that could not be redirected is not forgotten.
    pod.tc("qdisc del dev eth0 clsact");
    assert_eq!(settle(&mut connected).problems.len(), 1);
    assert!(redirected("eth0") && !redirected("eth1"));
    assert_eq!(connected.follower.news, News { changed: true, ..News::default() });
    pod.ip("link del eth2");
    assert!(settle(&mut connected).problems.is_empty());
    assert!(connected.follower.settle(LIMIT).unwrap().is_none());
}

#[test]
fn changes_of_a_link_are_followed() {
    let (pod, _peer, claim) = pod();
    let mut connected = connect(&claim, plan(1, 0), LIMIT).unwrap();
    pod.ip("link set eth0 mtu 1280");
    pod.ip("link set eth0 address 02:00:00:00:00:09");
    pod.ip("addr add 10.9.0.2/24 dev eth0");
    pod.ip("route add default via 10.9.0.1");
    pod.ip("neigh add 10.9.0.9 lladdr 02:00:00:00:00:05 dev eth0");
    let Settled { config, problems, .. } = settle(&mut connected);
    assert!(problems.is_empty(), "{problems:?}");
    let link = &config.links[0];
    assert_eq!(
        (link.mtu, link.mac.as_slice(), link.nic.as_slice()),
        (1280, &[2, 0, 0, 0, 0, 9][..], &[2, 0, 0, 0, 0, 1][..])
    );
    assert_eq!((link.addresses.iter().filter(|a| a.local.len() == 4).count(), config.neighbours.len()), (2, 1));
    assert!(config.routes.iter().any(|route| route.gateway == [10, 9, 0, 1]));
    assert_eq!(pod.ip_json("link show dev husk-2")[0]["mtu"], 1280);
    pod.ip("link set eth0 down");
    pod.ip("link set eth0 name net0");
    let config = settle(&mut connected).config;
    assert_eq!((config.links[0].name.as_str(), config.links[0].up), ("net0", false));
    // A route that a guest cannot have: the configuration stays, until it is gone.
    pod.ip("link set net0 up");
    pod.ip("route add 10.8.0.0/24 nexthop via 10.0.0.1 dev net0 nexthop via 10.0.0.3 dev net0");
    for _ in 0..2 {
        if let Err(error) = connected.follower.settle(LIMIT) {
            assert!(Chain(&error).to_string().contains("10.8.0.0/24"), "{}", Chain(&error));
        }
    }
    pod.ip("route del 10.8.0.0/24");
    assert!(settle(&mut connected).problems.is_empty());
}

#[test]
fn disconnecting_a_namespace_that_is_gone_is_fine() {
    let (pod, peer, claim) = pod();
    drop((pod, peer));
    disconnect(&claim, VM, LIMIT).unwrap();
    let error = connect(&claim, plan(1, 0), LIMIT).unwrap_err();
    let replaced = matches!(error, NetworkError::Replaced { .. } | NetworkError::NotANamespace { .. });
    assert!(replaced || error_kind(&error) == Some(ErrorKind::NotFound), "{error:?}");
    let claim = Claim { netns: PathBuf::from("/proc/self/ns/mnt"), device: 1, inode: 1 };
    disconnect(&claim, VM, LIMIT).unwrap();
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
