//! Which changes turn the guest's network into the requested one, and in which order. Pure.

use std::fmt::{self, Display, Formatter};

use husk_protos::mac::mac_text;

use super::model::{Applied, Device, Link, LinkId, Mac, Network, Object, Route, Sysctl, UNICAST};

/// A link with a smaller MTU has no IPv6 (RFC 8200, section 5).
const IPV6_MIN_MTU: u32 = 1280;

/// One request to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Rename {
        index: u32,
        from: String,
        to: String,
    },
    SetMac {
        link: LinkId,
        mac: Mac,
    },
    SetMtu {
        link: LinkId,
        mtu: u32,
    },
    /// Keeps the kernel from adding a link-local address when the link comes up: the request contains the host's.
    NoLinkLocal(LinkId),
    SetSysctl(Sysctl),
    Up(LinkId),
    /// Makes the kernel report the carrier of a link that has come up. By itself, the kernel does so up to a second
    /// later, and programs ignore a link without IFF_RUNNING meanwhile.
    ReportCarrier(LinkId),
    Down(LinkId),
    Add(Object),
    Remove(Object),
}

impl Display for Change {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rename { from, to, .. } => write!(f, "rename link {from} to {to}"),
            Self::SetMac { link, mac } => write!(f, "set the MAC address of link {} to {}", link.name, mac_text(mac)),
            Self::SetMtu { link, mtu } => write!(f, "set the MTU of link {} to {mtu}", link.name),
            Self::NoLinkLocal(link) => write!(f, "set the address generation mode of link {}", link.name),
            Self::SetSysctl(sysctl) => write!(f, "set the sysctl net/{} to {:?}", sysctl.path, sysctl.value),
            Self::Up(link) => write!(f, "bring up link {}", link.name),
            Self::ReportCarrier(link) => write!(f, "read the carrier of link {}", link.name),
            Self::Down(link) => write!(f, "take down link {}", link.name),
            Self::Add(object) => write!(f, "add {object}"),
            Self::Remove(object) => write!(f, "remove {object}"),
        }
    }
}

/// Lists the changes from what earlier requests left to `next`, for the links that the guest has.
///
/// Objects that exist already are not added again, unless the kernel may have removed them. So a change on the host
/// does not bring back what a container has removed, as a VPN's container does with the default route.
pub(super) fn plan(devices: &[Device], last: &Applied, next: &Network) -> Vec<Change> {
    let mut changes = removals(devices, &last.network, next);
    changes.extend(renames(devices, &next.links));
    let with_device = || {
        next.links
            .iter()
            .filter_map(|link| devices.iter().find(|device| device.index == link.id.index).map(|device| (link, device)))
    };
    for (link, device) in with_device() {
        if device.mac != Some(link.mac) && !has_had(last, link) {
            changes.push(Change::SetMac { link: link.id.clone(), mac: link.mac });
        }
        if link.mtu != 0 && link.mtu != device.mtu {
            changes.push(Change::SetMtu { link: link.id.clone(), mtu: link.mtu });
        }
        if link.up && !device.up {
            changes.push(Change::NoLinkLocal(link.id.clone()));
        }
    }
    // disable_ipv6 and others decide about the addresses.
    let is_set = |sysctl: &&Sysctl| last.complete && last.network.sysctls.contains(sysctl);
    // The kernel applies some of the namespace's to every link. The links' own count, so they follow once more.
    let namespace_changes = next.sysctls.iter().any(|sysctl| sysctl.link.is_none() && !is_set(&sysctl));
    let has_to_be_set = |sysctl: &&Sysctl| !is_set(sysctl) || namespace_changes && sysctl.link.is_some();
    changes.extend(next.sysctls.iter().filter(has_to_be_set).cloned().map(Change::SetSysctl));
    let emptied = emptied(&changes, with_device());
    let exists = |object: &Object| {
        let lost = object.link().is_some_and(|link| emptied.contains(link));
        last.complete && !lost && last.network.objects.contains(object)
    };
    let overtaken = overtaken(&last.network.objects, &next.objects);
    let mut objects: Vec<_> =
        next.objects.iter().filter(|object| !exists(object) || overtaken.contains(object)).collect();
    objects.sort_by_key(|object| rank(object));
    let first_route = objects.partition_point(|object| rank(object) == Rank::Address);
    changes.extend(objects[..first_route].iter().map(|object| Change::Add((*object).clone())));
    for (link, device) in with_device() {
        match (link.up, device.up) {
            (true, false) => {
                changes.extend([Change::Up(link.id.clone()), Change::ReportCarrier(link.id.clone())]);
            }
            (false, true) => changes.push(Change::Down(link.id.clone())),
            _ => {}
        }
    }
    for object in &objects[first_route..] {
        if exists(object) {
            changes.push(Change::Remove((*object).clone()));
        }
        changes.push(Change::Add((*object).clone()));
    }
    changes
}

