//! The guest's network as a request describes it, with links identified by their index.

use std::fmt::{self, Display, Formatter};
use std::net::{IpAddr, Ipv4Addr};

use husk_protos::mac::mac_text;

pub(super) type Mac = [u8; 6];

/// RT_TABLE_MAIN and RTN_UNICAST of linux/rtnetlink.h.
pub(super) const TABLE_MAIN: u32 = 254;
pub(super) const UNICAST: u8 = 1;

/// A link that the guest has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Option<Mac>,
    /// Only hardware has one: other links may copy a device's current address.
    pub(super) permanent_mac: Option<Mac>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) loopback: bool,
}

/// Identifies a link. The name is for messages: a renamed link is the same link.
#[derive(Debug, Clone, Eq)]
pub(super) struct LinkId {
    pub(super) index: u32,
    pub(super) name: String,
}

impl PartialEq for LinkId {
    fn eq(&self, other: &Self) -> bool {
        self.index == other.index
    }
}

/// A whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) links: Vec<Link>,
    /// In the order of the request.
    pub(super) objects: Vec<Object>,
    pub(super) sysctls: Vec<Sysctl>,
}

/// A sysctl and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sysctl {
    /// The link that it belongs to.
    pub(super) link: Option<LinkId>,
    /// Below /proc/sys/net.
    pub(super) path: String,
    pub(super) value: String,
}

/// What earlier requests left.
#[derive(Debug, Default)]
pub(super) struct Applied {
    pub(super) network: Network,
    /// Whether all of it was added. After a failure it contains objects that may not exist.
    pub(super) complete: bool,
}

impl Applied {
    pub(super) fn complete(network: Network) -> Self {
        Self { network, complete: true }
    }

    /// After `next` was applied on top of this configuration, but not completely.
    pub(super) fn incomplete(self, next: Network) -> Self {
        let mut network = self.network;
        network.links.retain(|link| next.links.iter().all(|other| other.id != link.id));
        network.links.extend(next.links);
        network.objects.retain(|object| !next.objects.contains(object));
        network.objects.extend(next.objects);
        network.sysctls = next.sysctls;
        Self { network, complete: false }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    /// With the name that the link gets.
    pub(super) id: LinkId,
    pub(super) mac: Mac,
    /// Bytes; 0 leaves it as it is.
    pub(super) mtu: u32,
    pub(super) up: bool,
}

/// Something that can be added to and removed from the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Object {
    Address(Address),
    Route(Route),
    Rule(Rule),
    Neighbour(Neighbour),
}

impl Object {
    pub(super) fn link(&self) -> Option<&LinkId> {
        match self {
            Self::Address(address) => Some(&address.link),
            Self::Route(route) => route.link.as_ref(),
            Self::Rule(_) => None,
            Self::Neighbour(neighbour) => Some(&neighbour.link),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) link: LinkId,
    pub(super) local: IpAddr,
    pub(super) prefix_length: u8,
    /// The other end of a point-to-point link.
    pub(super) peer: Option<IpAddr>,
    pub(super) broadcast: Option<Ipv4Addr>,
    pub(super) flags: u32,
    pub(super) scope: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    /// The unspecified address for a default route, whose prefix has no bits.
    pub(super) destination: IpAddr,
    pub(super) prefix_length: u8,
    pub(super) link: Option<LinkId>,
    /// May be an IPv6 address for an IPv4 route (RFC 5549).
    pub(super) gateway: Option<IpAddr>,
    pub(super) source: Option<IpAddr>,
    /// Metric; 0 for the kernel's default.
    pub(super) priority: u32,
    pub(super) table: u32,
    pub(super) scope: u8,
    pub(super) protocol: u8,
    pub(super) kind: u8,
    pub(super) flags: u32,
    /// 0 for none.
    pub(super) mtu: u32,
    /// Largest TCP segment to advertise, bytes; 0 for none.
    pub(super) advmss: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) ipv6: bool,
    pub(super) priority: u32,
    pub(super) table: u32,
    pub(super) action: u8,
    pub(super) source: Option<(IpAddr, u8)>,
    pub(super) destination: Option<(IpAddr, u8)>,
    /// Empty for any. The kernel matches the name, whether or not such a link exists.
    pub(super) input_link: String,
    pub(super) output_link: String,
    pub(super) mark: u32,
    pub(super) mask: u32,
    pub(super) flags: u32,
}

/// A permanent neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub(super) link: LinkId,
    pub(super) address: IpAddr,
    pub(super) mac: Mac,
}

impl Display for Object {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Route(route) => route.fmt(f),
            Self::Rule(rule) => rule.fmt(f),
            Self::Neighbour(Neighbour { link, address, mac }) => {
                write!(f, "neighbour {address} ({}) on {}", mac_text(mac), link.name)
            }
        }
    }
}

impl Display for Address {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "address {}", self.local)?;
        if let Some(peer) = self.peer {
            write!(f, " peer {peer}")?;
        }
        write!(f, "/{} on {}", self.prefix_length, self.link.name)
    }
}

impl Display for Route {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "route {}/{}", self.destination, self.prefix_length)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(link) = &self.link {
            write!(f, " on {}", link.name)?;
        }
        if self.priority != 0 {
            write!(f, " metric {}", self.priority)?;
        }
        if self.table != TABLE_MAIN {
            write!(f, " table {}", self.table)?;
        }
        Ok(())
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} rule {}", if self.ipv6 { "IPv6" } else { "IPv4" }, self.priority)?;
        for (name, prefix) in [("from", self.source), ("to", self.destination)] {
            if let Some((address, length)) = prefix {
                write!(f, " {name} {address}/{length}")?;
            }
        }
        for (name, link) in [("iif", &self.input_link), ("oif", &self.output_link)] {
            if !link.is_empty() {
                write!(f, " {name} {link}")?;
            }
        }
        write!(f, " table {}", self.table)
    }
}
