//! Reads namespaces of the running kernel, which `ip` has prepared.

use std::time::Duration;

use husk_protos::network::NetworkRoute;

use super::*;
use crate::network::error::NetworkError;
use crate::network::netns::claim;
use crate::network::testing::Namespace;

const LIMIT: Duration = Duration::from_secs(5);

fn read(namespace: &Namespace) -> Result<Scan, NetworkError> {
    claim(&namespace.path())
        .unwrap()
        .run(LIMIT, |deadline| scan(&mut Netlink::open(deadline).map_err(|error| error.at("socket", "open it"))?))
}

/// A route in a form that is easy to compare.
fn line(route: &NetworkRoute) -> String {
    let address = |bytes: &[u8]| match bytes.len() {
        4 => std::net::Ipv4Addr::from(<[u8; 4]>::try_from(bytes).unwrap()).to_string(),
        16 => std::net::Ipv6Addr::from(<[u8; 16]>::try_from(bytes).unwrap()).to_string(),
        _ => "-".into(),
    };
    format!(
        "{}/{} via {} dev {} src {} table {} metric {} kind {} flags {} mtu {} advmss {}",
        address(&route.destination),
        route.prefix_length,
        address(&route.gateway),
        route.link,
        address(&route.source),
        route.table,
        route.priority,
        route.kind,
        route.flags,
        route.mtu,
        route.advmss,
    )
}

