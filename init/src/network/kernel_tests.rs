//! Configures real network namespaces, with veth devices as NICs, and compares the result with what `ip` shows. Needs
//! root and iproute2.

use husk_protos::chain::Chain;
use husk_protos::network::{
    ConfigureNetworkRequest, NetworkAddress, NetworkLink, NetworkNeighbour, NetworkRoute, NetworkRule, NetworkSysctl,
};

use super::apply::configure;
use super::model::Applied;
use super::testing::*;

#[test]
fn sysctls_are_set_once_before_the_addresses() {
    in_namespace(&["nic"], || {
        let sysctl =
            |name: &str, value: &str| NetworkSysctl { name: name.into(), value: value.into(), ..Default::default() };
        let mut eth0 = link("eth0", 1, &[address("10.0.0.2/24", 0)]);
        eth0.sysctls = vec![sysctl("ipv6/disable_ipv6", "1")];
        let sysctls = vec![sysctl("core/somaxconn", "77")];
        let mut request = ConfigureNetworkRequest { links: vec![eth0], sysctls, ..Default::default() };
        let mut last = Applied::default();
        configure(&request, &mut last, &NoDriver).unwrap();
        let read = |path: &str| std::fs::read_to_string(format!("/proc/sys/net/{path}")).unwrap();
        assert_eq!([read("core/somaxconn"), read("ipv6/conf/eth0/disable_ipv6")], ["77\n", "1\n"]);
        // A container changes it.
        std::fs::write("/proc/sys/net/core/somaxconn", "99").unwrap();
        configure(&request, &mut last, &NoDriver).unwrap();
        assert_eq!(read("core/somaxconn"), "99\n");

        // The kernel applies the namespace's to every link, whose own value counts.
        request.links[0].sysctls = vec![sysctl("ipv6/disable_ipv6", "0")];
        configure(&request, &mut last, &NoDriver).unwrap();
        request.sysctls = vec![sysctl("ipv6/conf/all/disable_ipv6", "1")];
        configure(&request, &mut last, &NoDriver).unwrap();
        assert_eq!([read("ipv6/conf/all/disable_ipv6"), read("ipv6/conf/eth0/disable_ipv6")], ["1\n", "0\n"]);

        request.sysctls = vec![sysctl("core/none", "1")];
        let error = configure(&request, &mut last, &NoDriver).unwrap_err();
        assert_eq!(
            Chain(&error).to_string(),
            "set the sysctl net/core/none to \"1\": No such file or directory (os error 2)"
        );
    });
}

