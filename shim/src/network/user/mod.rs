//! User-mode networking: a network that the VMM provides to one VM without privileges and without a network namespace.
//!
//! The guest's connections leave the host as those of the VMM's process. The VMM answers as the gateway, and relays
//! names to the host's resolver. Ports of the host can be mapped to ports of the guest.
//!
//! | file        | content                                              |
//! |-------------|------------------------------------------------------|
//! | `port.rs`   | ports of the host and their mappings (pure)          |
//! | `bind.rs`   | whether a port can be bound, and who has it          |
//! | `resolv.rs` | the container's `resolv.conf`                        |

mod bind;
mod port;
mod resolv;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_protos::network::{ConfigureNetworkRequest, NetworkAddress, NetworkLink, NetworkRoute};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::route::{RouteProtocol, RouteScope, RouteType};

pub use bind::BindError;
pub use port::{HostPort, PortMapping, Protocol};
pub(crate) use resolv::{DNS, DNS6, host_resolv_conf, resolv_conf};

/// The guest's address. Its prefix has [`PREFIX`] bits.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The gateway, which is also the host: the VMM connects to the host's loopback instead.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Length of the IPv4 prefix, bits.
pub const PREFIX: u32 = 24;
/// As [`GUEST`], for IPv6. Its prefix has [`PREFIX6`] bits.
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x15);
/// As [`GATEWAY`], for IPv6.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);
/// Length of the IPv6 prefix, bits.
pub const PREFIX6: u32 = 64;
/// The guest's link-local address, with which its kernel looks for neighbours.
const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x15);
/// The card's address, locally administered. No two VMs share a link, so all have the same.
pub const MAC: [u8; 6] = [0x02, b'h', b'u', b's', b'k', 0x01];
/// The link's name in the guest.
const LINK: &str = "eth0";
const MTU: u32 = 1500;
/// linux/rtnetlink.h.
const RT_TABLE_MAIN: u32 = 254;

/// The network of a VM in user mode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserNetwork {
    /// Ports of the host that lead to the guest.
    pub ports: Vec<PortMapping>,
}

impl UserNetwork {
    /// The guest's configuration, which it would otherwise request by DHCP.
    pub(crate) fn configuration() -> ConfigureNetworkRequest {
        let broadcast = Ipv4Addr::from(u32::from(GUEST) | (u32::MAX >> PREFIX));
        let addresses = vec![
            NetworkAddress { broadcast: broadcast.octets().to_vec(), ..address(GUEST.into(), PREFIX) },
            address(GUEST6.into(), PREFIX6),
            NetworkAddress { scope: u8::from(RouteScope::Link).into(), ..address(LINK_LOCAL.into(), PREFIX6) },
        ];
        let link = NetworkLink {
            name: LINK.to_owned(),
            mac: MAC.to_vec(),
            mtu: MTU,
            up: true,
            addresses,
            ..NetworkLink::default()
        };
        let routes = vec![default_route(GATEWAY.into()), default_route(GATEWAY6.into())];
        ConfigureNetworkRequest { links: vec![link], routes, ..ConfigureNetworkRequest::default() }
    }
}

fn address(address: IpAddr, prefix_length: u32) -> NetworkAddress {
    NetworkAddress {
        local: octets(address),
        prefix_length,
        // The link has no other host that could have the address.
        flags: if address.is_ipv6() { AddressFlags::Nodad.bits() } else { 0 },
        ..NetworkAddress::default()
    }
}

fn default_route(gateway: IpAddr) -> NetworkRoute {
    let family = if gateway.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    NetworkRoute {
        family: u8::from(family).into(),
        link: LINK.to_owned(),
        gateway: octets(gateway),
        table: RT_TABLE_MAIN,
        protocol: u8::from(RouteProtocol::Static).into(),
        kind: u8::from(RouteType::Unicast).into(),
        ..NetworkRoute::default()
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_gets_static_addresses_and_a_default_route_of_each_family() {
        let config = UserNetwork::configuration();
        let [link] = &config.links[..] else { panic!("{config:?}") };
        assert_eq!((link.name.as_str(), link.mtu, link.up, &link.mac[..]), ("eth0", 1500, true, &MAC[..]));
        let addresses: Vec<_> = link.addresses.iter().map(|a| (&a.local[..], a.prefix_length, a.flags)).collect();
        let nodad = AddressFlags::Nodad.bits();
        let expected: [(&[u8], u32, u32); 3] =
            [(&[10, 0, 2, 15], 24, 0), (&GUEST6.octets(), 64, nodad), (&LINK_LOCAL.octets(), 64, nodad)];
        assert_eq!(addresses, expected);
        assert_eq!(link.addresses[0].broadcast, [10, 0, 2, 255]);
        let routes: Vec<_> = config.routes.iter().map(|r| (r.family, &r.destination[..], &r.gateway[..])).collect();
        let expected: [(u32, &[u8], &[u8]); 2] = [(2, &[], &[10, 0, 2, 2]), (10, &[], &GATEWAY6.octets())];
        assert_eq!(routes, expected);
        // Locally administered, and not a group address.
        assert_eq!(MAC[0] & 3, 2);
    }
}
