//! The sandbox's tables of nf_tables. In the notation of nft(8):
//!
//! ```text
//! table inet husk-SANDBOX {
//!     chain output {
//!         type nat hook output priority -100
//!         ip daddr 127.0.0.11 tcp dport 53 accept
//!         oif "lo" meta l4proto tcp redirect to :PORT
//!     }
//! }
//! table inet husk-names-SANDBOX {
//!     chain output {
//!         type nat hook output priority -100
//!         ip daddr 127.0.0.11 accept
//!         udp dport 53 redirect to :PORT
//!         tcp dport 53 redirect to :PORT
//!     }
//! }
//! ```
//!
//! Connections to all addresses of the namespace leave through `lo`. 127.0.0.11 is docker's DNS server, on the host. Its
//! own rules have the same priority, and come before or after these.

use std::time::Instant;

use husk_protos::NAME_SERVER;
use husk_protos::nftables::{Action, Match, Rule, remove as removal, replace};
use libc::{IPPROTO_TCP, IPPROTO_UDP};

use super::netfilter::Netfilter;
use crate::network::error::{NetlinkError, ObjectError};
use crate::network::link::LOOPBACK_INDEX;

/// Adds the table for connections to addresses of the namespace, in place of one with the same name.
pub(super) fn add_connections(table: &str, port: u16, deadline: Instant) -> Result<(), ObjectError> {
    let queries = [Match::Address(*NAME_SERVER.ip()), Match::Protocol(IPPROTO_TCP), Match::Port(NAME_SERVER.port())];
    let connections = [Match::Link(LOOPBACK_INDEX), Match::Protocol(IPPROTO_TCP)];
    let rules = [
        Rule { matches: &queries, action: Action::Accept },
        Rule { matches: &connections, action: Action::Redirect(port) },
    ];
    add(table, &rules, deadline)
}

/// Adds the table for DNS queries, in place of one with the same name.
pub(super) fn add_queries(table: &str, port: u16, deadline: Instant) -> Result<(), ObjectError> {
    let to_server = [Match::Address(*NAME_SERVER.ip())];
    let [udp, tcp] =
        [IPPROTO_UDP, IPPROTO_TCP].map(|protocol| [Match::Protocol(protocol), Match::Port(NAME_SERVER.port())]);
    let rules = [
        Rule { matches: &to_server, action: Action::Accept },
        Rule { matches: &udp, action: Action::Redirect(port) },
        Rule { matches: &tcp, action: Action::Redirect(port) },
    ];
    add(table, &rules, deadline)
}

fn add(table: &str, rules: &[Rule<'_>], deadline: Instant) -> Result<(), ObjectError> {
    send(&replace(table, rules), deadline).map_err(|error| error.at(format!("nf_tables table {table}"), "add it"))
}

/// Removes a table.
pub(super) fn remove(table: &str, deadline: Instant) -> Result<(), ObjectError> {
    match send(&removal(table), deadline) {
        // There is none, or the kernel has no nf_tables, or the table has another owner.
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EPERM)) => Ok(()),
        Err(NetlinkError::Socket { source, .. }) if source.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(()),
        other => other.map_err(|error| error.at(format!("nf_tables table {table}"), "remove it")),
    }
}

/// Sends a batch in the thread's network namespace. Its last change requests an acknowledgement.
fn send(batch: &[u8], deadline: Instant) -> Result<(), NetlinkError> {
    Netfilter::open()?.request(batch, deadline).map(drop)
}
