//! The guest's report on its links, for `husk status`. The guest is untrusted: the report is bounded, and its texts are
//! made harmless.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use husk_protos::mac::mac_text;
use husk_protos::network::{
    NetworkAddress, NetworkCounters, NetworkLinkStatus, NetworkStatusRequest, NetworkStatusResponse,
};
use ttrpc::context::with_duration;

use crate::guest::client::{Guest, GuestError};
use crate::host::text::clean;
use crate::state::links::{Counters, GuestLink};

/// Deadline for the report. `husk` waits 5 s for the whole status.
const DEADLINE: Duration = Duration::from_secs(2);
/// Links that are shown.
pub(crate) const LINKS_MAX: usize = 64;
/// Addresses that are shown of one link.
pub(crate) const ADDRESSES_MAX: usize = 64;
/// Bytes of a name (IFNAMSIZ).
pub(crate) const NAME_MAX: usize = 15;
/// Bytes of a link's hardware address (MAX_ADDR_LEN).
const MAC_MAX: usize = 32;

/// What a guest has reported.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Its links with their MACs.
    pub(crate) links: Vec<(Option<String>, GuestLink)>,
    /// What was left out.
    pub(crate) problem: Option<String>,
}

/// Asks the guest for its links.
///
/// # Errors
/// The guest returns an error, or does not answer in time.
pub(crate) async fn report(guest: &Guest) -> Result<Report, GuestError> {
    let response = guest.network.status(with_duration(DEADLINE), &NetworkStatusRequest::new()).await?;
    Ok(read(response))
}

/// What is shown of the guest's response.
pub(crate) fn read(response: NetworkStatusResponse) -> Report {
    let mut left_out = Vec::new();
    let count = response.links.len();
    if count > LINKS_MAX {
        left_out.push(format!("{} of the guest's {count} links", count - LINKS_MAX));
    }
    let mut links = Vec::new();
    for status in response.links.into_iter().take(LINKS_MAX) {
        let link = link(&status);
        let missing = status.link.addresses.len() - link.1.addresses.len();
        if missing > 0 {
            left_out.push(format!("{missing} addresses of the guest's link {}", link.1.name));
        }
        links.push(link);
    }
    let problem =
        (!left_out.is_empty()).then(|| format!("too many or invalid, and not shown: {}", left_out.join(", ")));
    Report { links, problem }
}

fn link(status: &NetworkLinkStatus) -> (Option<String>, GuestLink) {
    let link = &status.link;
    let mac = Some(&link.mac).filter(|mac| (1..=MAC_MAX).contains(&mac.len())).map(|mac| mac_text(mac));
    let guest = GuestLink {
        name: name(&link.name),
        mtu: link.mtu,
        up: link.up,
        carrier: status.carrier,
        addresses: link.addresses.iter().take(ADDRESSES_MAX).filter_map(address).collect(),
        counters: counters(&status.counters),
    };
    (mac, guest)
}

fn name(name: &str) -> String {
    clean(name).chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }).take(NAME_MAX).collect()
}

/// As `ip address` prints it; none if it is invalid.
fn address(address: &NetworkAddress) -> Option<String> {
    let local = ip(&address.local)?;
    let longest = if local.is_ipv4() { 32 } else { 128 };
    let length = Some(address.prefix_length).filter(|length| *length <= longest)?;
    match address.peer.as_slice() {
        [] => Some(format!("{local}/{length}")),
        peer => Some(format!("{local} peer {}/{length}", ip(peer)?)),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(|bytes| Ipv4Addr::from(bytes).into());
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(|bytes| Ipv6Addr::from(bytes).into())).ok()
}

fn counters(counters: &NetworkCounters) -> Counters {
    Counters {
        received_bytes: counters.received_bytes,
        received_packets: counters.received_packets,
        received_errors: counters.received_errors,
        received_dropped: counters.received_dropped,
        sent_bytes: counters.sent_bytes,
        sent_packets: counters.sent_packets,
        sent_errors: counters.sent_errors,
        sent_dropped: counters.sent_dropped,
    }
}

#[cfg(test)]
mod tests {
    use husk_protos::network::NetworkLink;

    use super::*;

    fn with(link: NetworkLink) -> NetworkLinkStatus {
        NetworkLinkStatus { link: Some(link).into(), ..Default::default() }
    }

    fn at(local: &[u8], prefix_length: u32, peer: &[u8]) -> NetworkAddress {
        NetworkAddress { local: local.into(), prefix_length, peer: peer.into(), ..Default::default() }
    }

    #[test]
    fn an_honest_report_is_shown_completely() {
        let counters = NetworkCounters {
            received_bytes: 1,
            received_packets: 2,
            received_errors: 3,
            received_dropped: 4,
            sent_bytes: 5,
            sent_packets: 6,
            sent_errors: 7,
            sent_dropped: 8,
            ..Default::default()
        };
        let link = NetworkLink {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1400,
            up: true,
            addresses: vec![
                at(&[10, 88, 0, 7], 16, &[]),
                at(&[10, 99, 0, 7], 32, &[10, 99, 0, 1]),
                at(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7], 64, &[]),
            ],
            ..Default::default()
        };
        let status = NetworkLinkStatus { carrier: true, counters: Some(counters).into(), ..with(link) };
        let report = read(NetworkStatusResponse { links: vec![status], ..Default::default() });
        let expected = GuestLink {
            name: "eth0".into(),
            mtu: 1400,
            up: true,
            carrier: true,
            addresses: ["10.88.0.7/16", "10.99.0.7 peer 10.99.0.1/32", "fd00::7/64"].map(str::to_owned).to_vec(),
            counters: Counters {
                received_bytes: 1,
                received_packets: 2,
                received_errors: 3,
                received_dropped: 4,
                sent_bytes: 5,
                sent_packets: 6,
                sent_errors: 7,
                sent_dropped: 8,
            },
        };
        assert_eq!(report, Report { links: vec![(Some("02:00:00:00:00:01".into()), expected)], problem: None });
    }

    #[test]
    fn a_hostile_report_is_bounded_and_printable() {
        let bad = vec![at(&[1, 2, 3], 0, &[]), at(&[1, 2, 3, 4], 33, &[]), at(&[1, 2, 3, 4], 8, &[5]), at(&[], 0, &[])];
        let hostile = NetworkLink {
            name: format!("\u{1b}[2Jé\u{202e}{}", "x".repeat(1 << 20)),
            mac: vec![7; 1 << 20],
            addresses: bad,
            ..Default::default()
        };
        let crowded =
            NetworkLink { name: "e".into(), addresses: vec![at(&[1, 2, 3, 4], 8, &[]); 1000], ..Default::default() };
        let mut links = vec![with(hostile), with(crowded), NetworkLinkStatus::new()];
        links.extend(vec![NetworkLinkStatus::new(); 100]);
        let report = read(NetworkStatusResponse { links, ..Default::default() });
        assert_eq!((report.links.len(), report.links[1].1.addresses.len()), (LINKS_MAX, ADDRESSES_MAX));
        let (mac, link) = &report.links[0];
        assert_eq!((mac, link.name.as_str(), link.addresses.len()), (&None, "[2J?xxxxxxxxxxx", 0));
        let expected = "too many or invalid, and not shown: 39 of the guest's 103 links, \
             4 addresses of the guest's link [2J?xxxxxxxxxxx, 936 addresses of the guest's link e";
        assert_eq!(report.problem.as_deref(), Some(expected));
    }
}
