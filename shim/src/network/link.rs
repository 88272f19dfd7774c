//! A pod's link, and the names of taps.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};

use super::error::ObjectError;
use super::netlink::Netlink;

/// Names of taps start with this, and are at most 15 bytes long. The tap of a link has the link's index after it: the
/// kernel lets only one VM have the tap of a link.
const TAP_PREFIX: &str = "husk-";
/// A spare tap has this and the NIC's number.
const SPARE_PREFIX: &str = "husk-s";

/// Index of `lo` in every namespace (LOOPBACK_IFINDEX of the kernel's include/net/flow.h).
pub(super) const LOOPBACK_INDEX: u32 = 1;

/// A link of the pod that the VM is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    /// Bytes.
    pub(super) mtu: u32,
    pub(super) up: bool,
}

/// Any link of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AnyLink {
    pub(super) index: u32,
    pub(super) name: String,
    /// What `ip link` shows as its alias.
    pub(super) alias: String,
}

/// The name of the tap of the link with this index.
pub(super) fn tap_name(link_index: u32) -> String {
    format!("{TAP_PREFIX}{link_index}")
}

/// The name of the tap of a spare NIC.
pub(super) fn spare_name(number: usize) -> String {
    format!("{SPARE_PREFIX}{number}")
}

/// Whether a name is one of husk's taps.
pub(super) fn is_tap(name: &str) -> bool {
    let number = name.strip_prefix(SPARE_PREFIX).or_else(|| name.strip_prefix(TAP_PREFIX)).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// The alias of a tap of the VM `vm`. It is at most 255 bytes long: identifiers are short.
pub(super) fn alias(vm: &str, link: Option<&str>) -> String {
    format!("{}{}", alias_prefix(vm), link.unwrap_or("spare"))
}

/// How the aliases of the VM's taps begin. No identifier contains a space.
pub(super) fn alias_prefix(vm: &str) -> String {
    format!("husk VM {vm}: ")
}

/// Lists the links of the thread's namespace.
pub(super) fn all(netlink: &mut Netlink) -> Result<Vec<AnyLink>, ObjectError> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let messages =
        netlink.dump(&RouteNetlinkMessage::GetLink(request)).map_err(|error| error.at("links", "list them"))?;
    let convert = |message| {
        let RouteNetlinkMessage::NewLink(message) = message else { return None };
        let mut link = AnyLink { index: message.header.index, ..AnyLink::default() };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                _ => {}
            }
        }
        Some(link)
    };
    Ok(messages.into_iter().filter_map(convert).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_recognized_by_name() {
        // The largest index.
        let name = tap_name(i32::MAX.unsigned_abs());
        assert_eq!(name.len(), 15);
        for tap in [name.as_str(), &spare_name(0), &spare_name(31)] {
            assert!(is_tap(tap), "{tap}");
        }
        for other in ["husk-", "husk-a", "husk0", "eth0", "husk-1a", "husk-s", "husk-sa", "husk-1s"] {
            assert!(!is_tap(other), "{other}");
        }
    }

    #[test]
    fn an_alias_names_its_vm_and_fits() {
        let longest = format!("{}/{}", "n".repeat(76), "s".repeat(76));
        assert!(alias(&longest, Some("fifteen-letters")).len() < 256);
        assert!(alias("ns/a", None).starts_with(&alias_prefix("ns/a")));
        assert!(!alias("ns/ab", None).starts_with(&alias_prefix("ns/a")));
    }
}
