//! Reads a network namespace's configuration: every link except `lo`, with addresses, routes, rules and neighbours.
//!
//! The conversions from the kernel's messages to husk's protocol are pure functions, one file for each kind of object.
//! What the guest's kernel makes by itself is left out. What husk cannot express is an error that names the object: a
//! guest with half of its network would be harder to debug. Links that a VM cannot be connected to are listed.

mod address;
mod link;
mod neighbour;
mod route;
mod rule;
mod sysctl;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use husk_protos::network::{ConfigureNetworkRequest, NetworkLink};
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::error::{NetlinkError, ObjectError};
use super::link::Link;
use super::netlink::Netlink;

pub(super) use sysctl::Sent;
pub use sysctl::copied_sysctls;

/// A namespace's configuration.
#[derive(Debug)]
pub(super) struct Scan {
    /// The links to connect, in the kernel's order.
    pub(super) links: Vec<Link>,
    /// Links that a VM cannot be connected to. The configuration contains their routes, but nothing else of them.
    pub(super) rejected: Vec<ObjectError>,
    /// The guest's configuration.
    pub(super) config: ConfigureNetworkRequest,
}

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

/// Reads the configuration of the thread's network namespace.
pub(super) fn scan(netlink: &mut Netlink) -> Result<Scan, ObjectError> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let link_messages = list(netlink, "links", &RouteNetlinkMessage::GetLink(request), |message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    })?;
    let address_messages = list_families(
        netlink,
        "addresses",
        |family| {
            let mut request = AddressMessage::default();
            request.header.family = family;
            RouteNetlinkMessage::GetAddress(request)
        },
        |message| match message {
            RouteNetlinkMessage::NewAddress(address) => Some((address.header.family, address)),
            _ => None,
        },
    )?;
    let route_messages = list_families(
        netlink,
        "routes",
        |family| {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            RouteNetlinkMessage::GetRoute(request)
        },
        |message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some((route.header.address_family, route)),
            _ => None,
        },
    )?;
    let rule_messages = list_families(
        netlink,
        "rules",
        |family| {
            let mut request = RuleMessage::default();
            request.header.family = family;
            RouteNetlinkMessage::GetRule(request)
        },
        |message| match message {
            RouteNetlinkMessage::NewRule(rule) => Some((rule.header.family, rule)),
            _ => None,
        },
    )?;
    let neighbour_messages = list_families(
        netlink,
        "neighbours",
        |family| {
            let mut request = NeighbourMessage::default();
            request.header.family = family;
            RouteNetlinkMessage::GetNeighbour(request)
        },
        |message| match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => Some((neighbour.header.family, neighbour)),
            _ => None,
        },
    )?;
    let mut scan = assemble(&link_messages, &address_messages, &route_messages, &rule_messages, &neighbour_messages)?;
    let sysctls = sysctl::read(netlink.socket(), &scan.links)?;
    scan.config.sysctls = sysctls.global;
    for (link, sysctls) in scan.config.links.iter_mut().zip(sysctls.links) {
        link.sysctls = sysctls;
    }
    Ok(scan)
}

/// Converts the kernel's messages. Pure.
fn assemble(
    link_messages: &[LinkMessage],
    address_messages: &[AddressMessage],
    route_messages: &[RouteMessage],
    rule_messages: &[RuleMessage],
    neighbour_messages: &[NeighbourMessage],
) -> Result<Scan, ObjectError> {
    let (links, rejected) =
        link::links(link_messages, |index| address_messages.iter().any(|address| address.header.index == index));
    // Routes may lead to lo, which every guest has.
    let names: HashMap<u32, &str> =
        link_messages.iter().filter_map(|message| Some((message.header.index, link::name(message)?))).collect();

    let routes = route::routes(route_messages, &names)?;
    let mut config = ConfigureNetworkRequest::new();
    for link in &links {
        let mut converted = NetworkLink::new();
        converted.name.clone_from(&link.name);
        converted.mac = link.mac.to_vec();
        converted.mtu = link.mtu;
        converted.up = link.up;
        converted.addresses = address_messages
            .iter()
            .filter(|message| message.header.index == link.index)
            .filter_map(|message| address::address(message, link, &routes))
            .collect();
        config.links.push(converted);
    }
    config.routes = routes;
    config.rules =
        rule_messages.iter().filter_map(|message| rule::rule(message).transpose()).collect::<Result<_, _>>()?;
    config.neighbours = neighbour_messages
        .iter()
        .filter_map(|message| {
            let link = links.iter().find(|link| link.index == message.header.ifindex)?;
            neighbour::neighbour(message, &link.name)
        })
        .collect();
    Ok(Scan { links, rejected, config })
}

fn list<T>(
    netlink: &mut Netlink,
    objects: &'static str,
    request: &RouteNetlinkMessage,
    pick: impl Fn(RouteNetlinkMessage) -> Option<T>,
) -> Result<Vec<T>, ObjectError> {
    let messages = netlink.dump(request).map_err(|error| error.at(objects, "list them"))?;
    Ok(messages.into_iter().filter_map(pick).collect())
}

fn list_families<T>(
    netlink: &mut Netlink,
    objects: &'static str,
    request: impl Fn(AddressFamily) -> RouteNetlinkMessage,
    pick: impl Fn(RouteNetlinkMessage) -> Option<(AddressFamily, T)>,
) -> Result<Vec<T>, ObjectError> {
    let mut all = Vec::new();
    for family in FAMILIES {
        match netlink.dump(&request(family)) {
            // A kernel that lacks a family lists those that it has.
            Ok(messages) => {
                all.extend(
                    messages.into_iter().filter_map(&pick).filter(|found| found.0 == family).map(|found| found.1),
                );
            }
            Err(error) if lacks_family(&error) => {}
            Err(error) => return Err(error.at(objects, "list them")),
        }
    }
    Ok(all)
}

/// A kernel without IPv6 or without policy routing.
fn lacks_family(error: &NetlinkError) -> bool {
    matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}
