//! The address that a redirected datagram was sent to. For datagrams there is no socket option like SO_ORIGINAL_DST, so
//! this asks the kernel's connection tracking: linux/netfilter/nfnetlink_conntrack.h.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use husk_protos::lock::lock;
use husk_protos::nftables::Attributes;
use netlink_packet_core::NlasIterator;

use super::netfilter::Netfilter;
use crate::network::error::{NetlinkError, ObjectError};

/// NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_GET: a message's type.
const GET: u16 = 1 << 8 | 1;
// Attributes.
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
/// Length of `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: usize = 16 + 4;
/// The kernel replies within the system call that sends a request, so a reply that is missing now never arrives.
const REPLY: Duration = Duration::from_secs(1);

/// The connections of a network namespace.
pub(crate) struct Connections(Mutex<Netfilter>);

impl Connections {
    /// Those of the thread's network namespace.
    pub(super) fn open() -> Result<Self, ObjectError> {
        Netfilter::open()
            .map(|netfilter| Self(Mutex::new(netfilter)))
            .map_err(|error| error.at("connection tracking", "connect"))
    }

    /// The address that `client` meant with a datagram that has arrived at `local`.
    ///
    /// # Errors
    ///
    /// The kernel does not know the connection.
    pub(crate) fn original_destination(
        &self,
        client: SocketAddr,
        local: SocketAddr,
    ) -> Result<SocketAddr, ObjectError> {
        let failed =
            |error: NetlinkError| error.at(format!("datagram of {client}"), "find out which address was meant");
        let found = lock(&self.0).request(&request(client, local), Instant::now() + REPLY).map_err(failed)?;
        let destination = found.as_deref().and_then(destination);
        destination.ok_or_else(|| {
            let unknown = io::Error::new(io::ErrorKind::InvalidData, "the kernel's reply names no address");
            failed(NetlinkError::Socket { action: "read the connection", source: unknown })
        })
    }
}

/// Asks for the connection whose replies go from `local` to `client`.
fn request(client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let addresses = match (local.ip(), client.ip()) {
        (IpAddr::V4(local), IpAddr::V4(client)) => {
            Attributes::default().bytes(CTA_IP_V4_SRC, &local.octets()).bytes(CTA_IP_V4_DST, &client.octets())
        }
        (local, client) => {
            Attributes::default().bytes(CTA_IP_V6_SRC, &v6(local).octets()).bytes(CTA_IP_V6_DST, &v6(client).octets())
        }
    };
    let ports = Attributes::default()
        .bytes(CTA_PROTO_NUM, &[libc::IPPROTO_UDP as u8])
        .bytes(CTA_PROTO_SRC_PORT, &local.port().to_be_bytes())
        .bytes(CTA_PROTO_DST_PORT, &client.port().to_be_bytes());
    let reply = Attributes::default().nested(CTA_TUPLE_IP, addresses).nested(CTA_TUPLE_PROTO, ports);
    let attributes = Attributes::default().nested(CTA_TUPLE_REPLY, reply).into_bytes();
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut message = ((HEADERS + attributes.len()) as u32).to_ne_bytes().to_vec();
    message.extend(GET.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family as u8, libc::NFNETLINK_V0 as u8, 0, 0]);
    message.extend(attributes);
    message
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// The destination of a connection's first packet.
fn destination(connection: &[u8]) -> Option<SocketAddr> {
    let original = attribute(connection.get(HEADERS..)?, CTA_TUPLE_ORIG)?;
    let addresses = attribute(&original, CTA_TUPLE_IP)?;
    let v4 =
        attribute(&addresses, CTA_IP_V4_DST).and_then(|bytes| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)));
    let v6 =
        attribute(&addresses, CTA_IP_V6_DST).and_then(|bytes| Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)));
    let address = v4.map(IpAddr::from).or(v6.map(IpAddr::from))?;
    let port = attribute(&attribute(&original, CTA_TUPLE_PROTO)?, CTA_PROTO_DST_PORT)?;
    Some((address, u16::from_be_bytes(port.try_into().ok()?)).into())
}

fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(attributes).flatten().find(|found| found.kind() == kind).map(|found| found.value().to_vec())
}