#[test]
fn a_pod_of_the_bridge_plugin_gets_its_addresses_and_routes() {
    in_namespace(&["enp0s1"], || {
        apply(&dual_stack(), &mut Applied::default());
        let addr = &json("addr show dev eth0")[0];
        assert_eq!((&addr["mtu"], &addr["address"]), (&1400.into(), &"02:00:00:00:00:01".into()));
        let addresses: Vec<_> = addr["addr_info"]
            .as_array()
            .unwrap()
            .iter()
            .map(|info| format!("{}/{} {}", info["local"].as_str().unwrap(), info["prefixlen"], info["scope"]))
            .collect();
        assert_eq!(
            addresses,
            [r#"10.88.0.5/16 "global""#, r#"fd00:88::5/64 "global""#, r#"fe80::ff:fe00:1/64 "link""#]
        );
        assert_eq!(addr["addr_info"][0]["broadcast"], "10.88.255.255");
        assert_eq!(
            lines("route"),
            ["default via 10.88.0.1 dev eth0", "10.88.0.0/16 dev eth0 proto kernel scope link src 10.88.0.5"]
        );
        assert_eq!(
            lines("-6 route"),
            [
                "fd00:88::/64 dev eth0 proto kernel metric 256 pref medium",
                "fe80::/64 dev eth0 proto kernel metric 256 pref medium",
                "default via fd00:88::1 dev eth0 metric 1024 pref medium",
            ]
        );
    });
}

#[test]
fn a_link_has_no_address_that_the_request_does_not_list() {
    in_namespace(&["eth0"], || {
        apply(&request(&[link("eth0", 1, &[address("10.0.0.2/24", 0)])], &[]), &mut Applied::default());
        let addr = &json("addr show dev eth0")[0];
        assert_eq!(addr["addr_info"].as_array().unwrap().len(), 1, "{addr}");
        assert_eq!(lines("-6 route"), [""; 0]);
    });
}

#[test]
fn two_networks_swap_their_names_and_keep_their_addresses() {
    in_namespace(&["eth0", "eth1"], || {
        let mut last = Applied::default();
        let first = [link("eth1", 1, &[address("10.0.1.2/24", 0)]), link("eth0", 2, &[address("10.0.2.2/24", 0)])];
        apply(&request(&first, &[route("0.0.0.0/0", "10.0.2.1", "eth0")]), &mut last);
        let routes = ["10.0.1.0/24 dev eth1 proto kernel scope link src 10.0.1.2", "10.0.2.0/24 dev eth0"];
        let shown = lines("route");
        assert_eq!(shown[0], "default via 10.0.2.1 dev eth0");
        assert!(shown[1] == routes[0] && shown[2].starts_with(routes[1]), "{shown:?}");

        let second = [link("eth0", 1, &[address("10.0.1.2/24", 0)]), link("eth1", 2, &[address("10.0.2.2/24", 0)])];
        apply(&request(&second, &[route("0.0.0.0/0", "10.0.2.1", "eth1")]), &mut last);
        assert_eq!(json("link show dev eth0")[0]["address"], "02:00:00:00:00:01");
        assert_eq!(lines("route")[0], "default via 10.0.2.1 dev eth1");
        assert_eq!(lines("route").len(), 3);
    });
}

#[test]
fn a_spare_device_gives_way_to_a_link_with_its_name() {
    in_namespace(&["eth0", "eth1"], || {
        apply(&request(&[link("eth0", 2, &[])], &[]), &mut Applied::default());
        assert_eq!(json("link show dev eth0")[0]["address"], "02:00:00:00:00:02");
        assert!(lines("-o link").iter().any(|line| line.contains("husk")), "{:?}", lines("-o link"));
    });
}

#[test]
fn a_pod_of_the_ptp_plugin_reaches_its_gateway_without_a_connected_route() {
    in_namespace(&["eth0"], || {
        let addresses = [address("10.1.0.5/24", NOPREFIXROUTE), address("fd01::5/64", NOPREFIXROUTE | NODAD)];
        // In an order in which the kernel rejects them.
        let routes = [
            route("0.0.0.0/0", "10.1.0.1", "eth0"),
            NetworkRoute { source: bytes("10.1.0.5"), ..route("10.1.0.0/24", "10.1.0.1", "eth0") },
            NetworkRoute { source: bytes("10.1.0.5"), ..route("10.1.0.1/32", "", "eth0") },
            route("::/0", "fd01::1", "eth0"),
            NetworkRoute { source: bytes("fd01::5"), ..route("fd01::1/128", "", "eth0") },
        ];
        apply(&request(&[link("eth0", 1, &addresses)], &routes), &mut Applied::default());
        assert_eq!(
            lines("route"),
            [
                "default via 10.1.0.1 dev eth0",
                "10.1.0.0/24 via 10.1.0.1 dev eth0 src 10.1.0.5",
                "10.1.0.1 dev eth0 scope link src 10.1.0.5",
            ]
        );
        assert_eq!(
            lines("-6 route"),
            [
                "fd01::1 dev eth0 src fd01::5 metric 1024 pref medium",
                "default via fd01::1 dev eth0 metric 1024 pref medium",
            ]
        );
        let addr = &json("addr show dev eth0")[0]["addr_info"];
        assert_eq!((&addr[0]["noprefixroute"], &addr[1]["noprefixroute"]), (&true.into(), &true.into()));
        assert_eq!(addr[1]["nodad"], true);
    });
}

#[test]
fn unusual_routes_and_addresses_are_configured() {
    in_namespace(&["eth0"], || {
        let addresses = [
            NetworkAddress { peer: bytes("10.2.0.9"), scope: SCOPE_LINK, ..address("10.2.0.1/32", 0) },
            address("10.3.0.1/24", 0),
            address("fd02::1/64", NODAD),
        ];
        let routes = [
            NetworkRoute { flags: ONLINK, priority: 50, ..route("0.0.0.0/0", "192.0.2.1", "eth0") },
            NetworkRoute { priority: 60, mtu: 1300, advmss: 1260, ..route("0.0.0.0/0", "10.3.0.254", "eth0") },
            NetworkRoute { kind: BLACKHOLE, scope: 0, ..route("10.66.0.0/16", "", "") },
            NetworkRoute { kind: UNREACHABLE, scope: 0, priority: 9, ..route("fd66::/16", "", "lo") },
            NetworkRoute { table: 1000, ..route("10.77.0.0/16", "10.3.0.7", "eth0") },
            NetworkRoute { gateway: bytes("fd02::9"), scope: 0, ..route("10.88.0.0/16", "", "eth0") },
            // One destination, two gateways.
            NetworkRoute { priority: 20, ..route("fd03::/64", "fd02::a", "eth0") },
            NetworkRoute { priority: 20, ..route("fd03::/64", "fd02::b", "eth0") },
        ];
        apply(&request(&[link("eth0", 1, &addresses)], &routes), &mut Applied::default());
        assert_eq!(
            lines("route"),
            [
                "default via 192.0.2.1 dev eth0 metric 50 onlink",
                "default via 10.3.0.254 dev eth0 metric 60 mtu 1300 advmss 1260",
                "10.2.0.9 dev eth0 proto kernel scope link src 10.2.0.1",
                "10.3.0.0/24 dev eth0 proto kernel scope link src 10.3.0.1",
                "blackhole 10.66.0.0/16",
                "10.88.0.0/16 via inet6 fd02::9 dev eth0",
            ]
        );
        assert_eq!(lines("route show table 1000"), ["10.77.0.0/16 via 10.3.0.7 dev eth0"]);
        let routes6 = lines("-6 route").join("; ");
        assert!(routes6.contains("unreachable fd66::/16 dev lo metric 9"), "{routes6}");
        assert!(routes6.contains("nexthop via fd02::a") && routes6.contains("nexthop via fd02::b"), "{routes6}");
        let addr = &json("addr show dev eth0")[0]["addr_info"];
        assert_eq!((&addr[0]["address"], &addr[0]["scope"]), (&"10.2.0.9".into(), &"link".into()), "{addr}");
    });
}

/// A second network, whose replies a rule sends through its own gateway, and permanent neighbours.
fn policy_routing() -> ConfigureNetworkRequest {
    let rule = |priority, source: &str, table| NetworkRule {
        family: family(source),
        priority,
        table,
        action: TO_TABLE,
        source: bytes(source),
        source_length: if source.contains(':') { 128 } else { 32 },
        ..Default::default()
    };
    let neighbour = |address: &str, last_byte| NetworkNeighbour {
        link: "eth0".into(),
        address: bytes(address),
        mac: vec![2, 0, 0, 0, 1, last_byte],
        ..Default::default()
    };
    let mut request = dual_stack();
    request.links.push(link("eth1", 2, &[address("10.5.0.2/24", 0)]));
    request.routes.push(NetworkRoute { table: 100, ..route("0.0.0.0/0", "10.5.0.1", "eth1") });
    request.rules = vec![
        rule(1000, "10.5.0.2", 100),
        rule(1001, "fd00:88::5", 254),
        NetworkRule { mark: 16, mask: 255, input_link: "eth1".into(), ..rule(1002, "10.5.0.3", 100) },
    ];
    request.neighbours = vec![neighbour("10.88.0.1", 1), neighbour("fd00:88::1", 2)];
    request
}

#[test]
fn tables_rules_and_neighbours_are_configured() {
    in_namespace(&["eth0", "eth1"], || {
        apply(&policy_routing(), &mut Applied::default());
        assert_eq!(
            lines("rule"),
            [
                "0: from all lookup local",
                "1000: from 10.5.0.2 lookup 100",
                "1002: from 10.5.0.3 fwmark 0x10/0xff iif eth1 lookup 100",
                "32766: from all lookup main",
                "32767: from all lookup default"
            ]
        );
        assert_eq!(lines("-6 rule")[1], "1001: from fd00:88::5 lookup main");
        assert_eq!(lines("route show table 100"), ["default via 10.5.0.1 dev eth1"]);
        assert_eq!(
            lines("neigh show nud permanent"),
            [
                "10.88.0.1 dev eth0 lladdr 02:00:00:00:01:01 PERMANENT",
                "fd00:88::1 dev eth0 lladdr 02:00:00:00:01:02 PERMANENT"
            ]
        );
    });
}

#[test]
fn a_later_request_adds_changes_and_removes() {
    in_namespace(&["eth0", "eth1"], || {
        let mut last = Applied::default();
        apply(&policy_routing(), &mut last);
        let mut second = policy_routing();
        second.links[0].mtu = 1500;
        second.links[1].addresses = vec![address("10.6.0.2/24", 0)];
        second.routes[0].gateway = bytes("10.88.0.254");
        second.routes[4].gateway = bytes("10.6.0.1");
        second.rules.remove(1);
        second.rules[0].table = 254;
        second.neighbours.remove(0);
        second.neighbours[0].mac = vec![2, 0, 0, 0, 1, 9];
        apply(&second, &mut last);
        assert_eq!(json("link show dev eth0")[0]["mtu"], 1500);
        assert_eq!(
            lines("route"),
            [
                "default via 10.88.0.254 dev eth0",
                "10.6.0.0/24 dev eth1 proto kernel scope link src 10.6.0.2",
                "10.88.0.0/16 dev eth0 proto kernel scope link src 10.88.0.5"
            ]
        );
        assert_eq!(lines("route show table 100"), ["default via 10.6.0.1 dev eth1"]);
        assert_eq!(lines("rule")[1], "1000: from 10.5.0.2 lookup main");
        assert_eq!(lines("-6 rule").len(), 2);
        assert_eq!(lines("neigh show nud permanent"), ["fd00:88::1 dev eth0 lladdr 02:00:00:00:01:09 PERMANENT"]);
    });
}

#[test]
fn a_link_goes_down_and_comes_back() {
    in_namespace(&["eth0", "eth1"], || {
        let mut last = Applied::default();
        apply(&policy_routing(), &mut last);
        let before = everything();
        let mut down = policy_routing();
        down.links[1].up = false;
        down.routes.pop();
        apply(&down, &mut last);
        assert_eq!(json("link show dev eth1")[0]["operstate"], "DOWN");
        assert_eq!(lines("route").len(), 2);
        apply(&policy_routing(), &mut last);
        assert_eq!(everything(), before);
    });
}

#[test]
fn an_empty_request_leaves_only_links_that_are_down() {
    in_namespace(&["eth0", "eth1"], || {
        let mut last = Applied::default();
        let objects = || everything().into_iter().filter(|object| !object.starts_with("link")).collect::<Vec<_>>();
        let before = objects();
        apply(&policy_routing(), &mut last);
        assert_ne!(objects(), before);
        apply(&ConfigureNetworkRequest::default(), &mut last);
        assert_eq!(objects(), before);
        assert_eq!(json("link show dev eth1")[0]["operstate"], "DOWN");
    });
}

#[test]
fn what_the_kernel_lost_is_added_again() {
    in_namespace(&["eth0"], || {
        let mut last = Applied::default();
        apply(&dual_stack(), &mut last);
        let before = everything();
        ip("link set eth0 down");
        assert!(!lines("-6 route").iter().any(|route| route.starts_with("default")));
        apply(&dual_stack(), &mut last);
        assert_eq!(everything(), before);

        // A change of something else does not bring back what a container has removed.
        ip("route del default");
        let mut more = dual_stack();
        more.routes.push(route("10.99.0.0/16", "10.88.0.1", "eth0"));
        apply(&more, &mut last);
        assert_eq!(lines("route show default"), [""; 0]);

        // The secondary address vanishes with the primary one, unless it is added again.
        let pair = |first: &str| [link("eth0", 1, &[address(first, 0), address("10.88.0.6/16", 0)])];
        apply(&request(&pair("10.88.0.5/16"), &[]), &mut last);
        apply(&request(&pair("10.88.0.7/16"), &[]), &mut last);
        let local: Vec<_> = json("addr show dev eth0")[0]["addr_info"]
            .as_array()
            .unwrap()
            .iter()
            .map(|info| info["local"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(local.len(), 2, "{local:?}");
        assert!(local.contains(&"10.88.0.6".into()) && local.contains(&"10.88.0.7".into()), "{local:?}");
    });
}

#[test]
fn an_error_names_the_link_and_the_object_and_a_later_request_recovers() {
    in_namespace(&["eth0", "eth1"], || {
        let mut last = Applied::default();
        let unknown = request(&[link("eth0", 1, &[]), link("eth1", 9, &[])], &[]);
        assert_eq!(
            error(&unknown, &mut last),
            "link eth1: the guest has no network device with the MAC address 02:00:00:00:00:09"
        );
        assert_eq!(json("link show dev eth0")[0]["operstate"], "DOWN", "a request without a device changed something");

        let good = link("eth0", 1, &[address("10.0.0.2/24", 0)]);
        let missing = request(std::slice::from_ref(&good), &[route("0.0.0.0/0", "10.0.0.1", "eth7")]);
        assert_eq!(error(&missing, &mut last), r#"route default/0 on eth7: there is no link "eth7""#);

        let unreachable = request(std::slice::from_ref(&good), &[route("0.0.0.0/0", "10.99.0.1", "eth0")]);
        assert_eq!(
            error(&unreachable, &mut last),
            "add route 0.0.0.0/0 via 10.99.0.1 on eth0: Nexthop has invalid gateway: Network is unreachable (os error \
             101)"
        );
        assert_eq!(lines("route"), ["10.0.0.0/24 dev eth0 proto kernel scope link src 10.0.0.2"]);

        // What the failed request added is removed.
        let other = link("eth0", 1, &[address("10.4.0.2/24", 0)]);
        apply(&request(&[other], &[route("0.0.0.0/0", "10.4.0.1", "eth0")]), &mut last);
        assert_eq!(
            lines("route"),
            ["default via 10.4.0.1 dev eth0", "10.4.0.0/24 dev eth0 proto kernel scope link src 10.4.0.2"]
        );
    });
}

#[test]
fn a_link_is_not_confused_with_others_that_have_its_mac_address() {
    in_namespace(&["eth0"], || {
        let mut last = Applied::default();
        apply(&request(&[link("eth0", 1, &[])], &[]), &mut last);
        // A bridge gets the address of its port.
        ip("link add br0 type bridge");
        ip("link set eth0 master br0");
        ip("link add alike address 02:00:00:00:00:01 type veth peer name alike-peer");
        apply(&request(&[link("net1", 1, &[])], &[]), &mut last);
        let net1 = &json("link show dev net1")[0];
        assert_eq!((&net1["ifindex"], &net1["master"]), (&last.network.links[0].id.index.into(), &"br0".into()));
    });
}

#[test]
fn a_spare_nic_is_out_of_sight_until_a_link_needs_it_and_again_afterwards() {
    // eth1 is there although it is spare: the kernel lacks the list of held NICs. eth2 is plugged later.
    in_namespace(&["eth0", "eth1"], || {
        let mut last = Applied::default();
        let mac = |number| vec![2, 0, 0, 0, 0, number];
        let names = || {
            let links = json("link").into_iter().map(|link| link["ifname"].as_str().unwrap().to_owned());
            let mut names: Vec<_> = links.filter(|name| !name.starts_with("peer")).collect();
            names.sort();
            names
        };
        let mut configure = |request: &ConfigureNetworkRequest| {
            for _ in 0..2 {
                let driver = Veths(&[("eth1", 2), ("eth2", 3)]);
                configure(request, &mut last, &driver).map_err(|error| Chain(&error).to_string())?;
            }
            Ok::<_, String>(())
        };
        let mut one = request(&[link("net0", 1, &[address("10.0.0.2/24", 0)])], &[]);
        one.spare_nics = vec![mac(2)];
        configure(&one).unwrap();
        assert_eq!(names(), ["lo", "net0"]);

        let net1 = NetworkLink { nic: mac(2), ..link("net1", 2, &[address("10.1.0.2/24", 0)]) };
        let mut two = request(&[one.links[0].clone(), net1.clone()], &[route("0.0.0.0/0", "10.1.0.1", "net1")]);
        two.spare_nics = vec![mac(3)];
        two.links[1].mac.clear();
        assert_eq!(configure(&two).unwrap_err(), r#"link "net1": the MAC address has not 6 bytes"#);
        assert_eq!(names(), ["lo", "net0"], "an invalid request has left a NIC");
        two.links[1] = net1;
        configure(&two).unwrap();
        assert_eq!(names(), ["lo", "net0", "net1"]);
        assert_eq!(lines("route show default"), ["default via 10.1.0.1 dev net1"]);

        let mut three = two.clone();
        three.links.push(link("net2", 3, &[address("10.2.0.2/24", 0)]));
        three.spare_nics.clear();
        configure(&three).unwrap();
        assert_eq!(lines("route show dev net2"), ["10.2.0.0/24 proto kernel scope link src 10.2.0.2"]);
        three.links.push(link("net3", 4, &[]));
        let missing = "link net3: the guest has no network device with the MAC address 02:00:00:00:00:04";
        assert_eq!(configure(&three).unwrap_err(), missing);

        one.spare_nics = vec![mac(3), mac(2)];
        configure(&one).unwrap();
        assert_eq!(names(), ["lo", "net0"]);
        one.spare_nics.push(vec![1]);
        assert_eq!(configure(&one).unwrap_err(), "spare NIC 01: the MAC address has not 6 bytes");
    });
}

#[test]
fn the_driver_is_called_only_when_a_link_lacks_its_nic() {
    in_namespace(&["eth0"], || {
        let mut last = Applied::default();
        let mut request = request(&[link("eth0", 1, &[])], &[]);
        configure(&request, &mut last, &Broken).unwrap();
        request.links.push(link("net7", 7, &[]));
        let error = configure(&request, &mut last, &Broken).unwrap_err();
        assert_eq!(Chain(&error).to_string(), "give the driver to the NICs: entity not found");
    });
}

#[test]
fn the_status_shows_what_was_configured_and_the_traffic() {
    in_namespace(&["eth0", "eth1"], || {
        let addresses = [
            address("10.0.0.2/24", NOPREFIXROUTE),
            NetworkAddress { peer: bytes("10.2.0.9"), ..address("10.2.0.1/32", 0) },
            address("fd00::2/64", NODAD),
        ];
        apply(&request(&[link("eth0", 1, &addresses)], &[route("10.0.0.0/24", "", "eth0")]), &mut Applied::default());
        let find = |name: &str| {
            let mut links = super::status::status().unwrap().into_iter();
            links.find(|link| link.link.name == name).unwrap()
        };
        // The kernel adds IFA_F_PERMANENT.
        let mut shown = find("eth0").link.unwrap();
        shown.addresses.iter_mut().for_each(|address| address.flags &= !0x80);
        assert_eq!(shown, link("eth0", 1, &addresses));
        assert!(find("eth0").carrier && !find("eth1").carrier);
        assert!(!find("eth1").link.up);

        let before = find("eth0").counters.sent_packets;
        let socket = std::net::UdpSocket::bind("10.0.0.2:0").unwrap();
        // A permanent neighbour, because nobody would reply to ARP.
        ip("neigh add 10.0.0.9 lladdr 02:00:00:00:00:09 dev eth0");
        for _ in 0..100 {
            socket.send_to(&[0; 100], "10.0.0.9:9").unwrap();
        }
        let after = find("eth0").counters;
        assert!(after.sent_packets >= before + 100 && after.sent_bytes >= 100 * 128, "{before} {after:?}");
    });
}
