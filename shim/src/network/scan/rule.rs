//! Rules of policy routing, beyond those that every namespace has. Pure.

use husk_protos::network::NetworkRule;
use netlink_packet_core::Nla;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};

use super::address::octets;
use crate::network::error::ObjectError;

/// FRA_PAD aligns other attributes.
const FRA_PAD: u16 = 18;
/// Priority and table of the default rules: `local`, `main` and, for IPv4, `default` (ip-rule(8)).
const DEFAULTS: [(u32, u32); 3] = [(0, 255), (32766, 254), (32767, 253)];

/// Converts a rule; none for the default rules.
pub(super) fn rule(message: &RuleMessage) -> Result<Option<NetworkRule>, ObjectError> {
    let header = &message.header;
    let mut rule = NetworkRule::new();
    rule.family = u8::from(header.family).into();
    rule.table = header.table.into();
    rule.action = u8::from(header.action).into();
    rule.source_length = header.src_len.into();
    rule.destination_length = header.dst_len.into();
    // The other flags are states, such as FIB_RULE_IIF_DETACHED.
    rule.flags = (header.flags & RuleFlags::Invert).bits();
    let mut unsupported = (header.tos != 0).then(|| "a type of service".to_owned());
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Source(address) => rule.source = octets(*address),
            RuleAttribute::Destination(address) => rule.destination = octets(*address),
            RuleAttribute::Iifname(name) => rule.input_link.clone_from(name),
            RuleAttribute::Oifname(name) => rule.output_link.clone_from(name),
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mask = *mask,
            // -1: not set. The kernel always sends the first.
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            // Who added the rule.
            RuleAttribute::Protocol(_) => {}
            RuleAttribute::SuppressPrefixLen(_) => unsupported = Some("suppress_prefixlength".into()),
            RuleAttribute::SuppressIfGroup(_) => unsupported = Some("suppress_ifgroup".into()),
            RuleAttribute::Goto(_) => unsupported = Some("goto".into()),
            RuleAttribute::UidRange(_) => unsupported = Some("a range of users".into()),
            RuleAttribute::IpProtocol(_) => unsupported = Some("an IP protocol".into()),
            RuleAttribute::SourcePortRange(_) | RuleAttribute::DestinationPortRange(_) => {
                unsupported = Some("a range of ports".into());
            }
            RuleAttribute::Other(nla) if nla.kind() == FRA_PAD => {}
            other => unsupported = Some(format!("attribute {} (FRA_*, linux/fib_rules.h)", other.kind())),
        }
    }
    if unsupported.is_none() && is_default(header.action, &rule) {
        return Ok(None);
    }
    if let Some(what) = unsupported {
        let family = if header.family == AddressFamily::Inet6 { "IPv6" } else { "IPv4" };
        let object = format!("{family} rule with priority {}", rule.priority);
        return Err(ObjectError::unsupported(object, format!("rules with {what} are not supported")));
    }
    Ok(Some(rule))
}

fn is_default(action: RuleAction, rule: &NetworkRule) -> bool {
    let mut plain = NetworkRule::new();
    (plain.family, plain.action, plain.priority, plain.table) = (rule.family, rule.action, rule.priority, rule.table);
    action == RuleAction::ToTable && DEFAULTS.contains(&(rule.priority, rule.table)) && *rule == plain
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::rule::RulePortRange;

    use super::*;

    fn message(priority: u32, table: u32, attributes: Vec<RuleAttribute>) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.action = RuleAction::ToTable;
        message.attributes.push(RuleAttribute::Priority(priority));
        message.attributes.push(RuleAttribute::Table(table));
        message.attributes.push(RuleAttribute::SuppressPrefixLen(u32::MAX));
        message.attributes.extend(attributes);
        message
    }

    #[test]
    fn default_rules_are_left_out() {
        let mark = || vec![RuleAttribute::FwMark(1)];
        let table = [
            (message(0, 255, vec![]), false),
            (message(32766, 254, vec![]), false),
            (message(32767, 253, vec![]), false),
            (message(32766, 254, mark()), true),
            (message(100, 254, vec![]), true),
            (message(0, 254, vec![]), true),
        ];
        for (message, expected) in table {
            assert_eq!(rule(&message).unwrap().is_some(), expected, "{message:?}");
        }
    }

    #[test]
    fn every_field_is_converted() {
        let mut message = message(
            100,
            1000,
            vec![
                RuleAttribute::Source([10, 0, 0, 0].into()),
                RuleAttribute::Destination([10, 1, 0, 0].into()),
                RuleAttribute::Iifname("eth0".into()),
                RuleAttribute::Oifname("eth1".into()),
                RuleAttribute::FwMark(3),
                RuleAttribute::FwMask(7),
            ],
        );
        (message.header.src_len, message.header.dst_len) = (8, 16);
        message.header.flags = RuleFlags::Invert | RuleFlags::IifDetached;
        let mut expected = NetworkRule::new();
        (expected.family, expected.priority, expected.table, expected.action) = (2, 100, 1000, 1);
        (expected.source, expected.source_length) = (vec![10, 0, 0, 0], 8);
        (expected.destination, expected.destination_length) = (vec![10, 1, 0, 0], 16);
        (expected.input_link, expected.output_link) = ("eth0".into(), "eth1".into());
        (expected.mark, expected.mask, expected.flags) = (3, 7, 2);
        assert_eq!(rule(&message).unwrap(), Some(expected));
    }

    #[test]
    fn what_husk_cannot_express_is_rejected_by_name() {
        let table = [
            (RuleAttribute::SuppressPrefixLen(0), "suppress_prefixlength"),
            (RuleAttribute::DestinationPortRange(RulePortRange { start: 1, end: 2 }), "a range of ports"),
            (RuleAttribute::Other(DefaultNla::new(99, vec![])), "attribute 99 (FRA_*, linux/fib_rules.h)"),
        ];
        for (attribute, expected) in table {
            let error = rule(&message(7, 254, vec![attribute])).unwrap_err().to_string();
            assert_eq!(error, format!("IPv4 rule with priority 7: rules with {expected} are not supported"));
        }
    }
}