/// The routes of `last` that come after one that is new or was behind them. Of the IPv4 routes with the same destination
/// and metric, the kernel uses the first, and a new one becomes the last. When a container joins a second network, the
/// host has its default route before that of the first network.
fn overtaken<'a>(last: &[Object], next: &'a [Object]) -> Vec<&'a Object> {
    let is_behind = |index: usize, object: &Object| {
        let Some(place) = last.iter().position(|other| other == object) else { return false };
        let stays_ahead = |rival: &Object| last[..place].contains(rival);
        next[..index].iter().any(|rival| compete(rival, object) && !stays_ahead(rival))
    };
    next.iter().enumerate().filter(|(index, object)| is_behind(*index, object)).map(|(_, object)| object).collect()
}

fn compete(one: &Object, other: &Object) -> bool {
    let (Object::Route(one), Object::Route(other)) = (one, other) else { return false };
    let key = |route: &Route| (route.destination, route.prefix_length, route.table, route.priority);
    one.destination.is_ipv4() && key(one) == key(other)
}

/// Whether the link got its MAC address from an earlier request. A container may have set another one since, which
/// stays until the host's changes.
fn has_had(last: &Applied, link: &Link) -> bool {
    last.complete && last.network.links.iter().any(|other| other.id == link.id && other.mac == link.mac)
}

/// Removes what `next` does not list any more, and takes down its links.
fn removals(devices: &[Device], last: &Network, next: &Network) -> Vec<Change> {
    let mut removed: Vec<_> = last.objects.iter().filter(|object| !next.objects.contains(object)).collect();
    removed.sort_by_key(|object| rank(object));
    // Backwards within a rank as well: removing a primary IPv4 address removes the secondary ones after it.
    let removed = removed.into_iter().rev().cloned().map(Change::Remove);
    let dropped = last.links.iter().filter(|link| next.links.iter().all(|other| other.id != link.id));
    let is_up = |link: &&Link| devices.iter().any(|device| device.index == link.id.index && device.up);
    removed.chain(dropped.filter(is_up).map(|link| Change::Down(link.id.clone()))).collect()
}

/// The links on which the kernel may have removed objects, or will while it makes `changes`: when a link was down, or
/// too small for IPv6, and when an address is removed, with the secondary addresses and the routes that depend on it.
fn emptied<'a>(changes: &[Change], links: impl Iterator<Item = (&'a Link, &'a Device)>) -> Vec<LinkId> {
    let mut emptied: Vec<_> = links
        .filter(|(link, device)| (link.up && !device.up) || device.mtu < IPV6_MIN_MTU)
        .map(|(link, _)| link.id.clone())
        .collect();
    emptied.extend(changes.iter().filter_map(|change| match change {
        Change::Remove(Object::Address(address)) => Some(address.link.clone()),
        _ => None,
    }));
    emptied
}

/// What an object depends on has a lower rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Address,
    /// A route to addresses on the link, through which the kernel must be able to reach the gateways of other routes.
    LinkRoute,
    Route,
    Rule,
    Neighbour,
}

fn rank(object: &Object) -> Rank {
    match object {
        Object::Address(_) => Rank::Address,
        Object::Route(route) if route.kind == UNICAST && route.gateway.is_none() => Rank::LinkRoute,
        Object::Route(_) => Rank::Route,
        Object::Rule(_) => Rank::Rule,
        Object::Neighbour(_) => Rank::Neighbour,
    }
}

/// A name that no other link has.
fn temporary_name(index: u32) -> String {
    format!("husk{index}")
}

