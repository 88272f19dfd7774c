//! Messages of netfilter as bytes: linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h and netlink(7).
//!
//! All changes of a batch are made together, or none is.

/// NFNL_SUBSYS_NFTABLES, the high byte of a message's type.
const SUBSYSTEM: u16 = 10;
/// NFNL_MSG_BATCH_BEGIN and NFNL_MSG_BATCH_END.
const BEGIN: u16 = 0x10;
const END: u16 = 0x11;
/// Set in the type of an attribute that contains attributes.
const NLA_F_NESTED: u16 = 0x8000;
/// NFTA_LIST_ELEM, NFTA_EXPR_NAME and NFTA_EXPR_DATA.
const ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// What a message does: NFT_MSG_*.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    NewTable = 0,
    DeleteTable = 2,
    NewChain = 3,
    NewRule = 6,
}

/// A batch of changes to tables of the family `inet`.
pub(super) struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    pub(super) fn new() -> Self {
        let mut batch = Self { bytes: Vec::new(), sequence: 0 };
        batch.message(BEGIN, 0, libc::AF_UNSPEC as u8, SUBSYSTEM, &[]);
        batch
    }

    /// Adds a change. `flags` are NLM_F_CREATE and the like.
    pub(super) fn add(&mut self, change: Change, flags: u16, attributes: &Attributes) {
        let family = libc::NFPROTO_INET as u8;
        self.message(SUBSYSTEM << 8 | change as u16, flags, family, 0, &attributes.0);
    }

    /// The complete batch.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.message(END, 0, libc::AF_UNSPEC as u8, SUBSYSTEM, &[]);
        self.bytes
    }

    /// Appends `struct nlmsghdr`, `struct nfgenmsg` and the attributes.
    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) {
        self.sequence += 1;
        let length = HEADER + 4 + attributes.len();
        self.bytes.extend((length as u32).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((libc::NLM_F_REQUEST as u16 | flags).to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend([family, libc::NFNETLINK_V0 as u8]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(attributes);
    }
}

/// A list of attributes, each padded to 4 bytes.
#[derive(Debug, Default)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// An attribute of any bytes.
    #[must_use]
    pub fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(((4 + value.len()) as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A string with a terminating zero.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// A number in network byte order, as nf_tables has them.
    pub(super) fn number(self, kind: u16, value: i32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// An attribute that contains attributes.
    #[must_use]
    pub fn nested(self, kind: u16, attributes: Self) -> Self {
        self.bytes(kind | NLA_F_NESTED, &attributes.0)
    }

    /// The attributes as bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// An expression of a rule.
    pub(super) fn expression(self, name: &str, data: Self) -> Self {
        let expression = Self::default().text(EXPRESSION_NAME, name).nested(EXPRESSION_DATA, data);
        self.nested(ELEMENT, expression)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_attributes_have_their_lengths_and_padding() {
        let inner = Attributes::default().number(2, 3);
        let mut batch = Batch::new();
        batch.add(Change::NewTable, 0x400, &Attributes::default().text(1, "ab").nested(4, inner));
        let bytes = batch.finish();
        let expected = [
            &[20, 0, 0, 0, 0x10, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10][..],
            &[40, 0, 0, 0, 0, 10, 1, 4, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
            &[7, 0, 1, 0, b'a', b'b', 0, 0],
            &[12, 0, 4, 0x80, 8, 0, 2, 0, 0, 0, 0, 3],
            &[20, 0, 0, 0, 0x11, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10],
        ];
        assert_eq!(bytes, expected.concat());
    }
}
