//! Routes of all tables. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

use husk_protos::network::{NetworkAddress, NetworkRoute};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteLwEnCapType, RouteMessage, RouteMetric, RouteProtocol, RouteType,
    RouteVia,
};

use crate::network::error::ObjectError;

/// linux/rtnetlink.h.
const RT_TABLE_MAIN: u32 = 254;
const RT_TABLE_LOCAL: u32 = 255;
/// Metric that the kernel gives to IPv6 routes of its own (IP6_RT_PRIO_ADDRCONF).
const IPV6_KERNEL_METRIC: u32 = 256;

/// Converts routes, and orders them so that each can be added after those before it: a gateway must be reachable
/// through a route of narrower scope. `names` maps the index of a link to its name.
pub(super) fn routes(messages: &[RouteMessage], names: &HashMap<u32, &str>) -> Result<Vec<NetworkRoute>, ObjectError> {
    let converted = messages.iter().filter_map(|message| route(message, names).transpose());
    let mut routes = converted.collect::<Result<Vec<_>, _>>()?;
    // RT_SCOPE_LINK (253) before RT_SCOPE_UNIVERSE (0). All IPv6 routes have the scope 0.
    routes.sort_by_key(|route| (!route.gateway.is_empty(), std::cmp::Reverse(route.scope)));
    Ok(routes)
}

/// Whether there is the route to an address's prefix that the kernel adds with the address.
pub(super) fn has_prefix_route(routes: &[NetworkRoute], link: &str, address: &NetworkAddress) -> bool {
    let on_link = if address.peer.is_empty() { &address.local } else { &address.peer };
    let prefix = network(on_link, address.prefix_length);
    let metric = if on_link.len() == 16 { IPV6_KERNEL_METRIC } else { 0 };
    routes.iter().any(|route| {
        route.table == RT_TABLE_MAIN
            && route.protocol == u32::from(u8::from(RouteProtocol::Kernel))
            && route.link == link
            && route.destination == prefix
            && route.prefix_length == address.prefix_length
            && route.priority == metric
    })
}

/// The first `length` bits of an address, and zeros.
fn network(address: &[u8], length: u32) -> Vec<u8> {
    let mut left = length;
    let mask = |byte: &u8| {
        let bits = left.min(8);
        left -= bits;
        // Shifting an u16 by 8 is defined.
        byte & (0xff00_u16 >> bits).to_le_bytes()[0]
    };
    address.iter().map(mask).collect()
}

/// Converts a route; none if the guest's kernel makes its own.
fn route(message: &RouteMessage, names: &HashMap<u32, &str>) -> Result<Option<NetworkRoute>, ObjectError> {
    let header = &message.header;
    let mut route = NetworkRoute::new();
    route.family = u8::from(header.address_family).into();
    route.prefix_length = header.destination_prefix_length.into();
    route.table = header.table.into();
    route.scope = u8::from(header.scope).into();
    route.protocol = u8::from(header.protocol).into();
    route.kind = u8::from(header.kind).into();
    // The other flags are states, such as RTNH_F_DEAD.
    route.flags = (header.flags & RouteFlags::Onlink).bits();
    let mut output = None;
    let mut unsupported = None;
    if header.source_prefix_length != 0 {
        unsupported = Some("a source prefix");
    }
    if header.tos != 0 {
        unsupported = Some("a type of service");
    }
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = octets(address),
            RouteAttribute::Gateway(address) => route.gateway = octets(address),
            // An IPv6 gateway of an IPv4 route.
            RouteAttribute::Via(RouteVia::Inet(address)) => route.gateway = address.octets().to_vec(),
            RouteAttribute::Via(RouteVia::Inet6(address)) => route.gateway = address.octets().to_vec(),
            RouteAttribute::PrefSource(address) => route.source = octets(address),
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Oif(index) => output = Some(*index),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(mtu) => route.mtu = *mtu,
                        RouteMetric::Advmss(bytes) => route.advmss = *bytes,
                        // The others tune congestion control; the guest has defaults.
                        _ => {}
                    }
                }
            }
            RouteAttribute::MultiPath(_) => unsupported = Some("several gateways"),
            RouteAttribute::EncapType(kind) if *kind != RouteLwEnCapType::None => {
                unsupported = Some("an encapsulation")
            }
            _ => {}
        }
    }
    let link = match output {
        Some(index) => Some(*names.get(&index).ok_or_else(|| {
            ObjectError::unsupported(describe(&route), format!("leads to an unknown link (index {index})"))
        })?),
        None => None,
    };
    if is_automatic(message, &route, link) {
        return Ok(None);
    }
    if let Some(what) = unsupported {
        return Err(ObjectError::unsupported(describe(&route), format!("routes with {what} are not supported")));
    }
    // The kernel shows `dev lo` for these IPv6 routes, which have no link.
    if !matches!(header.kind, RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw) {
        route.link = link.unwrap_or_default().to_owned();
    }
    Ok(Some(route))
}

