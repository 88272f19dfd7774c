//! Tables of nf_tables that redirect connections of the network namespace's own programs, as messages for the kernel.
//! Pure: whoever sends them does so in the notation of netlink(7), over NETLINK_NETFILTER. Shim and init use the kernel's
//! messages, because nft(8) is not on every node, and takes longer than everything else that is done here.

mod batch;

use std::net::Ipv4Addr;

use libc::{
    NF_ACCEPT, NF_INET_LOCAL_OUT, NFPROTO_IPV4, NFT_CMP_EQ, NFT_META_L4PROTO, NFT_META_NFPROTO, NFT_META_OIF,
    NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER, NFT_REG_1, NFT_REG_VERDICT, NLM_F_ACK, NLM_F_APPEND,
    NLM_F_CREATE,
};

pub use batch::Attributes;
use batch::{Batch, Change};

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
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_REDIR_REG_PROTO_MIN: u16 = 1;

const CHAIN: &str = "output";
/// NF_IP_PRI_NAT_DST: where destinations are translated.
const PRIORITY: i32 = -100;
/// Where the destination is in an IPv4 header (RFC 791).
const IPV4_DESTINATION: i32 = 16;
/// Where the destination's port is in the headers of TCP and UDP (RFC 9293, RFC 768).
const DESTINATION_PORT: i32 = 2;

/// What a rule applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// Packets that leave through the link with this index.
    Link(u32),
    /// Packets to this address.
    Address(Ipv4Addr),
    /// IPPROTO_TCP or IPPROTO_UDP.
    Protocol(i32),
    /// The destination's port, after a protocol.
    Port(u16),
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Skips the table's further rules.
    Accept,
    /// Sends the connection to this port of the namespace's loopback address, 127.0.0.1 or ::1.
    Redirect(u16),
}

/// A rule: it applies to connections that fulfil all conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule<'a> {
    /// The conditions.
    pub matches: &'a [Match],
    /// What happens to the connections.
    pub action: Action,
}

/// Adds a table of the family `inet` with these rules for the connections of the namespace's own programs, in place of
/// one with the same name. The kernel acknowledges the last message. `rules` must not be empty.
pub fn replace(table: &str, rules: &[Rule<'_>]) -> Vec<u8> {
    let mut batch = Batch::new();
    let named = named(table);
    // Deleting requires that it exists.
    batch.add(Change::NewTable, flags(NLM_F_CREATE), &named);
    batch.add(Change::DeleteTable, 0, &named);
    batch.add(Change::NewTable, flags(NLM_F_CREATE), &named);
    batch.add(Change::NewChain, flags(NLM_F_CREATE), &chain(table));
    for (number, rule) in rules.iter().enumerate() {
        let acknowledge = if number + 1 == rules.len() { NLM_F_ACK } else { 0 };
        batch.add(Change::NewRule, flags(NLM_F_CREATE | NLM_F_APPEND | acknowledge), &rule.attributes(table));
    }
    batch.finish()
}

/// Removes a table. The kernel acknowledges the message, with ENOENT if there is no such table.
pub fn remove(table: &str) -> Vec<u8> {
    let mut batch = Batch::new();
    batch.add(Change::DeleteTable, flags(NLM_F_ACK), &named(table));
    batch.finish()
}

fn named(table: &str) -> Attributes {
    Attributes::default().text(NFTA_TABLE_NAME, table)
}

fn chain(table: &str) -> Attributes {
    let hook = Attributes::default().number(NFTA_HOOK_HOOKNUM, NF_INET_LOCAL_OUT).number(NFTA_HOOK_PRIORITY, PRIORITY);
    Attributes::default()
        .text(NFTA_CHAIN_TABLE, table)
        .text(NFTA_CHAIN_NAME, CHAIN)
        .nested(NFTA_CHAIN_HOOK, hook)
        .text(NFTA_CHAIN_TYPE, "nat")
}

impl Rule<'_> {
    fn attributes(&self, table: &str) -> Attributes {
        let matched = self.matches.iter().fold(Attributes::default(), |rule, condition| condition.add_to(rule));
        Attributes::default()
            .text(NFTA_RULE_TABLE, table)
            .text(NFTA_RULE_CHAIN, CHAIN)
            .nested(NFTA_RULE_EXPRESSIONS, self.action.add_to(matched))
    }
}

impl Match {
    fn add_to(self, rule: Attributes) -> Attributes {
        match self {
            Self::Link(index) => meta(rule, NFT_META_OIF, &index.to_ne_bytes()),
            Self::Address(address) => {
                let ipv4 = meta(rule, NFT_META_NFPROTO, &[NFPROTO_IPV4 as u8]);
                payload(ipv4, NFT_PAYLOAD_NETWORK_HEADER, IPV4_DESTINATION, &address.octets())
            }
            Self::Protocol(protocol) => meta(rule, NFT_META_L4PROTO, &[protocol as u8]),
            Self::Port(port) => payload(rule, NFT_PAYLOAD_TRANSPORT_HEADER, DESTINATION_PORT, &port.to_be_bytes()),
        }
    }
}

impl Action {
    fn add_to(self, rule: Attributes) -> Attributes {
        match self {
            Self::Accept => {
                let verdict = Attributes::default().number(NFTA_VERDICT_CODE, NF_ACCEPT);
                immediate(rule, NFT_REG_VERDICT, Attributes::default().nested(NFTA_DATA_VERDICT, verdict))
            }
            Self::Redirect(port) => {
                let port = Attributes::default().bytes(NFTA_DATA_VALUE, &port.to_be_bytes());
                let redirect = Attributes::default().number(NFTA_REDIR_REG_PROTO_MIN, NFT_REG_1);
                immediate(rule, NFT_REG_1, port).expression("redir", redirect)
            }
        }
    }
}

/// Compares a property of the packet.
fn meta(rule: Attributes, key: i32, value: &[u8]) -> Attributes {
    let load = Attributes::default().number(NFTA_META_DREG, NFT_REG_1).number(NFTA_META_KEY, key);
    equals(rule.expression("meta", load), value)
}

/// Compares bytes of a header.
fn payload(rule: Attributes, base: i32, offset: i32, value: &[u8]) -> Attributes {
    let load = Attributes::default()
        .number(NFTA_PAYLOAD_DREG, NFT_REG_1)
        .number(NFTA_PAYLOAD_BASE, base)
        .number(NFTA_PAYLOAD_OFFSET, offset)
        .number(NFTA_PAYLOAD_LEN, value.len() as i32);
    equals(rule.expression("payload", load), value)
}

fn equals(rule: Attributes, value: &[u8]) -> Attributes {
    let compare = Attributes::default()
        .number(NFTA_CMP_SREG, NFT_REG_1)
        .number(NFTA_CMP_OP, NFT_CMP_EQ)
        .nested(NFTA_CMP_DATA, Attributes::default().bytes(NFTA_DATA_VALUE, value));
    rule.expression("cmp", compare)
}

fn immediate(rule: Attributes, register: i32, data: Attributes) -> Attributes {
    let load = Attributes::default().number(NFTA_IMMEDIATE_DREG, register).nested(NFTA_IMMEDIATE_DATA, data);
    rule.expression("immediate", load)
}

fn flags(flags: i32) -> u16 {
    flags as u16
}
