//! Connects every link of a namespace to a tap, and undoes it.

use std::collections::HashSet;
use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::network::ConfigureNetworkRequest;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use super::error::{NetworkError, ObjectError};
use super::link::{Link, is_tap, tap_name};
use super::netlink::Netlink;
use super::netns::Claim;
use super::redirect::{Classifier, Device, redirect, remove};
use super::scan::scan;
use super::status::{LinkStatus, NicStatus};
use super::tap::{bring_up, create};

/// What a VM needs to take over a namespace's links.
#[derive(Debug)]
pub struct Connected {
    /// One NIC for each link.
    pub nics: Vec<Nic>,
    /// The guest's configuration.
    pub config: ConfigureNetworkRequest,
}

/// A NIC of the VM, connected to a link of the namespace.
pub struct Nic {
    /// The tap's descriptors, one for each queue pair. The tap vanishes with the last of them.
    pub taps: Vec<OwnedFd>,
    /// The link's MAC.
    pub mac: [u8; 6],
    /// The link's MTU, bytes.
    pub mtu: u32,
    /// The link's name, which is also its name in the guest.
    pub link: String,
    /// The tap's name.
    pub tap: String,
    /// The link's index.
    pub index: u32,
    /// Whether the link is up.
    pub up: bool,
}

impl Nic {
    /// What operators see of it.
    pub(crate) fn status(&self) -> NicStatus {
        let [a, b, c, d, e, f] = self.mac;
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        let Self { link, index, mtu, up, .. } = self;
        let link = LinkStatus { name: link.clone(), index: *index, mac: mac.clone(), mtu: *mtu, up: *up };
        NicStatus { nic: mac, tap: self.tap.clone(), link: Some(link) }
    }
}

impl fmt::Debug for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.mac;
        let queues = self.taps.len();
        write!(f, "{} (MAC {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}, ", self.link)?;
        write!(f, "MTU {}, tap {}, {queues} queues)", self.mtu, self.tap)
    }
}

/// Connects every link of the namespace except `lo` to a tap with `queues` queue pairs. From then on, what arrives at a
/// link reaches the VM, and not the namespace's own stack. Blocks.
///
/// # Errors
///
/// The namespace is gone, or holds something that a VM cannot be given: the error names the link, route or rule.
/// Nothing stays in the namespace, except after [`NetworkError::Deadline`]: then call [`disconnect`].
pub fn connect(claim: &Claim, queues: u16, limit: Duration) -> Result<Connected, NetworkError> {
    claim.run(limit, move |deadline| {
        let mut netlink = Netlink::open(deadline).map_err(|error| error.at("rtnetlink", "connect"))?;
        let scan = scan(&mut netlink)?;
        let mut classifier = Classifier::MatchAll;
        let mut nics = Vec::new();
        for (done, link) in scan.links.iter().enumerate() {
            match connect_link(&mut netlink, &mut classifier, link, queues) {
                Ok(nic) => nics.push(nic),
                Err(error) => {
                    // The taps vanish with `nics`.
                    undo(&mut netlink, &scan.links[..done]);
                    return Err(error);
                }
            }
        }
        Ok(Connected { nics, config: scan.config })
    })
}

/// Removes what [`connect`] left at the links of the namespace: redirects and ingress qdiscs. Leaves a link alone whose
/// tap still exists: another VM uses it. Does nothing if the namespace is gone. Blocks.
///
/// # Errors
///
/// A qdisc cannot be removed.
pub fn disconnect(claim: &Claim, limit: Duration) -> Result<(), NetworkError> {
    if claim.is_gone()? {
        return Ok(());
    }
    let removed = claim.run(limit, |deadline| {
        let mut netlink = Netlink::open(deadline).map_err(|error| error.at("rtnetlink", "connect"))?;
        let links = names(&mut netlink)?;
        let taken: HashSet<&str> = links.iter().map(|(_, name)| name.as_str()).collect();
        let mut result = Ok(());
        for (index, name) in &links {
            if is_tap(name) || taken.contains(tap_name(*index).as_str()) {
                continue;
            }
            // The other links are cleaned up even if one fails.
            result = result.and(remove(&mut netlink, Device { index: *index, name }));
        }
        result
    });
    match removed {
        // It vanished meanwhile.
        Err(_) if claim.is_gone()? => Ok(()),
        other => other,
    }
}

fn connect_link(
    netlink: &mut Netlink,
    classifier: &mut Classifier,
    link: &Link,
    queues: u16,
) -> Result<Nic, ObjectError> {
    // Fails if another VM uses the link: its redirect must stay.
    let tap = create(netlink, link, queues)?;
    let (outer, inner) = (device(link), Device { index: tap.index, name: &tap.name });
    redirect(netlink, classifier, inner, outer)?;
    // A redirect to a device that is down drops the frames and logs each, so the link's redirect comes last.
    bring_up(netlink, &tap)?;
    if let Err(error) = redirect(netlink, classifier, outer, inner) {
        // It may have added the qdisc.
        undo(netlink, std::slice::from_ref(link));
        return Err(error);
    }
    let Link { index, mac, mtu, up, .. } = *link;
    Ok(Nic { taps: tap.queues, mac, mtu, link: link.name.clone(), tap: tap.name, index, up })
}

fn undo(netlink: &mut Netlink, links: &[Link]) {
    netlink.grant_grace();
    for link in links {
        if let Err(error) = remove(netlink, device(link)) {
            tracing::warn!(link = %link.name, error = %Chain(&error), "failed to undo the redirect of a link");
        }
    }
}

fn device(link: &Link) -> Device<'_> {
    Device { index: link.index, name: &link.name }
}

/// Index and name of every link.
fn names(netlink: &mut Netlink) -> Result<Vec<(u32, String)>, ObjectError> {
    let messages = netlink
        .dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .map_err(|error| error.at("links", "list them"))?;
    let name = |message| {
        let RouteNetlinkMessage::NewLink(link) = message else { return None };
        let index = link.header.index;
        link.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some((index, name)),
            _ => None,
        })
    };
    Ok(messages.into_iter().filter_map(name).collect())
}
