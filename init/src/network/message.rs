//! Encodes changes as rtnetlink messages, and decodes links.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteVia};
use netlink_packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::model::{Address, Device, Mac, Neighbour, Object, Route, Rule};
use super::plan::Change;

/// Encodes a change, and returns the flags that its message needs; none for a sysctl, which is a file.
pub(super) fn encode(change: &Change) -> Option<(RouteNetlinkMessage, u16)> {
    let message = match change {
        Change::SetSysctl(_) => return None,
        Change::Rename { index, to, .. } => (set_link(*index, [LinkAttribute::IfName(to.clone())]), 0),
        Change::SetMac { link, mac } => (set_link(link.index, [LinkAttribute::Address(mac.to_vec())]), 0),
        Change::SetMtu { link, mtu } => (set_link(link.index, [LinkAttribute::Mtu(*mtu)]), 0),
        Change::NoLinkLocal(link) => {
            let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
            (set_link(link.index, [LinkAttribute::AfSpecUnspec(vec![mode])]), 0)
        }
        Change::Up(link) => (set_state(link.index, LinkFlags::Up), 0),
        // The answer of the kernel (rtnl_getlink() in net/core/rtnetlink.c) includes what is pending about the carrier.
        Change::ReportCarrier(link) => (get_link(link.index), 0),
        Change::Down(link) => (set_state(link.index, LinkFlags::empty()), 0),
        Change::Add(object) => match object {
            Object::Address(address) => {
                (RouteNetlinkMessage::NewAddress(encode_address(address)), NLM_F_CREATE | NLM_F_EXCL)
            }
            // Routes to one destination through several gateways are several objects. EXCL would reject the second one;
            // an identical route is rejected without it too.
            Object::Route(route) => (RouteNetlinkMessage::NewRoute(encode_route(route)), NLM_F_CREATE | NLM_F_APPEND),
            Object::Rule(rule) => (RouteNetlinkMessage::NewRule(encode_rule(rule)), NLM_F_CREATE | NLM_F_EXCL),
            Object::Neighbour(neighbour) => {
                let message = RouteNetlinkMessage::NewNeighbour(encode_neighbour(neighbour));
                (message, NLM_F_CREATE | NLM_F_REPLACE)
            }
        },
        Change::Remove(object) => {
            let message = match object {
                Object::Address(address) => RouteNetlinkMessage::DelAddress(encode_address(address)),
                Object::Route(route) => RouteNetlinkMessage::DelRoute(encode_route(route)),
                Object::Rule(rule) => RouteNetlinkMessage::DelRule(encode_rule(rule)),
                Object::Neighbour(neighbour) => RouteNetlinkMessage::DelNeighbour(encode_neighbour(neighbour)),
            };
            (message, 0)
        }
    };
    Some(message)
}

/// The message that lists the links, without their counters.
pub(super) fn list_links() -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

/// The message that lists the links with their counters.
pub(super) fn list_counters() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetLink(LinkMessage::default())
}

/// The message that lists the addresses of all links.
pub(super) fn list_addresses() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

/// Decodes an element of the list of links.
pub(super) fn decode_device(message: RouteNetlinkMessage) -> Option<Device> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let flags = message.header.flags;
    let mut device = Device {
        index: message.header.index,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        ..Default::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::Address(mac) => device.mac = Mac::try_from(mac).ok(),
            LinkAttribute::PermAddress(mac) => device.permanent_mac = Mac::try_from(mac).ok(),
            LinkAttribute::Mtu(mtu) => device.mtu = mtu,
            _ => {}
        }
    }
    Some(device)
}

fn get_link(index: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

fn set_link(index: u32, attributes: impl Into<Vec<LinkAttribute>>) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes.into();
    RouteNetlinkMessage::SetLink(message)
}

fn set_state(index: u32, state: LinkFlags) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = state;
    message.header.change_mask = LinkFlags::Up;
    RouteNetlinkMessage::SetLink(message)
}

fn encode_address(address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.local.is_ipv6());
    message.header.prefix_len = address.prefix_length;
    message.header.scope = address.scope.into();
    message.header.index = address.link.index;
    // The header has room for the first eight flags only. The kernel prefers the attribute.
    message.header.flags = AddressHeaderFlags::from_bits_retain(address.flags as u8);
    message.attributes = vec![
        AddressAttribute::Local(address.local),
        AddressAttribute::Address(address.peer.unwrap_or(address.local)),
        AddressAttribute::Flags(AddressFlags::from_bits_retain(address.flags)),
    ];
    message.attributes.extend(address.broadcast.map(AddressAttribute::Broadcast));
    message
}

fn encode_route(route: &Route) -> RouteMessage {
    let ipv6 = route.destination.is_ipv6();
    let mut message = RouteMessage::default();
    message.header.address_family = family(ipv6);
    message.header.destination_prefix_length = route.prefix_length;
    // The header has room for the tables below 256 only. The kernel prefers the attribute.
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.protocol = route.protocol.into();
    message.header.scope = route.scope.into();
    message.header.kind = route.kind.into();
    message.header.flags = RouteFlags::from_bits_retain(route.flags);
    message.attributes.push(RouteAttribute::Table(route.table));
    if route.prefix_length > 0 {
        message.attributes.push(RouteAttribute::Destination(route.destination.into()));
    }
    message.attributes.extend(route.link.as_ref().map(|link| RouteAttribute::Oif(link.index)));
    message.attributes.extend(route.gateway.map(|gateway| match gateway {
        IpAddr::V6(gateway) if !ipv6 => RouteAttribute::Via(RouteVia::Inet6(gateway)),
        _ => RouteAttribute::Gateway(gateway.into()),
    }));
    message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    if route.priority != 0 {
        message.attributes.push(RouteAttribute::Priority(route.priority));
    }
    let metrics = [(route.mtu, RouteMetric::Mtu(route.mtu)), (route.advmss, RouteMetric::Advmss(route.advmss))];
    let metrics: Vec<_> = metrics.into_iter().filter(|(value, _)| *value != 0).map(|(_, metric)| metric).collect();
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    message
}

fn encode_rule(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.ipv6);
    message.header.table = u8::try_from(rule.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.action = rule.action.into();
    message.header.flags = RuleFlags::from_bits_retain(rule.flags);
    message.attributes = vec![RuleAttribute::Priority(rule.priority), RuleAttribute::Table(rule.table)];
    if let Some((address, length)) = rule.source {
        message.header.src_len = length;
        message.attributes.push(RuleAttribute::Source(address));
    }
    if let Some((address, length)) = rule.destination {
        message.header.dst_len = length;
        message.attributes.push(RuleAttribute::Destination(address));
    }
    if !rule.input_link.is_empty() {
        message.attributes.push(RuleAttribute::Iifname(rule.input_link.clone()));
    }
    if !rule.output_link.is_empty() {
        message.attributes.push(RuleAttribute::Oifname(rule.output_link.clone()));
    }
    if rule.mark != 0 || rule.mask != 0 {
        message.attributes.extend([RuleAttribute::FwMark(rule.mark), RuleAttribute::FwMask(rule.mask)]);
    }
    message
}

fn encode_neighbour(neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address.is_ipv6());
    message.header.ifindex = neighbour.link.index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour.address.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    message
}

fn family(ipv6: bool) -> AddressFamily {
    if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}
