//! The errors of a configuration.

use std::io;

use netlink_packet_core::DecodeError;

/// A configuration that was not applied, or not completely.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetworkError {
    #[error("{object}: {problem}")]
    Invalid { object: String, problem: String },
    #[error("link {link}: the guest has no network device with the MAC address {mac}")]
    NoDevice { link: String, mac: String },
    #[error("give the driver to the NICs")]
    Attach(#[source] io::Error),
    #[error("take the driver from NIC {name}")]
    Detach { name: String, source: io::Error },
    #[error("relay DNS queries to 127.0.0.11, as docker's networks need")]
    Names(#[source] io::Error),
    #[error("list the links")]
    List(#[source] NetlinkError),
    #[error("{change}")]
    Change { change: String, source: NetlinkError },
    #[error("{change}")]
    Sysctl { change: String, source: io::Error },
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// A request to the kernel that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetlinkError {
    #[error("open a netlink socket")]
    Open(#[source] io::Error),
    #[error("send a netlink message")]
    Send(#[source] io::Error),
    #[error("receive the kernel's reply")]
    Receive(#[source] io::Error),
    #[error("decode the kernel's reply")]
    Decode(#[source] DecodeError),
    /// The kernel's explanation (NLMSGERR_ATTR_MSG) and error code.
    #[error("{explanation}")]
    Explained { explanation: String, source: io::Error },
    #[error(transparent)]
    Rejected(io::Error),
}

impl NetlinkError {
    /// The kernel's error code, if the kernel rejected the request.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Explained { source, .. } | Self::Rejected(source) => source.raw_os_error(),
            _ => None,
        }
    }
}
