//! The sandbox's table of nf_tables. In the notation of nft(8):
//!
//! ```text
//! table inet husk-SANDBOX {
//!     chain output {
//!         type nat hook output priority -100
//!         oif "lo" meta l4proto tcp redirect to :PORT
//!     }
//! }
//! ```
//!
//! Connections to all addresses of the namespace leave through `lo`. The kernel's messages, because nft is not on every
//! node, and takes longer than everything else that is done here.

use std::time::Instant;

use libc::{
    NF_INET_LOCAL_OUT, NFT_CMP_EQ, NFT_META_L4PROTO, NFT_META_OIF, NFT_REG_1, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE,
};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::{TimeVal, TimeValLike};

use super::batch::{Attributes, Batch, Change};
use crate::network::error::{NetlinkError, ObjectError};
use crate::network::link::LOOPBACK_INDEX;
use crate::network::reply::{Content, replies};

// Attributes, from linux/netfilter/nf_tables.h.
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_REDIR_REG_PROTO_MIN: u16 = 1;

const CHAIN: &str = "output";
/// NF_IP_PRI_NAT_DST: where destinations are translated.
const PRIORITY: i32 = -100;
/// Longest reply: that of a rejected message.
const REPLY: usize = 8 * 1024;

/// Adds the table, in place of one with the same name.
pub(super) fn add(table: &str, port: u16, deadline: Instant) -> Result<(), ObjectError> {
    let mut batch = Batch::new();
    let named = Attributes::default().text(NFTA_TABLE_NAME, table);
    // Deleting requires that it exists.
    batch.add(Change::NewTable, flags(NLM_F_CREATE), &named);
    batch.add(Change::DeleteTable, 0, &named);
    batch.add(Change::NewTable, flags(NLM_F_CREATE), &named);
    batch.add(Change::NewChain, flags(NLM_F_CREATE), &chain(table));
    batch.add(Change::NewRule, flags(NLM_F_CREATE | NLM_F_APPEND | NLM_F_ACK), &rule(table, port));
    send(batch, deadline).map_err(|error| error.at(format!("nf_tables table {table}"), "add it"))
}

/// Removes the table.
pub(super) fn remove(table: &str, deadline: Instant) -> Result<(), ObjectError> {
    let mut batch = Batch::new();
    let named = Attributes::default().text(NFTA_TABLE_NAME, table);
    batch.add(Change::DeleteTable, flags(NLM_F_ACK), &named);
    match send(batch, deadline) {
        // There is none, or the kernel has no nf_tables, or the table has another owner.
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EPERM)) => Ok(()),
        Err(NetlinkError::Socket { source, .. }) if source.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(()),
        other => other.map_err(|error| error.at(format!("nf_tables table {table}"), "remove it")),
    }
}

fn chain(table: &str) -> Attributes {
    let hook = Attributes::default().number(NFTA_HOOK_HOOKNUM, NF_INET_LOCAL_OUT).number(NFTA_HOOK_PRIORITY, PRIORITY);
    Attributes::default()
        .text(NFTA_CHAIN_TABLE, table)
        .text(NFTA_CHAIN_NAME, CHAIN)
        .nested(NFTA_CHAIN_HOOK, hook)
        .text(NFTA_CHAIN_TYPE, "nat")
}

fn rule(table: &str, port: u16) -> Attributes {
    let load = |key| Attributes::default().number(NFTA_META_DREG, NFT_REG_1).number(NFTA_META_KEY, key);
    let equals = |value: &[u8]| {
        Attributes::default()
            .number(NFTA_CMP_SREG, NFT_REG_1)
            .number(NFTA_CMP_OP, NFT_CMP_EQ)
            .nested(NFTA_CMP_DATA, Attributes::default().bytes(NFTA_DATA_VALUE, value))
    };
    let port = Attributes::default().bytes(NFTA_DATA_VALUE, &port.to_be_bytes());
    let port = Attributes::default().number(NFTA_IMMEDIATE_DREG, NFT_REG_1).nested(NFTA_IMMEDIATE_DATA, port);
    let expressions = Attributes::default()
        .expression("meta", load(NFT_META_OIF))
        .expression("cmp", equals(&LOOPBACK_INDEX.to_ne_bytes()))
        .expression("meta", load(NFT_META_L4PROTO))
        .expression("cmp", equals(&[libc::IPPROTO_TCP as u8]))
        .expression("immediate", port)
        .expression("redir", Attributes::default().number(NFTA_REDIR_REG_PROTO_MIN, NFT_REG_1));
    Attributes::default()
        .text(NFTA_RULE_TABLE, table)
        .text(NFTA_RULE_CHAIN, CHAIN)
        .nested(NFTA_RULE_EXPRESSIONS, expressions)
}

/// Sends a batch in the thread's network namespace. Its last change requests an acknowledgement.
fn send(batch: Batch, deadline: Instant) -> Result<(), NetlinkError> {
    let failed = |action| move |source| NetlinkError::Socket { action, source };
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed("open a netfilter socket"))?;
    socket.bind_auto().map_err(failed("bind a netfilter socket"))?;
    socket.set_ext_ack(true).map_err(failed("request explanations of errors"))?;
    socket.set_cap_ack(true).map_err(failed("request short acknowledgements"))?;
    // A timeout of 0 would be none.
    let left = deadline.saturating_duration_since(Instant::now()).as_millis().max(1);
    let timeout = TimeVal::milliseconds(left.try_into().unwrap_or(i64::from(i32::MAX)));
    setsockopt(&socket, ReceiveTimeout, &timeout)
        .map_err(|errno| failed("limit the time of a netfilter request")(errno.into()))?;
    socket.send(&batch.finish(), 0).map_err(failed("send a netfilter request"))?;
    let mut buffer = vec![0; REPLY];
    loop {
        let received = socket.recv(&mut buffer.as_mut_slice(), 0);
        let length = match received {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Err(NetlinkError::Deadline),
            other => other.map_err(failed("receive the reply to a netfilter request"))?,
        };
        for reply in replies(&buffer[..length])? {
            match reply.content {
                // Errors of earlier changes arrive before the acknowledgement.
                Content::Rejected { errno, text } => return Err(NetlinkError::Rejected { errno, text }),
                Content::Done => return Ok(()),
                Content::Object(_) | Content::Noop => {}
            }
        }
    }
}

fn flags(flags: i32) -> u16 {
    flags as u16
}
