//! Addresses. Pure.

use std::net::IpAddr;

use husk_protos::network::{NetworkAddress, NetworkRoute};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};

use super::route::has_prefix_route;
use crate::network::link::Link;

/// Flags that a program may set (linux/if_addr.h). The others are states, such as IFA_F_TENTATIVE and IFA_F_SECONDARY,
/// or follow from the lifetime, as IFA_F_PERMANENT does.
const SETTABLE: AddressFlags = AddressFlags::Nodad
    .union(AddressFlags::Homeaddress)
    .union(AddressFlags::Managetempaddr)
    .union(AddressFlags::Noprefixroute)
    .union(AddressFlags::Mcautojoin)
    .union(AddressFlags::Optimistic);

/// Converts an address of a link; none for an IPv6 address that expires (IFA_F_PERMANENT is not set): it comes from
/// router advertisements, which the guest receives from now on.
///
/// The link-local address that the kernel made is copied as well. The guest's kernel would derive the same one from the
/// MAC, but could use it only after a test for duplicates, which takes a second. With another `addr_gen_mode`, the
/// guest's would differ.
pub(super) fn address(message: &AddressMessage, link: &Link, routes: &[NetworkRoute]) -> Option<NetworkAddress> {
    // The header has room for eight flags; IFA_FLAGS has them all.
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut local, mut peer, mut broadcast) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Broadcast(address) => broadcast = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // An IPv6 address without a peer has no IFA_LOCAL.
    let local = local.or(peer)?;
    let ipv6 = message.header.family == AddressFamily::Inet6;
    if ipv6 && !flags.contains(AddressFlags::Permanent) {
        return None;
    }

    let mut address = NetworkAddress::new();
    address.local = octets(local);
    address.prefix_length = message.header.prefix_len.into();
    address.peer = peer.filter(|peer| *peer != local).map(octets).unwrap_or_default();
    address.broadcast = broadcast.map(|address| address.octets().to_vec()).unwrap_or_default();
    address.scope = u8::from(message.header.scope).into();
    let mut settable = flags & SETTABLE;
    // The guest need not wait a second to find out what the host's kernel has found out, or will: it reports a duplicate
    // as another change.
    if ipv6 && !flags.contains(AddressFlags::Dadfailed) {
        settable |= AddressFlags::Nodad;
    }
    // A plugin such as ptp has removed the route to the prefix; the guest's kernel must not add it.
    let makes_route = makes_prefix_route(local, !address.peer.is_empty(), message.header.prefix_len);
    if link.up && makes_route && !has_prefix_route(routes, &link.name, &address) {
        settable |= AddressFlags::Noprefixroute;
    }
    address.flags = settable.bits();
    Some(address)
}

/// The kernel adds no route to the prefix of a single IPv4 address (fib_add_ifaddr() in net/ipv4/fib_frontend.c), and
/// fe80::/64 is not among the routes.
fn makes_prefix_route(address: IpAddr, has_peer: bool, prefix_length: u8) -> bool {
    match address {
        IpAddr::V4(_) => prefix_length < 32 || has_peer,
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    }
}

/// The bytes of an address.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::address::AddressScope;

    const MAC: [u8; 6] = [0x02, 0x11, 0x22, 0x33, 0x44, 0x55];
    const PERMANENT: AddressFlags = AddressFlags::Permanent;
    const NODAD: u32 = AddressFlags::Nodad.bits();
    const NO_ROUTE: u32 = AddressFlags::Noprefixroute.bits();

    fn link(up: bool) -> Link {
        Link { index: 2, name: "eth0".into(), mac: MAC, mtu: 1500, up }
    }

    fn message(local: &str, prefix: u8, flags: AddressFlags) -> AddressMessage {
        let local: IpAddr = local.parse().unwrap();
        let mut message = AddressMessage::default();
        message.header.family = if local.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        message.header.prefix_len = prefix;
        message.header.scope = AddressScope::Universe;
        message.attributes.push(AddressAttribute::Address(local));
        message.attributes.push(AddressAttribute::Flags(flags));
        message
    }

    fn route(destination: &str, prefix_length: u32) -> NetworkRoute {
        let mut route = NetworkRoute::new();
        let destination: IpAddr = destination.parse().unwrap();
        (route.family, route.priority) = if destination.is_ipv6() { (10, 256) } else { (2, 0) };
        route.destination = octets(destination);
        route.prefix_length = prefix_length;
        route.link = "eth0".into();
        (route.table, route.protocol, route.kind) = (254, 2, 1);
        route
    }

    #[test]
    fn flags_follow_from_state_and_routes() {
        let four = |flags| message("10.1.2.3", 24, flags);
        let six = |flags| message("fd00::5", 64, flags);
        let tentative = PERMANENT | AddressFlags::Tentative;
        let table = [
            (four(PERMANENT), true, vec![route("10.1.2.0", 24)], 0),
            (four(PERMANENT), true, vec![], NO_ROUTE),
            (four(PERMANENT), true, vec![route("10.1.0.0", 16)], NO_ROUTE),
            (four(PERMANENT), false, vec![], 0),
            (four(PERMANENT | AddressFlags::Secondary), true, vec![route("10.1.2.0", 24)], 0),
            (message("10.1.2.3", 32, PERMANENT), true, vec![], 0),
            (six(PERMANENT), true, vec![route("fd00::", 64)], NODAD),
            (six(PERMANENT), true, vec![], NODAD | NO_ROUTE),
            (message("fe80::7", 64, PERMANENT), true, vec![], NODAD),
            (six(tentative), true, vec![route("fd00::", 64)], NODAD),
            (six(PERMANENT | AddressFlags::Dadfailed), true, vec![route("fd00::", 64)], 0),
            (six(PERMANENT | AddressFlags::Noprefixroute), true, vec![route("fd00::", 64)], NODAD | NO_ROUTE),
        ];
        for (message, up, routes, expected) in table {
            assert_eq!(address(&message, &link(up), &routes).unwrap().flags, expected, "{message:?} {routes:?}");
        }
    }

    #[test]
    fn ipv6_addresses_that_expire_are_left_out() {
        let table = [
            (message("fe80::11:22ff:fe33:4455", 64, PERMANENT), true),
            (message("fd00::1", 64, PERMANENT), true),
            (message("fd00::1", 64, AddressFlags::empty()), false),
            // A DHCP client renews it.
            (message("10.0.0.1", 24, AddressFlags::empty()), true),
        ];
        for (message, expected) in table {
            assert_eq!(address(&message, &link(true), &[]).is_some(), expected, "{message:?}");
        }
    }

    #[test]
    fn peer_and_broadcast_are_kept() {
        let mut message = message("10.0.0.2", 32, PERMANENT);
        message.attributes.push(AddressAttribute::Local("10.0.0.1".parse().unwrap()));
        message.attributes.push(AddressAttribute::Broadcast("10.0.0.255".parse().unwrap()));
        let address = address(&message, &link(true), &[route("10.0.0.2", 32)]).unwrap();
        assert_eq!(address.local, [10, 0, 0, 1]);
        assert_eq!(address.peer, [10, 0, 0, 2]);
        assert_eq!(address.broadcast, [10, 0, 0, 255]);
        assert_eq!((address.prefix_length, address.flags), (32, 0));
    }
}
