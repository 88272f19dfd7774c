//! Links: which of them a VM can be connected to. Pure.

use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};

use crate::network::error::ObjectError;
use crate::network::link::{Link, is_tap};

/// A link's name.
pub(super) fn name(message: &LinkMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

/// Chooses the links to connect. Returns why others cannot be connected as well.
pub(super) fn links(messages: &[LinkMessage], has_addresses: impl Fn(u32) -> bool) -> (Vec<Link>, Vec<ObjectError>) {
    let (mut links, mut rejected) = (Vec::new(), Vec::new());
    for message in messages {
        match link(message, has_addresses(message.header.index)) {
            Ok(link) => links.extend(link),
            Err(error) => rejected.push(error),
        }
    }
    (links, rejected)
}

/// Converts a link; none if it is not to be connected.
fn link(message: &LinkMessage, has_addresses: bool) -> Result<Option<Link>, ObjectError> {
    let name = name(message).unwrap_or_default();
    if message.header.flags.contains(LinkFlags::Loopback) || is_tap(name) {
        return Ok(None);
    }
    let unsupported = |reason: String| ObjectError::unsupported(format!("link {name}"), reason);
    let up = message.header.flags.contains(LinkFlags::Up);
    if let Some(reason) = obstacle(message) {
        // Modules such as ipip and sit create a device in each new namespace: tunl0, sit0 and others.
        return if up || has_addresses { Err(unsupported(reason)) } else { Ok(None) };
    }
    let mut link = Link { index: message.header.index, name: name.to_owned(), mac: [0; 6], mtu: 0, up };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(mac) => {
                link.mac = mac.as_slice().try_into().map_err(|_| unsupported("has no Ethernet address".into()))?;
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            _ => {}
        }
    }
    if link.mac == [0; 6] {
        return Err(unsupported("has no Ethernet address".into()));
    }
    Ok(Some(link))
}

/// Why a VM cannot be connected to a link.
fn obstacle(message: &LinkMessage) -> Option<String> {
    let kind = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        }),
        _ => None,
    });
    match kind {
        // No kind: a physical device, or a virtual function of one.
        None | Some(InfoKind::Veth | InfoKind::MacVlan | InfoKind::IpVlan | InfoKind::Tun) => {}
        Some(kind) => {
            return Some(format!(
                "links of kind {kind} are not supported (veth, macvlan, ipvlan, tap and physical links are)"
            ));
        }
    }
    if message.header.link_layer_type != LinkLayerType::Ether {
        // A tun without Ethernet headers, for example.
        return Some("does not carry Ethernet frames".into());
    }
    if message.header.flags.contains(LinkFlags::Noarp) {
        // Nobody would answer the guest's ARP requests.
        return Some("does not use ARP (ipvlan in mode l3, for example), which a guest needs".into());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: LinkFlags = LinkFlags::Up;

    fn message(name: &str, kind: Option<InfoKind>, flags: LinkFlags, mac: &[u8]) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.flags = flags;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes.push(LinkAttribute::IfName(name.into()));
        message.attributes.push(LinkAttribute::Mtu(1400));
        message.attributes.push(LinkAttribute::Address(mac.into()));
        message.attributes.extend(kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])));
        message
    }

    fn simple(kind: Option<InfoKind>, flags: LinkFlags) -> LinkMessage {
        message("net0", kind, flags, &[2, 0, 0, 0, 0, 1])
    }

    #[test]
    fn supported_kinds_are_connected() {
        for kind in [None, Some(InfoKind::Veth), Some(InfoKind::MacVlan), Some(InfoKind::IpVlan), Some(InfoKind::Tun)] {
            for up in [true, false] {
                let flags = if up { UP } else { LinkFlags::empty() };
                let expected = Link { index: 7, name: "net0".into(), mac: [2, 0, 0, 0, 0, 1], mtu: 1400, up };
                assert_eq!(link(&simple(kind.clone(), flags), false).unwrap(), Some(expected));
            }
        }
    }

    #[test]
    fn loopback_husks_taps_and_idle_tunnels_are_left_out() {
        for message in [
            message("lo", None, UP | LinkFlags::Loopback, &[0; 6]),
            message("husk-2", Some(InfoKind::Tun), UP, &[2, 0, 0, 0, 0, 1]),
            message("tunl0", Some(InfoKind::IpIp), LinkFlags::empty(), &[0; 4]),
            message("gretap0", Some(InfoKind::GreTap), LinkFlags::empty(), &[0; 6]),
        ] {
            assert_eq!(link(&message, false).unwrap(), None, "{message:?}");
        }
    }

    #[test]
    fn other_links_are_rejected_by_name() {
        let mut tun = simple(Some(InfoKind::Tun), UP);
        tun.header.link_layer_type = LinkLayerType::None;
        let down = LinkFlags::empty();
        let table = [
            (simple(Some(InfoKind::Bridge), UP), false, "link net0: links of kind bridge are not supported"),
            (simple(Some(InfoKind::Wireguard), down), true, "link net0: links of kind wireguard are not supported"),
            (simple(Some(InfoKind::Other("new".into())), UP), false, "link net0: links of kind new are not supported"),
            (tun, false, "link net0: does not carry Ethernet frames"),
            (simple(Some(InfoKind::IpVlan), UP | LinkFlags::Noarp), false, "link net0: does not use ARP"),
            (message("net0", None, UP, &[0; 6]), false, "link net0: has no Ethernet address"),
            (message("net0", None, UP, &[1; 20]), false, "link net0: has no Ethernet address"),
        ];
        for (message, has_addresses, expected) in table {
            let error = link(&message, has_addresses).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
