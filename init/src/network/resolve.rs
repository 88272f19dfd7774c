//! Checks a request and finds the links that it names. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_protos::mac::mac_text;
use husk_protos::network::{
    ConfigureNetworkRequest, NetworkAddress, NetworkLink, NetworkNeighbour, NetworkRoute, NetworkRule, NetworkSysctl,
};

use super::error::NetworkError;
use super::model::{
    Address, Device, Link, LinkId, Mac, Neighbour, Network, Object, Route, Rule, Sysctl, TABLE_MAIN, UNICAST,
};

/// Longest name of a link in bytes (IFNAMSIZ without the NUL).
const NAME_MAX: usize = 15;

/// The flags that a request can set (linux/if_addr.h, rtnetlink.h, fib_rules.h): NODAD, OPTIMISTIC, HOMEADDRESS,
/// MANAGETEMPADDR, NOPREFIXROUTE and MCAUTOJOIN; ONLINK; INVERT. The kernel reports others, which are states of an
/// object and would make an unchanged one look changed.
const ADDRESS_FLAGS: u32 = 0x02 | 0x04 | 0x10 | 0x100 | 0x200 | 0x400;
const ROUTE_FLAGS: u32 = 0x4;
const RULE_FLAGS: u32 = 0x2;

/// Converts a request for the guest that has `devices`.
///
/// # Errors
/// The first object that is invalid, or link without a device.
pub(super) fn resolve(request: &ConfigureNetworkRequest, devices: &[Device]) -> Result<Network, NetworkError> {
    let mut network = Network::default();
    for link in &request.links {
        network.links.push(resolve_link(link, devices, &network.links)?);
    }
    for (link, resolved) in request.links.iter().zip(&network.links) {
        for address in &link.addresses {
            network.objects.push(Object::Address(resolve_address(address, &resolved.id)?));
        }
    }
    for sysctl in &request.sysctls {
        network.sysctls.push(resolve_sysctl(sysctl, None)?);
    }
    for (link, resolved) in request.links.iter().zip(&network.links) {
        for sysctl in &link.sysctls {
            network.sysctls.push(resolve_sysctl(sysctl, Some(&resolved.id))?);
        }
    }
    let names = Names { links: &network.links, devices };
    for route in &request.routes {
        network.objects.push(Object::Route(resolve_route(route, &names)?));
    }
    for rule in &request.rules {
        network.objects.push(Object::Rule(resolve_rule(rule)?));
    }
    for neighbour in &request.neighbours {
        network.objects.push(Object::Neighbour(resolve_neighbour(neighbour, &names)?));
    }
    Ok(network)
}

fn resolve_link(link: &NetworkLink, devices: &[Device], others: &[Link]) -> Result<Link, NetworkError> {
    let object = || format!("link {:?}", link.name);
    // The kernel checks the name as well, but only for a link that gets another one.
    let valid = !link.name.is_empty() && link.name.len() <= NAME_MAX && link.name != "lo";
    if !valid {
        return Err(invalid(object(), "the name is not that of a network device"));
    }
    let mac = Mac::try_from(link.mac.as_slice()).map_err(|_| invalid(object(), "the MAC address has not 6 bytes"))?;
    let nic = match link.nic.as_slice() {
        [] => mac,
        nic => Mac::try_from(nic).map_err(|_| invalid(object(), "the NIC's MAC address has not 6 bytes"))?,
    };
    let device = find_device(devices, nic)
        .ok_or_else(|| NetworkError::NoDevice { link: link.name.clone(), mac: mac_text(&nic) })?;
    for other in others {
        if other.id.name == link.name {
            return Err(invalid(object(), "another link has the same name"));
        }
        if other.id.index == device.index {
            return Err(invalid(object(), format_args!("{} has the same NIC", other.id.name)));
        }
    }
    Ok(Link { id: LinkId { index: device.index, name: link.name.clone() }, mac, mtu: link.mtu, up: link.up })
}

/// Finds a link's NIC; none as well if the link is invalid.
pub(super) fn find_nic<'a>(link: &NetworkLink, devices: &'a [Device]) -> Option<&'a Device> {
    let nic = if link.nic.is_empty() { &link.mac } else { &link.nic };
    find_device(devices, Mac::try_from(nic.as_slice()).ok()?)
}