/// Whether the guest's kernel makes the route itself, or learns it.
fn is_automatic(message: &RouteMessage, route: &NetworkRoute, link: Option<&str>) -> bool {
    let header = &message.header;
    if header.flags.contains(RouteFlags::Cloned) {
        return true;
    }
    match header.protocol {
        // Router advertisements and redirects: the guest receives them from now on.
        RouteProtocol::Ra | RouteProtocol::IcmpRedirect => true,
        RouteProtocol::Kernel => {
            let link_local =
                header.address_family == AddressFamily::Inet6 && route.destination.starts_with(&[0xfe, 0x80]);
            // Entries of the table `local`, which come with addresses; fe80::/64 and ff00::/8 of each link; and ::1.
            route.table == RT_TABLE_LOCAL
                || header.kind == RouteType::Multicast
                || link_local
                || link.is_some_and(|link| link == "lo")
        }
        _ => false,
    }
}

/// A route as errors name it.
fn describe(route: &NetworkRoute) -> String {
    let address: Option<IpAddr> = match *route.destination.as_slice() {
        [a, b, c, d] => Some([a, b, c, d].into()),
        ref bytes => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    let destination = match address {
        Some(address) => format!("{address}/{}", route.prefix_length),
        None => "default".into(),
    };
    format!("route {destination} in table {}", route.table)
}

fn octets(address: &RouteAddress) -> Vec<u8> {
    match address {
        RouteAddress::Inet(address) => address.octets().to_vec(),
        RouteAddress::Inet6(address) => address.octets().to_vec(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::{RouteNextHop, RouteScope};

    use super::*;

    fn message(destination: &str, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = AddressFamily::Inet;
        header.table = 254;
        header.kind = RouteType::Unicast;
        header.protocol = RouteProtocol::Boot;
        if let Some((address, length)) = destination.split_once('/') {
            let address: IpAddr = address.parse().unwrap();
            if address.is_ipv6() {
                header.address_family = AddressFamily::Inet6;
            }
            header.destination_prefix_length = length.parse().unwrap();
            message.attributes.push(RouteAttribute::Destination(address.into()));
        }
        message.attributes.push(RouteAttribute::Oif(2));
        message.attributes.extend(attributes);
        message
    }

    fn names() -> HashMap<u32, &'static str> {
        HashMap::from([(1, "lo"), (2, "eth0")])
    }

    fn gateway(address: &str) -> RouteAttribute {
        RouteAttribute::Gateway(address.parse::<IpAddr>().unwrap().into())
    }

    #[test]
    fn every_field_is_converted() {
        let mut message = message(
            "10.1.0.0/16",
            vec![
                gateway("10.0.0.1"),
                RouteAttribute::PrefSource(RouteAddress::Inet([10, 0, 0, 2].into())),
                RouteAttribute::Priority(50),
                RouteAttribute::Table(1000),
                RouteAttribute::Metrics(vec![
                    RouteMetric::Mtu(1300),
                    RouteMetric::Advmss(1260),
                    RouteMetric::Window(9),
                ]),
            ],
        );
        message.header.flags = RouteFlags::Onlink | RouteFlags::Dead;
        let mut expected = NetworkRoute::new();
        expected.family = 2;
        expected.destination = vec![10, 1, 0, 0];
        expected.prefix_length = 16;
        expected.link = "eth0".into();
        expected.gateway = vec![10, 0, 0, 1];
        expected.source = vec![10, 0, 0, 2];
        expected.priority = 50;
        expected.table = 1000;
        expected.protocol = 3;
        expected.kind = 1;
        expected.flags = 4;
        expected.mtu = 1300;
        expected.advmss = 1260;
        assert_eq!(routes(&[message], &names()).unwrap(), [expected]);
    }

    #[test]
    fn an_ipv4_route_may_have_an_ipv6_gateway() {
        let via = RouteAttribute::Via(RouteVia::Inet6("fe80::1".parse().unwrap()));
        assert_eq!(routes(&[message("", vec![via])], &names()).unwrap()[0].gateway.len(), 16);
    }

    #[test]
    fn link_scope_comes_first() {
        let mut connected = message("10.0.0.0/24", vec![]);
        connected.header.scope = RouteScope::Link;
        let messages = [message("", vec![gateway("10.0.0.1")]), message("10.9.0.0/16", vec![]), connected];
        let lengths: Vec<_> = routes(&messages, &names()).unwrap().iter().map(|route| route.prefix_length).collect();
        assert_eq!(lengths, [24, 16, 0]);
    }

    #[test]
    fn what_the_guests_kernel_makes_is_left_out() {
        let with = |destination: &str, table: u8, protocol, kind, output| {
            let mut message = message(destination, vec![RouteAttribute::Oif(output)]);
            (message.header.table, message.header.protocol, message.header.kind) = (table, protocol, kind);
            message
        };
        use RouteProtocol::{Boot, IcmpRedirect, Kernel, Ra};
        use RouteType::{Broadcast, Local, Multicast, Unicast};
        let table = [
            (with("10.0.0.2/32", 255, Kernel, Local, 2), false),
            (with("10.0.0.255/32", 255, Kernel, Broadcast, 2), false),
            // AnyIP, added by a program.
            (with("10.7.0.0/16", 255, Boot, Local, 1), true),
            // For transparent proxies.
            (with("0.0.0.0/0", 100, Boot, Local, 1), true),
            (with("10.0.0.0/24", 254, Kernel, Unicast, 2), true),
            (with("fd00::/64", 254, Kernel, Unicast, 2), true),
            (with("fe80::/64", 254, Kernel, Unicast, 2), false),
            (with("ff00::/8", 255, Kernel, Multicast, 2), false),
            (with("::1/128", 254, Kernel, Unicast, 1), false),
            (with("fd00::/64", 254, Ra, Unicast, 2), false),
            (with("fd00::/64", 254, IcmpRedirect, Unicast, 2), false),
        ];
        for (message, expected) in table {
            assert_eq!(route(&message, &names()).unwrap().is_some(), expected, "{message:?}");
        }
    }

    #[test]
    fn unreachable_routes_have_no_link() {
        let mut message = message("fd00:1::/64", vec![RouteAttribute::Oif(1)]);
        message.header.kind = RouteType::Unreachable;
        let route = route(&message, &names()).unwrap().unwrap();
        assert_eq!((route.link.as_str(), route.kind), ("", 7));
    }

    #[test]
    fn what_husk_cannot_express_is_rejected_by_name() {
        let mut tos = message("10.0.0.0/8", vec![]);
        tos.header.tos = 8;
        let multipath = RouteAttribute::MultiPath(vec![RouteNextHop::default()]);
        let encapsulation = RouteAttribute::EncapType(RouteLwEnCapType::Mpls);
        let table = [
            (
                message("10.0.0.0/8", vec![multipath]),
                "route 10.0.0.0/8 in table 254: routes with several gateways are not",
            ),
            (
                message("fd00::/8", vec![encapsulation]),
                "route fd00::/8 in table 254: routes with an encapsulation are not",
            ),
            (tos, "route 10.0.0.0/8 in table 254: routes with a type of service are not supported"),
            (
                message("", vec![RouteAttribute::Oif(9)]),
                "route default in table 254: leads to an unknown link (index 9)",
            ),
        ];
        for (message, expected) in table {
            let error = route(&message, &names()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn networks_are_masked() {
        let address = [10, 255, 255, 255];
        for (length, expected) in
            [(0, [0, 0, 0, 0]), (8, [10, 0, 0, 0]), (12, [10, 240, 0, 0]), (31, [10, 255, 255, 254]), (32, address)]
        {
            assert_eq!(network(&address, length), expected);
        }
    }
}
