//! Permanent neighbours. Pure.

use husk_protos::network::NetworkNeighbour;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};

/// Converts a neighbour; none if it is not permanent: the guest resolves the others itself.
pub(super) fn neighbour(message: &NeighbourMessage, link: &str) -> Option<NetworkNeighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = NetworkNeighbour::new();
    neighbour.link = link.to_owned();
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                neighbour.address = address.octets().to_vec();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                neighbour.address = address.octets().to_vec();
            }
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac.clone_from(mac),
            _ => {}
        }
    }
    (!neighbour.address.is_empty() && neighbour.mac.len() == 6).then_some(neighbour)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn only_permanent_neighbours_are_copied() {
        let table = [
            (NeighbourState::Permanent, "10.0.0.1", vec![2; 6], Some(4)),
            (NeighbourState::Permanent, "fd00::1", vec![2; 6], Some(16)),
            (NeighbourState::Permanent, "10.0.0.1", vec![], None),
            (NeighbourState::Reachable, "10.0.0.1", vec![2; 6], None),
            (NeighbourState::Noarp, "ff02::1", vec![0x33; 6], None),
        ];
        for (state, address, mac, expected) in table {
            let mut message = NeighbourMessage::default();
            message.header.state = state;
            let address: IpAddr = address.parse().unwrap();
            message.attributes.push(NeighbourAttribute::Destination(address.into()));
            message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.clone()));
            let found = neighbour(&message, "eth0");
            assert_eq!(found.as_ref().map(|found| found.address.len()), expected);
            if let Some(found) = found {
                assert_eq!((found.link.as_str(), found.mac), ("eth0", mac));
            }
        }
    }
}