/// Finds a NIC by its MAC address. Without a permanent address that matches, the first link is meant: bridges, VLANs
/// and others that copy a NIC's address were created after the NIC.
pub(super) fn find_device(devices: &[Device], mac: Mac) -> Option<&Device> {
    let candidates = || devices.iter().filter(|device| !device.loopback);
    candidates().find(|device| device.permanent_mac == Some(mac)).or_else(|| {
        candidates()
            .filter(|device| device.permanent_mac.is_none() && device.mac == Some(mac))
            .min_by_key(|device| device.index)
    })
}

/// The links that routes and neighbours can name: those of the request, and others that the guest has, such as `lo`.
struct Names<'a> {
    links: &'a [Link],
    devices: &'a [Device],
}

impl Names<'_> {
    fn find(&self, name: &str, object: impl Fn() -> String) -> Result<LinkId, NetworkError> {
        if let Some(link) = self.links.iter().find(|link| link.id.name == name) {
            return Ok(link.id.clone());
        }
        let renamed = |device: &Device| self.links.iter().any(|link| link.id.index == device.index);
        match self.devices.iter().find(|device| device.name == name && !renamed(device)) {
            Some(device) => Ok(LinkId { index: device.index, name: name.to_owned() }),
            None => Err(invalid(object(), format_args!("there is no link {name:?}"))),
        }
    }
}

fn resolve_sysctl(sysctl: &NetworkSysctl, link: Option<&LinkId>) -> Result<Sysctl, NetworkError> {
    let object = || match link {
        Some(link) => format!("sysctl {} of link {}", sysctl.name, link.name),
        None => format!("sysctl {}", sysctl.name),
    };
    let valid = sysctl.name.contains('/') && sysctl.name.split('/').all(|part| !matches!(part, "" | "." | ".."));
    let Some((family, name)) = sysctl.name.split_once('/').filter(|_| valid) else {
        return Err(invalid(object(), "is not a path below /proc/sys/net"));
    };
    let path = match link {
        Some(link) => format!("{family}/conf/{}/{name}", link.name),
        None => sysctl.name.clone(),
    };
    Ok(Sysctl { link: link.cloned(), path, value: sysctl.value.clone() })
}

fn resolve_address(address: &NetworkAddress, link: &LinkId) -> Result<Address, NetworkError> {
    let object = || format!("address {}/{} on {}", address_text(&address.local), address.prefix_length, link.name);
    let local = required_ip(&address.local).ok_or_else(|| invalid(object(), "is not an IP address"))?;
    let peer = optional_ip(&address.peer).map_err(|()| invalid(object(), "the peer is not an IP address"))?;
    if peer.is_some_and(|peer| peer.is_ipv4() != local.is_ipv4()) {
        return Err(invalid(object(), "the peer is of another family"));
    }
    let broadcast = match optional_ip(&address.broadcast) {
        Ok(None) => None,
        Ok(Some(IpAddr::V4(broadcast))) if local.is_ipv4() => Some(broadcast),
        _ => return Err(invalid(object(), "the broadcast address is not an IPv4 address")),
    };
    Ok(Address {
        link: link.clone(),
        local,
        prefix_length: prefix_length(address.prefix_length, local, object)?,
        peer: peer.filter(|peer| *peer != local),
        broadcast,
        flags: address.flags & ADDRESS_FLAGS,
        scope: byte(address.scope, "scope", object)?,
    })
}

