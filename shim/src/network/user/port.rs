//! Ports of the host, and their mappings to ports of the guest. Pure.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The protocol of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The names in annotations, and in the VMM's arguments.
    pub(crate) const NAMES: [(&str, Self); 2] = [("tcp", Self::Tcp), ("udp", Self::Udp)];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostPort {
    /// The protocol.
    pub protocol: Protocol,
    /// The host's address, or 0.0.0.0 for all of its IPv4 addresses.
    pub address: Ipv4Addr,
    /// The number.
    pub port: u16,
}

impl HostPort {
    /// Whether a host can give only one of the two away.
    pub fn overlaps(&self, other: &Self) -> bool {
        let any = self.address.is_unspecified() || other.address.is_unspecified();
        (self.protocol, self.port) == (other.protocol, other.port) && (any || self.address == other.address)
    }

    /// A file's name.
    pub(crate) fn file_name(&self) -> String {
        format!("{}-{}-{}", self.protocol.name(), self.address, self.port)
    }

    /// The port that [`file_name`](Self::file_name) made the name from.
    pub(crate) fn from_file_name(name: &str) -> Option<Self> {
        let mut parts = name.splitn(3, '-');
        let protocol = parts.next()?;
        let protocol = Protocol::NAMES.iter().find(|(name, _)| *name == protocol)?.1;
        let address = Ipv4Addr::from_str(parts.next()?).ok()?;
        Some(Self { protocol, address, port: parts.next()?.parse().ok()? })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.address, self.port, self.protocol.name())
    }
}

/// A port of the host that leads to a port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// The host's port.
    pub host: HostPort,
    /// The guest's port.
    pub guest: u16,
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.host, self.guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(protocol: Protocol, address: &str, port: u16) -> HostPort {
        HostPort { protocol, address: address.parse().unwrap(), port }
    }

    #[test]
    fn ports_overlap_on_one_address_or_on_all() {
        use Protocol::{Tcp, Udp};
        let local = port(Tcp, "127.0.0.1", 80);
        let table = [
            (local, true),
            (port(Tcp, "0.0.0.0", 80), true),
            (port(Tcp, "127.0.0.2", 80), false),
            (port(Tcp, "127.0.0.1", 81), false),
            (port(Udp, "127.0.0.1", 80), false),
        ];
        for (other, expected) in table {
            assert_eq!((local.overlaps(&other), other.overlaps(&local)), (expected, expected), "{other}");
        }
    }

    #[test]
    fn a_ports_file_name_reads_back() {
        let port = port(Protocol::Udp, "127.0.0.1", 5353);
        assert_eq!(port.file_name(), "udp-127.0.0.1-5353");
        assert_eq!(HostPort::from_file_name(&port.file_name()), Some(port));
        for other in ["lock", "new", "tcp", "tcp-1-2", "tcp-127.0.0.1-65536", "sctp-127.0.0.1-1", "tcp-127.0.0.1-1-2"] {
            assert_eq!(HostPort::from_file_name(other), None, "{other}");
        }
        assert_eq!(PortMapping { host: port, guest: 53 }.to_string(), "127.0.0.1:5353/udp -> 53");
    }
}
