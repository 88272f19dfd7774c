//! Reports the links of the calling thread's network namespace.

use std::net::IpAddr;

use husk_protos::network::{NetworkAddress, NetworkCounters, NetworkLink, NetworkLinkStatus};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, Stats64};

use super::error::NetworkError;
use super::message::{list_addresses, list_counters};
use super::netlink::Netlink;

/// Returns all links but the loopback.
pub(super) fn status() -> Result<Vec<NetworkLinkStatus>, NetworkError> {
    let mut netlink = Netlink::open()?;
    let links = netlink.dump(&list_counters()).map_err(NetworkError::List)?;
    let addresses = netlink.dump(&list_addresses()).map_err(NetworkError::List)?;
    Ok(links.into_iter().filter_map(|link| link_status(link, &addresses)).collect())
}

fn link_status(link: RouteNetlinkMessage, addresses: &[RouteNetlinkMessage]) -> Option<NetworkLinkStatus> {
    let RouteNetlinkMessage::NewLink(LinkMessage { header, attributes, .. }) = link else { return None };
    if header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let mut link = NetworkLink { up: header.flags.contains(LinkFlags::Up), ..Default::default() };
    let mut counters = NetworkCounters::default();
    for attribute in attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(mac) => link.mac = mac,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Stats64(stats) => counters = self::counters(&stats),
            _ => {}
        }
    }
    link.addresses = addresses
        .iter()
        .filter_map(|address| match address {
            RouteNetlinkMessage::NewAddress(address) if address.header.index == header.index => {
                Some(self::address(address))
            }
            _ => None,
        })
        .collect();
    Some(NetworkLinkStatus {
        link: Some(link).into(),
        carrier: header.flags.contains(LinkFlags::LowerUp),
        counters: Some(counters).into(),
        ..Default::default()
    })
}

fn address(message: &AddressMessage) -> NetworkAddress {
    let mut address = NetworkAddress {
        prefix_length: message.header.prefix_len.into(),
        flags: message.header.flags.bits().into(),
        scope: u8::from(message.header.scope).into(),
        ..Default::default()
    };
    let mut peer = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address.local = bytes(*local),
            AddressAttribute::Address(other) => peer = bytes(*other),
            AddressAttribute::Broadcast(broadcast) => address.broadcast = broadcast.octets().to_vec(),
            AddressAttribute::Flags(flags) => address.flags = flags.bits(),
            _ => {}
        }
    }
    // IPv6 addresses have an IFA_LOCAL only if they have a peer.
    if address.local.is_empty() {
        address.local = peer;
    } else if peer != address.local {
        address.peer = peer;
    }
    address
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn counters(stats: &Stats64) -> NetworkCounters {
    NetworkCounters {
        received_bytes: stats.rx_bytes,
        received_packets: stats.rx_packets,
        received_errors: stats.rx_errors,
        received_dropped: stats.rx_dropped,
        sent_bytes: stats.tx_bytes,
        sent_packets: stats.tx_packets,
        sent_errors: stats.tx_errors,
        sent_dropped: stats.tx_dropped,
        ..Default::default()
    }
}
