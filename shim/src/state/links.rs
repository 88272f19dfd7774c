//! The network part of a sandbox's status: the links of the guest, as the guest reports them, and what the host has
//! connected them to.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::network::{LinkStatus as HostLink, NicStatus};

/// The network of a running VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkStatus {
    /// The namespace of the host that the VM is connected to.
    pub netns: Option<PathBuf>,
    /// The VM's NICs in the machine's order, then the guest's other links. Without the loopback.
    pub links: Vec<LinkStatus>,
    /// Why the guest's network differs from the namespace's, and why something of the guest is missing in `links`.
    pub problems: Vec<String>,
}

/// A NIC of a VM, or a link that something in the guest has created.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkStatus {
    /// The link's MAC, such as 02:00:00:00:00:01, or the machine's for a spare NIC; `None` for a link without one.
    pub mac: Option<String>,
    /// `None` for a spare NIC, and if the guest has not reported the link.
    pub guest: Option<GuestLink>,
    /// The NIC and what the host has connected to it; `None` for a link that is no NIC.
    pub host: Option<NicStatus>,
}

/// A link as the guest reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestLink {
    /// Its name. Characters other than printable ASCII are replaced by `?`.
    pub name: String,
    /// Bytes.
    pub mtu: u32,
    /// Whether it is enabled.
    pub up: bool,
    /// Whether it has a carrier.
    pub carrier: bool,
    /// Its addresses, such as 10.88.0.7/16, or 10.99.0.7 peer 10.99.0.1/32.
    pub addresses: Vec<String>,
    /// Since the guest's boot.
    pub counters: Counters,
}

/// What a link has carried, seen from the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Bytes that arrived in the guest.
    pub received_bytes: u64,
    /// Packets that arrived.
    pub received_packets: u64,
    /// Packets that arrived damaged.
    pub received_errors: u64,
    /// Packets that arrived and were discarded.
    pub received_dropped: u64,
    /// Bytes that the guest sent.
    pub sent_bytes: u64,
    /// Packets that it sent.
    pub sent_packets: u64,
    /// Packets that it failed to send.
    pub sent_errors: u64,
    /// Packets that it discarded instead of sending them.
    pub sent_dropped: u64,
}

/// Joins what the host has connected, by MAC, with what the guest reports.
pub fn join(nics: &[NicStatus], guest: Vec<(Option<String>, GuestLink)>) -> Vec<LinkStatus> {
    let mut guest: Vec<_> = guest.into_iter().map(Some).collect();
    let mut links = Vec::with_capacity(nics.len().max(guest.len()));
    for nic in nics {
        let mac = nic.link.as_ref().map(|link| &link.mac);
        // The first one: links that a container stacks on a NIC's may have its MAC, and come later.
        let same = |link: &&mut Option<(Option<String>, GuestLink)>| {
            mac.is_some_and(|mac| link.as_ref().is_some_and(|(other, _)| other.as_ref() == Some(mac)))
        };
        let guest = guest.iter_mut().find(same).and_then(Option::take).map(|(_, link)| link);
        links.push(LinkStatus { mac: Some(mac.unwrap_or(&nic.nic).clone()), guest, host: Some(nic.clone()) });
    }
    links.extend(guest.into_iter().flatten().map(|(mac, link)| LinkStatus { mac, guest: Some(link), host: None }));
    links
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_found_by_its_mac_and_nothing_is_lost() {
        let nic = |nic: &str, link: Option<(&str, &str)>| NicStatus {
            nic: nic.into(),
            link: link.map(|(mac, name)| HostLink { mac: mac.into(), name: name.into(), ..HostLink::default() }),
            ..NicStatus::default()
        };
        let guest = |mac: Option<&str>, name: &str| {
            (mac.map(str::to_owned), GuestLink { name: name.into(), ..GuestLink::default() })
        };
        let joined = join(
            &[
                nic("06:01", Some(("02:02", "net1"))),
                nic("06:02", Some(("02:01", "eth0"))),
                nic("06:03", Some(("02:03", "late"))),
                nic("06:04", None),
            ],
            vec![
                guest(Some("02:01"), "eth0"),
                guest(Some("02:02"), "net1"),
                guest(Some("02:01"), "br0"),
                guest(None, "tun0"),
            ],
        );
        let names: Vec<_> = joined
            .iter()
            .map(|link| {
                let host = link.host.as_ref().and_then(|nic| nic.link.as_ref()).map_or("-", |link| &link.name);
                (link.mac.as_deref().unwrap_or("-"), host, link.guest.as_ref().map_or("-", |guest| &guest.name))
            })
            .collect();
        let expected = [
            ("02:02", "net1", "net1"),
            ("02:01", "eth0", "eth0"),
            ("02:03", "late", "-"),
            ("06:04", "-", "-"),
            ("02:01", "-", "br0"),
            ("-", "-", "tun0"),
        ];
        assert_eq!(names, expected);
    }
}