fn resolve_route(route: &NetworkRoute, names: &Names<'_>) -> Result<Route, NetworkError> {
    let object = || {
        let on = if route.link.is_empty() { String::new() } else { format!(" on {}", route.link) };
        format!("route {}/{}{on}", address_text(&route.destination), route.prefix_length)
    };
    let ipv6 = is_ipv6(route.family).ok_or_else(|| invalid(object(), "the family is not AF_INET or AF_INET6"))?;
    let any = if ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    let field = |bytes: &[u8], name: &str| {
        optional_ip(bytes).map_err(|()| invalid(object(), format_args!("the {name} is not an IP address")))
    };
    let destination = field(&route.destination, "destination")?.unwrap_or(any);
    let gateway = field(&route.gateway, "gateway")?;
    let source = field(&route.source, "source")?;
    let same_family = |address: Option<IpAddr>| address.is_none_or(|address| address.is_ipv6() == ipv6);
    if !same_family(Some(destination)) || !same_family(source) {
        return Err(invalid(object(), "the destination or the source is of another family"));
    }
    if ipv6 && !same_family(gateway) {
        return Err(invalid(object(), "an IPv6 route cannot have an IPv4 gateway"));
    }
    if route.destination.is_empty() && route.prefix_length != 0 {
        return Err(invalid(object(), "has a prefix length, but no destination"));
    }
    let link = if route.link.is_empty() { None } else { Some(names.find(&route.link, object)?) };
    Ok(Route {
        destination,
        prefix_length: prefix_length(route.prefix_length, destination, object)?,
        link,
        gateway,
        source,
        priority: route.priority,
        table: if route.table == 0 { TABLE_MAIN } else { route.table },
        scope: byte(route.scope, "scope", object)?,
        protocol: byte(route.protocol, "protocol", object)?,
        kind: if route.kind == 0 { UNICAST } else { byte(route.kind, "type", object)? },
        flags: route.flags & ROUTE_FLAGS,
        mtu: route.mtu,
        advmss: route.advmss,
    })
}

fn resolve_rule(rule: &NetworkRule) -> Result<Rule, NetworkError> {
    let object = || format!("rule {}", rule.priority);
    let ipv6 = is_ipv6(rule.family).ok_or_else(|| invalid(object(), "the family is not AF_INET or AF_INET6"))?;
    let prefix = |bytes: &[u8], length: u32, name: &str| match optional_ip(bytes) {
        Ok(None) if length == 0 => Ok(None),
        Ok(Some(address)) if address.is_ipv6() == ipv6 => Ok(Some((address, prefix_length(length, address, object)?))),
        _ => Err(invalid(object(), format_args!("the {name} is not a prefix of its family"))),
    };
    Ok(Rule {
        ipv6,
        priority: rule.priority,
        table: rule.table,
        action: byte(rule.action, "action", object)?,
        source: prefix(&rule.source, rule.source_length, "source")?,
        destination: prefix(&rule.destination, rule.destination_length, "destination")?,
        input_link: rule.input_link.clone(),
        output_link: rule.output_link.clone(),
        mark: rule.mark,
        mask: rule.mask,
        flags: rule.flags & RULE_FLAGS,
    })
}

fn resolve_neighbour(neighbour: &NetworkNeighbour, names: &Names<'_>) -> Result<Neighbour, NetworkError> {
    let object = || format!("neighbour {} on {}", address_text(&neighbour.address), neighbour.link);
    Ok(Neighbour {
        link: names.find(&neighbour.link, object)?,
        address: required_ip(&neighbour.address).ok_or_else(|| invalid(object(), "is not an IP address"))?,
        mac: Mac::try_from(neighbour.mac.as_slice())
            .map_err(|_| invalid(object(), "the MAC address has not 6 bytes"))?,
    })
}

fn invalid(object: String, problem: impl ToString) -> NetworkError {
    NetworkError::Invalid { object, problem: problem.to_string() }
}

fn is_ipv6(family: u32) -> Option<bool> {
    match i32::try_from(family).ok()? {
        libc::AF_INET => Some(false),
        libc::AF_INET6 => Some(true),
        _ => None,
    }
}

fn required_ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(bytes));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

fn optional_ip(bytes: &[u8]) -> Result<Option<IpAddr>, ()> {
    if bytes.is_empty() { Ok(None) } else { required_ip(bytes).map(Some).ok_or(()) }
}

fn address_text(bytes: &[u8]) -> String {
    match optional_ip(bytes) {
        Ok(Some(address)) => address.to_string(),
        Ok(None) => "default".into(),
        Err(()) => format!("{bytes:?}"),
    }
}

fn prefix_length(length: u32, address: IpAddr, object: impl Fn() -> String) -> Result<u8, NetworkError> {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    if length > bits {
        return Err(invalid(object(), format_args!("the prefix length exceeds {bits}")));
    }
    byte(length, "prefix length", object)
}