fn octets(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[test]
fn an_empty_namespace_has_no_links() {
    let scan = read(&Namespace::new()).unwrap();
    assert!(scan.links.is_empty());
    assert_eq!(scan.config, ConfigureNetworkRequest::new());
}

#[test]
fn links_and_addresses_are_read() {
    let (pod, _peer) = Namespace::pair();
    // The link-local address is made when the link comes up.
    pod.ip("link set eth0 down");
    pod.ip("link set eth0 address 02:00:00:00:00:01 mtu 1400 up");
    pod.ip("addr add 10.0.0.2/24 broadcast 10.0.0.255 dev eth0");
    pod.ip("addr add 10.9.0.1 peer 10.9.0.2/32 dev eth0 noprefixroute");
    pod.ip("addr add fd00::2/64 dev eth0 nodad");
    pod.ip("addr add fe80::7/64 dev eth0 nodad");
    pod.ip("link add second type veth peer name third");
    let scan = read(&pod).unwrap();
    let names: Vec<_> = scan.links.iter().map(|link| link.name.as_str()).collect();
    assert_eq!(names, ["eth0", "third", "second"]);

    let eth0 = &scan.config.links[0];
    assert_eq!((eth0.name.as_str(), eth0.mtu, eth0.up), ("eth0", 1400, true));
    assert_eq!(eth0.mac, [2, 0, 0, 0, 0, 1]);
    // IFA_F_NODAD is 0x02, IFA_F_NOPREFIXROUTE 0x200.
    let mut addresses: Vec<_> = eth0.addresses.iter().map(|a| (a.local.clone(), a.prefix_length, a.flags)).collect();
    // Whether the kernel has finished its test for duplicates of this address is a matter of time.
    let made = addresses.pop().unwrap();
    assert_eq!((made.0, made.1), (octets("fe80::ff:fe00:1"), 64));
    assert_eq!(
        addresses,
        [
            (octets("10.0.0.2"), 24, 0),
            (octets("10.9.0.1"), 32, 0x200),
            (octets("fd00::2"), 64, 2),
            (octets("fe80::7"), 64, 2),
        ]
    );
    assert_eq!(eth0.addresses[0].broadcast, octets("10.0.0.255"));
    assert_eq!(eth0.addresses[1].peer, octets("10.9.0.2"));
    assert!(!scan.config.links[1].up);
}

#[test]
fn routes_of_all_tables_are_read() {
    let (pod, _peer) = Namespace::pair();
    pod.ip("addr add 10.0.0.2/24 dev eth0");
    pod.ip("addr add fd00::2/64 dev eth0 nodad");
    pod.ip("route add default via 10.0.0.1 mtu 1300 advmss 1260");
    pod.ip("route add 10.5.0.0/16 via 192.168.7.1 dev eth0 onlink src 10.0.0.2 metric 7");
    pod.ip("route add 10.6.0.0/16 dev eth0 table 1000");
    pod.ip("route add blackhole 10.7.0.0/16");
    pod.ip("route add local 10.8.0.0/16 dev lo table 100");
    pod.ip("route add 10.4.0.0/16 via inet6 fd00::1 dev eth0");
    pod.ip("-6 route add default via fd00::1");
    pod.ip("-6 route add unreachable fd01::/64");
    let routes: Vec<_> = read(&pod).unwrap().config.routes.iter().map(line).collect();
    let expected = [
        "10.8.0.0/16 via - dev lo src - table 100 metric 0 kind 2 flags 0 mtu 0 advmss 0",
        "10.6.0.0/16 via - dev eth0 src - table 1000 metric 0 kind 1 flags 0 mtu 0 advmss 0",
        "10.0.0.0/24 via - dev eth0 src 10.0.0.2 table 254 metric 0 kind 1 flags 0 mtu 0 advmss 0",
        "10.7.0.0/16 via - dev  src - table 254 metric 0 kind 6 flags 0 mtu 0 advmss 0",
        "fd00::/64 via - dev eth0 src - table 254 metric 256 kind 1 flags 0 mtu 0 advmss 0",
        "fd01::/64 via - dev  src - table 254 metric 1024 kind 7 flags 0 mtu 0 advmss 0",
        "-/0 via 10.0.0.1 dev eth0 src - table 254 metric 0 kind 1 flags 0 mtu 1300 advmss 1260",
        "10.4.0.0/16 via fd00::1 dev eth0 src - table 254 metric 0 kind 1 flags 0 mtu 0 advmss 0",
        "10.5.0.0/16 via 192.168.7.1 dev eth0 src 10.0.0.2 table 254 metric 7 kind 1 flags 4 mtu 0 advmss 0",
        "-/0 via fd00::1 dev eth0 src - table 254 metric 1024 kind 1 flags 0 mtu 0 advmss 0",
    ];
    let (mut found, mut sorted) = (routes.clone(), expected.map(str::to_owned));
    found.sort();
    sorted.sort();
    assert_eq!(found, sorted);
    // Routes without a gateway come first; the order is the kernel's otherwise.
    let first_gateway = routes.iter().position(|route| !route.contains("via - ")).unwrap();
    assert!(routes[first_gateway..].iter().all(|route| !route.contains("via - ")), "{routes:#?}");
}

#[test]
fn addresses_without_their_prefix_route_stay_without() {
    // What the CNI plugin ptp does.
    let (pod, _peer) = Namespace::pair();
    pod.ip("addr add 10.0.0.2/24 dev eth0");
    pod.ip("route del 10.0.0.0/24 dev eth0");
    pod.ip("route add 10.0.0.1 dev eth0 src 10.0.0.2");
    pod.ip("route add 10.0.0.0/24 via 10.0.0.1");
    let config = read(&pod).unwrap().config;
    assert_eq!(config.links[0].addresses[0].flags, 0x200);
    let routes: Vec<_> = config.routes.iter().map(line).collect();
    assert!(routes[0].starts_with("10.0.0.1/32 via - dev eth0"), "{routes:#?}");
    assert!(routes[1].starts_with("10.0.0.0/24 via 10.0.0.1 dev eth0"), "{routes:#?}");
}

#[test]
fn rules_and_permanent_neighbours_are_read() {
    let (pod, _peer) = Namespace::pair();
    pod.ip("rule add from 10.0.0.0/8 iif eth0 fwmark 0x10/0xff table 1000 priority 50");
    pod.ip("-6 rule add not to fd00::/8 table 1000 priority 60");
    pod.ip("neigh add 10.0.0.1 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
    pod.ip("neigh add 10.0.0.3 lladdr 02:00:00:00:00:09 dev eth0 nud stale");
    let config = read(&pod).unwrap().config;
    let rules: Vec<_> = config
        .rules
        .iter()
        .map(|rule| {
            (rule.family, rule.priority, rule.table, rule.input_link.as_str(), rule.mark, rule.mask, rule.flags)
        })
        .collect();
    assert_eq!(rules, [(2, 50, 1000, "eth0", 0x10, 0xff, 0), (10, 60, 1000, "", 0, 0, 2)]);
    assert_eq!((config.rules[0].source.as_slice(), config.rules[0].source_length), (&[10, 0, 0, 0][..], 8));
    assert_eq!(config.rules[1].destination_length, 8);
    let neighbours: Vec<_> =
        config.neighbours.iter().map(|found| (found.link.as_str(), found.address.clone())).collect();
    assert_eq!(neighbours, [("eth0", octets("10.0.0.1"))]);
    assert_eq!(config.neighbours[0].mac, [2, 0, 0, 0, 0, 9]);
}

#[test]
fn macvlan_and_tap_are_connected_and_a_bridge_is_rejected_by_name() {
    let pod = Namespace::new();
    pod.ip("tuntap add dev tap0 mode tap");
    pod.ip("link add parent type veth peer name other");
    pod.ip("link add link parent name mac0 type macvlan mode bridge");
    let names: Vec<_> = read(&pod).unwrap().links.into_iter().map(|link| link.name).collect();
    assert_eq!(names, ["tap0", "other", "parent", "mac0"]);

    pod.ip("link add br0 type bridge");
    let scan = read(&pod).unwrap();
    assert_eq!((scan.links.len(), scan.rejected.len()), (4, 0));
    pod.ip("link set br0 up");
    let rejected: Vec<_> = read(&pod).unwrap().rejected.iter().map(ToString::to_string).collect();
    assert_eq!(rejected.len(), 1, "{rejected:?}");
    assert!(rejected[0].starts_with("link br0: links of kind bridge are not supported"), "{rejected:?}");
}