/// Renames the links. A link that has the name of another one gets a temporary name first, which it keeps if it has no
/// other.
fn renames(devices: &[Device], links: &[Link]) -> Vec<Change> {
    let temporary = |device: &Device| temporary_name(device.index);
    let rename = |device: &Device, from: &str, to: &str| Change::Rename {
        index: device.index,
        from: from.to_owned(),
        to: to.to_owned(),
    };
    let is_in_the_way =
        |device: &Device| links.iter().any(|link| link.id.name == device.name && link.id.index != device.index);

    let mut changes: Vec<_> = devices
        .iter()
        .filter(|device| is_in_the_way(device))
        .map(|device| rename(device, &device.name, &temporary(device)))
        .collect();
    for link in links {
        let Some(device) = devices.iter().find(|device| device.index == link.id.index) else { continue };
        let current = if is_in_the_way(device) { temporary(device) } else { device.name.clone() };
        if current != link.id.name {
            changes.push(rename(device, &current, &link.id.name));
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::super::model::{Address, Neighbour, Rule, TABLE_MAIN};
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn device(index: u32, name: &str) -> Device {
        Device { index, name: name.into(), mac: Some(MAC), mtu: 1500, ..Default::default() }
    }

    fn link(index: u32, name: &str) -> Link {
        Link { id: LinkId { index, name: name.into() }, mac: MAC, mtu: 1500, up: true }
    }

    fn address(index: u32, local: &str) -> Object {
        Object::Address(Address {
            link: link(index, "eth0").id,
            local: local.parse().unwrap(),
            prefix_length: 24,
            peer: None,
            broadcast: None,
            flags: 0,
            scope: 0,
        })
    }

    fn route(destination: &str, gateway: Option<&str>) -> Object {
        Object::Route(Route {
            destination: destination.parse().unwrap(),
            prefix_length: if destination == "0.0.0.0" { 0 } else { 24 },
            link: Some(link(2, "eth0").id),
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            source: None,
            priority: 0,
            table: TABLE_MAIN,
            scope: 0,
            protocol: 0,
            kind: UNICAST,
            flags: 0,
            mtu: 0,
            advmss: 0,
        })
    }

    fn unreachable(destination: &str) -> Object {
        let Object::Route(route) = route(destination, None) else { panic!("not a route") };
        // RTN_UNREACHABLE.
        Object::Route(Route { link: None, kind: 7, ..route })
    }

    fn rule(priority: u32) -> Object {
        Object::Rule(Rule {
            ipv6: false,
            priority,
            table: 100,
            action: 1,
            source: Some((IpAddr::from([10, 0, 0, 2]), 32)),
            destination: None,
            input_link: String::new(),
            output_link: "eth0".into(),
            mark: 0,
            mask: 0,
            flags: 0,
        })
    }

    fn neighbour() -> Object {
        Object::Neighbour(Neighbour {
            link: link(2, "eth0").id,
            address: IpAddr::from([10, 0, 0, 9]),
            mac: [2, 0, 0, 0, 0, 9],
        })
    }

    fn text(changes: &[Change]) -> Vec<String> {
        changes.iter().map(Change::to_string).collect()
    }

    #[test]
    fn links_are_renamed_even_if_they_swap_their_names() {
        type Names = &'static [(u32, &'static str)];
        let table: [(Names, Names, &[&str]); 6] = [
            (&[(2, "eth0")], &[(2, "eth0")], &[]),
            (&[(2, "eth0")], &[(2, "net1")], &["eth0 to net1"]),
            (
                &[(2, "eth0"), (3, "eth1")],
                &[(2, "eth1"), (3, "eth0")],
                &["eth0 to husk2", "eth1 to husk3", "husk2 to eth1", "husk3 to eth0"],
            ),
            // A cycle of three, and one that stays.
            (
                &[(2, "eth0"), (3, "eth1"), (4, "eth2"), (5, "eth3")],
                &[(2, "eth1"), (3, "eth2"), (4, "eth0"), (5, "eth3")],
                &["eth0 to husk2", "eth1 to husk3", "eth2 to husk4", "husk2 to eth1", "husk3 to eth2", "husk4 to eth0"],
            ),
            // eth0 is a spare NIC, which the request does not list.
            (&[(2, "eth0"), (3, "eth1")], &[(3, "eth0")], &["eth0 to husk2", "eth1 to eth0"]),
            // A later request that lists it.
            (&[(2, "husk2"), (3, "eth0")], &[(3, "eth0"), (2, "eth1")], &["husk2 to eth1"]),
        ];
        for (before, after, expected) in table {
            let devices: Vec<_> = before.iter().map(|(index, name)| device(*index, name)).collect();
            let links: Vec<_> = after.iter().map(|(index, name)| link(*index, name)).collect();
            let expected: Vec<_> = expected.iter().map(|change| format!("rename link {change}")).collect();
            assert_eq!(text(&renames(&devices, &links)), expected, "{before:?} to {after:?}");
        }
    }

    #[test]
    fn every_change_finds_what_it_depends_on() {
        let next = Network {
            links: vec![Link { mtu: 1400, ..link(2, "eth0") }],
            // The other way round than needed.
            objects: vec![
                neighbour(),
                rule(7),
                unreachable("10.9.0.0"),
                route("0.0.0.0", Some("10.0.0.1")),
                route("10.0.0.0", None),
                address(2, "10.0.0.2"),
                address(2, "10.0.0.3"),
            ],
            ..Default::default()
        };
        let added = text(&plan(&[device(2, "eth5")], &Applied::default(), &next));
        let expected = [
            "rename link eth5 to eth0",
            "set the MTU of link eth0 to 1400",
            "set the address generation mode of link eth0",
            "add address 10.0.0.2/24 on eth0",
            "add address 10.0.0.3/24 on eth0",
            "bring up link eth0",
            "read the carrier of link eth0",
            "add route 10.0.0.0/24 on eth0",
            "add route 10.9.0.0/24",
            "add route 0.0.0.0/0 via 10.0.0.1 on eth0",
            "add IPv4 rule 7 from 10.0.0.2/32 oif eth0 table 100",
            "add neighbour 10.0.0.9 (02:00:00:00:00:09) on eth0",
        ];
        assert_eq!(added, expected);

        let up = Device { up: true, mtu: 1400, ..device(2, "eth0") };
        let removed = text(&plan(&[up], &Applied::complete(next), &Network::default()));
        let expected = [
            "remove neighbour 10.0.0.9 (02:00:00:00:00:09) on eth0",
            "remove IPv4 rule 7 from 10.0.0.2/32 oif eth0 table 100",
            "remove route 0.0.0.0/0 via 10.0.0.1 on eth0",
            "remove route 10.9.0.0/24",
            "remove route 10.0.0.0/24 on eth0",
            "remove address 10.0.0.3/24 on eth0",
            "remove address 10.0.0.2/24 on eth0",
            "take down link eth0",
        ];
        assert_eq!(removed, expected);
    }

    #[test]
    fn only_what_differs_between_two_requests_is_changed() {
        let device = || Device { up: true, ..device(2, "eth0") };
        let network = |objects: &[Object]| Network {
            links: vec![link(2, "eth0")],
            objects: objects.to_vec(),
            ..Default::default()
        };
        let base = [address(2, "10.0.0.2"), route("10.0.0.0", None)];
        let via = |gateway| [base[0].clone(), base[1].clone(), route("0.0.0.0", Some(gateway))];
        let last = || Applied::complete(network(&via("10.0.0.1")));
        let changes = |device: Device, last: &Applied, next: &Network| text(&plan(&[device], last, next));

        assert_eq!(changes(device(), &last(), &network(&via("10.0.0.1"))), [""; 0]);
        assert_eq!(
            changes(device(), &last(), &network(&via("10.0.0.254"))),
            ["remove route 0.0.0.0/0 via 10.0.0.1 on eth0", "add route 0.0.0.0/0 via 10.0.0.254 on eth0"]
        );
        // A renamed link keeps what it has.
        let renamed = Network { links: vec![link(2, "net1")], ..network(&via("10.0.0.1")) };
        assert_eq!(changes(device(), &last(), &renamed), ["rename link eth0 to net1"]);
        // The routes vanish with the address.
        let mut moved = via("10.0.0.1");
        moved[0] = address(2, "10.0.0.3");
        assert_eq!(
            changes(device(), &last(), &network(&moved)),
            [
                "remove address 10.0.0.2/24 on eth0",
                "add address 10.0.0.3/24 on eth0",
                "add route 10.0.0.0/24 on eth0",
                "add route 0.0.0.0/0 via 10.0.0.1 on eth0"
            ]
        );
    }

    #[test]
    fn routes_that_compete_keep_the_hosts_order() {
        let device = || Device { up: true, ..device(2, "eth0") };
        let network = |gateways: &[&str]| Network {
            links: vec![link(2, "eth0")],
            objects: gateways.iter().map(|gateway| route("0.0.0.0", Some(gateway))).collect(),
            ..Default::default()
        };
        let (a, b, c) = ("10.0.0.1", "10.0.0.2", "10.0.0.3");
        let table: [(&[&str], &[&str], &[&str]); 5] = [
            (&[a], &[a, b], &["add b"]),
            (&[a], &[b, a], &["add b", "remove a", "add a"]),
            (&[a, b], &[b, a], &["remove a", "add a"]),
            (&[a, b], &[a, c, b], &["add c", "remove b", "add b"]),
            (&[a, b], &[b], &["remove a"]),
        ];
        for (last, next, expected) in table {
            let changes = text(&plan(&[device()], &Applied::complete(network(last)), &network(next)));
            let named = |name: &str| match name {
                "a" => a,
                "b" => b,
                _ => c,
            };
            let expected: Vec<String> = expected
                .iter()
                .filter_map(|change| change.split_once(' '))
                .map(|(verb, name)| format!("{verb} route 0.0.0.0/0 via {} on eth0", named(name)))
                .collect();
            assert_eq!(changes, expected, "{last:?} to {next:?}");
        }
    }

    #[test]
    fn what_the_kernel_may_have_removed_is_added_again() {
        let objects = vec![address(2, "10.0.0.2"), route("10.0.0.0", None), rule(5), unreachable("10.9.0.0")];
        let next = || Network { links: vec![link(2, "eth0")], objects: objects.clone(), ..Default::default() };
        let up = Device { up: true, ..device(2, "eth0") };
        let added = |device: &Device, last: &Applied| -> Vec<String> {
            let changes = text(&plan(std::slice::from_ref(device), last, &next()));
            changes.into_iter().filter_map(|change| change.strip_prefix("add ").map(str::to_owned)).collect()
        };
        let on_link = ["address 10.0.0.2/24 on eth0", "route 10.0.0.0/24 on eth0"];
        let complete = Applied::complete(next());
        assert_eq!(added(&up, &complete), [""; 0]);
        assert_eq!(added(&Device { up: false, ..up.clone() }, &complete), on_link);
        assert_eq!(added(&Device { mtu: 1200, ..up.clone() }, &complete), on_link);
        assert_eq!(added(&up, &Applied::default().incomplete(next())).len(), objects.len());
    }

    #[test]
    fn a_mac_that_a_container_has_set_stays_until_the_hosts_changes() {
        let link = |last: u8| Link { mac: [2, 0, 0, 0, 0, last], ..link(2, "eth0") };
        let network = |last| Network { links: vec![link(last)], objects: vec![], ..Default::default() };
        let device = |last| Device { up: true, mac: Some([2, 0, 0, 0, 0, last]), ..device(2, "eth0") };
        let set = |last| format!("set the MAC address of link eth0 to 02:00:00:00:00:0{last}");
        let table = [
            (Applied::default(), 1, 1, None),
            (Applied::default(), 7, 1, Some(set(1))),
            (Applied::complete(network(1)), 7, 1, None),
            (Applied::complete(network(1)), 7, 3, Some(set(3))),
            (Applied::default().incomplete(network(1)), 7, 1, Some(set(1))),
        ];
        for (last, current, wanted, expected) in table {
            let changes = text(&plan(&[device(current)], &last, &network(wanted)));
            assert_eq!(changes, expected.into_iter().collect::<Vec<_>>(), "{last:?} {current} {wanted}");
        }
    }

    #[test]
    fn links_change_their_state_only_when_it_differs() {
        let table = [
            (
                true,
                false,
                vec![
                    "set the address generation mode of link eth0",
                    "bring up link eth0",
                    "read the carrier of link eth0",
                ],
            ),
            (true, true, vec![]),
            (false, true, vec!["take down link eth0"]),
            (false, false, vec![]),
        ];
        for (wanted, current, expected) in table {
            let next =
                Network { links: vec![Link { up: wanted, ..link(2, "eth0") }], objects: vec![], ..Default::default() };
            let device = Device { up: current, ..device(2, "eth0") };
            assert_eq!(text(&plan(&[device], &Applied::default(), &next)), expected, "{wanted} {current}");
        }
        let gone = Applied::complete(Network { links: vec![link(9, "eth9")], objects: vec![], ..Default::default() });
        assert_eq!(plan(&[device(2, "eth0")], &gone, &Network::default()), [], "a removed device");
    }

    #[test]
    fn after_a_failure_everything_that_may_exist_is_remembered() {
        let last = Applied::complete(Network {
            links: vec![link(2, "eth0")],
            objects: vec![address(2, "10.0.0.2"), address(2, "10.0.0.3")],
            ..Default::default()
        });
        let next = Network {
            links: vec![link(2, "net1"), link(3, "eth1")],
            objects: vec![address(2, "10.0.0.3"), address(3, "10.1.0.2")],
            ..Default::default()
        };
        let merged = last.incomplete(next.clone());
        assert!(!merged.complete);
        assert_eq!(merged.network.links, next.links);
        assert_eq!(merged.network.objects, [address(2, "10.0.0.2"), address(2, "10.0.0.3"), address(3, "10.1.0.2")]);
    }
}