fn byte(value: u32, name: &str, object: impl Fn() -> String) -> Result<u8, NetworkError> {
    u8::try_from(value).map_err(|_| invalid(object(), format_args!("the {name} {value} exceeds 255")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETH0: Mac = [2, 0, 0, 0, 0, 1];

    fn device(index: u32, name: &str, mac: Mac, permanent_mac: Option<Mac>) -> Device {
        Device { index, name: name.into(), mac: Some(mac), permanent_mac, ..Default::default() }
    }

    fn link(name: &str, mac: &[u8]) -> NetworkLink {
        NetworkLink { name: name.into(), mac: mac.to_vec(), up: true, ..Default::default() }
    }

    fn route() -> NetworkRoute {
        NetworkRoute {
            family: libc::AF_INET as u32,
            destination: vec![10, 1, 0, 0],
            prefix_length: 16,
            link: "eth0".into(),
            ..Default::default()
        }
    }

    fn address() -> NetworkAddress {
        NetworkAddress { local: vec![10, 1, 0, 2], prefix_length: 16, ..Default::default() }
    }

    fn rule() -> NetworkRule {
        NetworkRule { family: libc::AF_INET6 as u32, priority: 5, ..Default::default() }
    }

    fn neighbour() -> NetworkNeighbour {
        NetworkNeighbour {
            link: "eth0".into(),
            address: vec![10, 1, 0, 9],
            mac: vec![2, 0, 0, 0, 0, 9],
            ..Default::default()
        }
    }

    fn sysctl(name: &str) -> NetworkSysctl {
        NetworkSysctl { name: name.into(), value: "1".into(), ..Default::default() }
    }

    /// A valid request with an object of each kind.
    fn request() -> ConfigureNetworkRequest {
        ConfigureNetworkRequest {
            links: vec![NetworkLink { addresses: vec![address()], ..link("eth0", &ETH0) }],
            routes: vec![route()],
            rules: vec![rule()],
            neighbours: vec![neighbour()],
            ..Default::default()
        }
    }

    #[test]
    fn a_device_is_found_by_its_permanent_mac_address_or_by_that_of_the_oldest_link() {
        let other = [2, 0, 0, 0, 0, 7];
        let loopback = Device { loopback: true, ..device(1, "lo", [0; 6], None) };
        let table: [(&str, Vec<Device>, Mac, Option<u32>); 6] = [
            ("the only one", vec![loopback.clone(), device(2, "a", ETH0, None)], ETH0, Some(2)),
            // Bridges and VLANs copy the address of a device.
            ("the oldest", vec![device(4, "br0", ETH0, None), device(3, "a", ETH0, None)], ETH0, Some(3)),
            ("hardware", vec![device(2, "br0", ETH0, None), device(3, "a", ETH0, Some(ETH0))], ETH0, Some(3)),
            // A container has changed the address.
            ("changed", vec![device(2, "a", other, Some(ETH0)), device(3, "b", ETH0, Some(other))], ETH0, Some(2)),
            ("none", vec![device(2, "a", other, None)], ETH0, None),
            ("loopback", vec![loopback], [0; 6], None),
        ];
        for (case, devices, mac, expected) in table {
            assert_eq!(find_device(&devices, mac).map(|device| device.index), expected, "{case}");
        }
    }

    #[test]
    fn an_invalid_object_is_named_with_its_problem() {
        type Change = fn(&mut ConfigureNetworkRequest);
        let table: [(Change, &str); 24] = [
            (|r| r.sysctls.push(sysctl("../kernel/x")), "sysctl ../kernel/x: is not a path below /proc/sys/net"),
            (|r| r.links[0].sysctls.push(sysctl("x")), "sysctl x of link eth0: is not a path below /proc/sys/net"),
            (|r| r.links[0].name.clear(), r#"link "": the name is not that of a network device"#),
            (|r| r.links[0].name = "a".repeat(16), r#"link "aaaaaaaaaaaaaaaa": the name is not that"#),
            (|r| r.links[0].name = "lo".into(), r#"link "lo": the name is not that of a network device"#),
            (|r| r.links[0].mac = vec![1], r#"link "eth0": the MAC address has not 6 bytes"#),
            (
                |r| r.links[0].mac[5] = 0xaf,
                "link eth0: the guest has no network device with the MAC address 02:00:00:00:00:af",
            ),
            (|r| r.links.push(link("eth0", &[2, 0, 0, 0, 0, 2])), r#"link "eth0": another link has the same name"#),
            (|r| r.links.push(link("eth1", &ETH0)), r#"link "eth1": eth0 has the same NIC"#),
            (|r| r.links[0].nic = vec![1], r#"link "eth0": the NIC's MAC address has not 6 bytes"#),
            (|r| r.links[0].addresses[0].local = vec![1, 2], "address [1, 2]/16 on eth0: is not an IP address"),
            (
                |r| r.links[0].addresses[0].prefix_length = 33,
                "address 10.1.0.2/33 on eth0: the prefix length exceeds 32",
            ),
            (
                |r| r.links[0].addresses[0].peer = vec![0; 16],
                "address 10.1.0.2/16 on eth0: the peer is of another family",
            ),
            (
                |r| r.links[0].addresses[0].broadcast = vec![0; 16],
                "address 10.1.0.2/16 on eth0: the broadcast address is not an IPv4 address",
            ),
            (|r| r.links[0].addresses[0].scope = 256, "address 10.1.0.2/16 on eth0: the scope 256 exceeds 255"),
            (|r| r.routes[0].family = 1, "route 10.1.0.0/16 on eth0: the family is not AF_INET or AF_INET6"),
            (|r| r.routes[0].destination.clear(), "route default/16 on eth0: has a prefix length, but no destination"),
            (|r| r.routes[0].source = vec![0; 16], "route 10.1.0.0/16 on eth0: the destination or the source is of"),
            (|r| r.routes[0].gateway = vec![0], "route 10.1.0.0/16 on eth0: the gateway is not an IP address"),
            (|r| r.routes[0].link = "eth9".into(), r#"route 10.1.0.0/16 on eth9: there is no link "eth9""#),
            (|r| r.routes[0].kind = 300, "route 10.1.0.0/16 on eth0: the type 300 exceeds 255"),
            (|r| r.rules[0].source_length = 8, "rule 5: the source is not a prefix of its family"),
            (|r| r.rules[0].destination = vec![10, 0, 0, 1], "rule 5: the destination is not a prefix of its family"),
            (|r| r.neighbours[0].mac.clear(), "neighbour 10.1.0.9 on eth0: the MAC address has not 6 bytes"),
        ];
        let devices = [device(2, "eth0", ETH0, None), device(3, "eth1", [2, 0, 0, 0, 0, 2], None)];
        assert!(resolve(&request(), &devices).is_ok());
        for (change, expected) in table {
            let mut request = request();
            change(&mut request);
            let error = resolve(&request, &devices).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error:?} instead of {expected:?}");
        }
    }

    #[test]
    fn names_are_those_that_the_links_get() {
        let devices = [device(2, "eth1", ETH0, None), device(3, "eth0", [2, 0, 0, 0, 0, 2], None)];
        let links = [Link { id: LinkId { index: 2, name: "eth0".into() }, mac: ETH0, mtu: 0, up: true }];
        let names = Names { links: &links, devices: &devices };
        let find = |name: &str| names.find(name, String::new).ok().map(|link| link.index);
        assert_eq!([find("eth0"), find("eth1"), find("eth2")], [Some(2), None, None]);
    }

    #[test]
    fn states_that_the_kernel_reports_as_flags_are_no_difference() {
        let devices = [device(2, "eth0", ETH0, None)];
        let (mut tentative, mut link_down) = (request(), request());
        // IFA_F_TENTATIVE and IFA_F_PERMANENT; RTNH_F_LINKDOWN.
        tentative.links[0].addresses[0].flags = 0x40 | 0x80;
        link_down.routes[0].flags = 0x10;
        let expected = resolve(&request(), &devices).unwrap();
        for request in [tentative, link_down] {
            assert_eq!(resolve(&request, &devices).unwrap(), expected);
        }
        let mut onlink = request();
        onlink.routes[0].flags = 0x4;
        assert_ne!(resolve(&onlink, &devices).unwrap(), expected);
    }
}
