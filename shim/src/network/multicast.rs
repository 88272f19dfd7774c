//! Lets all multicast frames through a link that filters them.
//!
//! Macvlan, ipvlan and physical links pass on only the groups that their own namespace's stack has joined. The guest's
//! stack joins groups that the host does not learn of, so such a link needs IFF_ALLMULTI. A mark at the link tells
//! whether husk has set the flag, so that it is undone even if the shim has been killed.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage};

use super::error::{NetlinkError, ObjectError};
use super::netlink::Netlink;
use super::redirect::{Classifier, Device, is_marked, mark, remove, unmark};

/// Sets IFF_ALLMULTI at a link that filters multicast frames, unless it is set. The link's redirect exists.
pub(super) fn receive_all(
    netlink: &mut Netlink,
    classifier: Classifier,
    link: Device<'_>,
    tap: Device<'_>,
) -> Result<(), ObjectError> {
    let mut request = LinkMessage::default();
    request.header.index = link.index;
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let found = netlink
        .get(RouteNetlinkMessage::GetLink(request))
        .map_err(|error| error.at(format!("link {}", link.name), "read its flags"))?;
    let Some(RouteNetlinkMessage::NewLink(message)) = found else { return Ok(()) };
    // The kernel reports what somebody has asked for, and not what a device needs by itself (dev_get_flags()).
    if !filters(&message) || message.header.flags.contains(LinkFlags::Allmulti) {
        return Ok(());
    }
    // Before the flag: a mark without the flag does no harm.
    mark(netlink, classifier, link, tap)?;
    set(netlink, link, LinkFlags::Allmulti).map_err(|error| error.at(format!("link {}", link.name), "set allmulti"))
}

/// Removes a link's redirect, and IFF_ALLMULTI if husk has set it.
pub(super) fn release(netlink: &mut Netlink, link: Device<'_>) -> Result<(), ObjectError> {
    if is_marked(netlink, link)? {
        match set(netlink, link, LinkFlags::empty()) {
            Err(error) if error.errno() != Some(libc::ENODEV) => {
                return Err(error.at(format!("link {}", link.name), "clear allmulti"));
            }
            _ => unmark(netlink, link)?,
        }
    }
    remove(netlink, link)
}

fn set(netlink: &mut Netlink, link: Device<'_>, flag: LinkFlags) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.flags = flag;
    message.header.change_mask = LinkFlags::Allmulti;
    netlink.change(RouteNetlinkMessage::SetLink(message), 0)
}

/// Whether a link passes on joined groups only: the other supported kinds, veth and tap, pass on everything.
fn filters(message: &LinkMessage) -> bool {
    let kind = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        }),
        _ => None,
    });
    matches!(kind, None | Some(InfoKind::MacVlan | InfoKind::IpVlan))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::network::netns::claim;
    use crate::network::redirect::redirect;
    use crate::network::testing::Namespace;

    /// A macvlan and a veth, and the other ends of both redirects.
    fn namespace() -> Namespace {
        let namespace = Namespace::new();
        namespace.ip("link add veth type veth peer name parent");
        namespace.ip("link add link parent name macvlan type macvlan mode bridge");
        namespace.ip("link add to type veth peer name other");
        namespace
    }

    fn index(namespace: &Namespace, name: &str) -> u32 {
        u32::try_from(namespace.ip_json(&format!("link show dev {name}"))[0]["ifindex"].as_u64().unwrap()).unwrap()
    }

    fn within(
        namespace: &Namespace,
        name: &'static str,
        work: impl FnOnce(&mut Netlink, Device<'_>, Device<'_>) -> Result<(), ObjectError> + Send + 'static,
    ) {
        let (link, tap) = (index(namespace, name), index(namespace, "to"));
        let run = move |deadline| {
            let mut netlink = Netlink::open(deadline).unwrap();
            work(&mut netlink, Device { index: link, name }, Device { index: tap, name: "to" })
        };
        claim(&namespace.path()).unwrap().run(Duration::from_secs(5), run).unwrap();
    }

    fn connect(namespace: &Namespace, name: &'static str) {
        within(namespace, name, |netlink, link, tap| {
            let mut classifier = Classifier::MatchAll;
            redirect(netlink, &mut classifier, link, tap)?;
            receive_all(netlink, classifier, link, tap)
        });
    }

    fn release_link(namespace: &Namespace, name: &'static str) {
        within(namespace, name, |netlink, link, _| release(netlink, link));
    }

    fn is_allmulti(namespace: &Namespace, name: &str) -> bool {
        namespace.ip(&format!("link show dev {name}")).contains("ALLMULTI")
    }

    #[test]
    fn a_link_that_filters_receives_every_group_while_it_is_connected() {
        let namespace = namespace();
        // The second time, an earlier VM's shim was killed and has left everything.
        for _ in 0..2 {
            connect(&namespace, "macvlan");
            assert!(is_allmulti(&namespace, "macvlan"));
        }
        release_link(&namespace, "macvlan");
        assert!(!is_allmulti(&namespace, "macvlan"));
        assert!(!namespace.tc("qdisc show dev macvlan").contains("ingress"));
        release_link(&namespace, "macvlan");

        connect(&namespace, "veth");
        assert!(!is_allmulti(&namespace, "veth"));
        release_link(&namespace, "veth");
    }

    #[test]
    fn what_somebody_else_has_set_stays() {
        let namespace = namespace();
        namespace.ip("link set macvlan allmulticast on");
        connect(&namespace, "macvlan");
        release_link(&namespace, "macvlan");
        assert!(is_allmulti(&namespace, "macvlan"));
    }

    #[test]
    fn a_shim_killed_between_mark_and_flag_does_no_harm() {
        let namespace = namespace();
        within(&namespace, "macvlan", |netlink, link, tap| {
            let mut classifier = Classifier::MatchAll;
            redirect(netlink, &mut classifier, link, tap)?;
            mark(netlink, classifier, link, tap)
        });
        connect(&namespace, "macvlan");
        assert!(is_allmulti(&namespace, "macvlan"));
        release_link(&namespace, "macvlan");
        assert!(!is_allmulti(&namespace, "macvlan"));
    }
}
