//! The kernel's replies to netlink requests, as bytes. Pure.
//!
//! Sources: netlink(7), and "Introduction to Netlink" in the kernel's documentation (userspace-api/netlink/intro.rst).

use netlink_packet_core::{
    DecodeError, NLM_F_ACK_TLVS, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NetlinkBuffer, NlasIterator,
};

use super::error::NetlinkError;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Attribute of an error that explains it (linux/netlink.h).
const NLMSGERR_ATTR_MSG: u16 = 1;

/// One message of a reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply<'a> {
    /// The request that it answers.
    pub(super) sequence: u32,
    /// The objects changed while the kernel listed them: the list is inconsistent.
    pub(super) interrupted: bool,
    /// What it says.
    pub(super) content: Content<'a>,
}

/// What one message of a reply says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content<'a> {
    /// An object, with its header.
    Object(&'a [u8]),
    /// The request was carried out, or the list is complete.
    Done,
    /// The request was rejected.
    Rejected {
        /// errno(3).
        errno: i32,
        /// The kernel's explanation.
        text: Option<String>,
    },
    /// Nothing.
    Noop,
}

/// Splits a datagram into messages.
pub(super) fn replies(mut datagram: &[u8]) -> Result<Vec<Reply<'_>>, NetlinkError> {
    let mut replies = Vec::new();
    while !datagram.is_empty() {
        let buffer = NetlinkBuffer::new_checked(&datagram).map_err(NetlinkError::Decode)?;
        let (length, flags) = (buffer.length() as usize, buffer.flags());
        let message = datagram.get(..length).ok_or_else(truncated)?;
        let payload = message.get(HEADER..).ok_or_else(truncated)?;
        let content = match buffer.message_type() {
            NLMSG_NOOP => Content::Noop,
            NLMSG_DONE if payload.is_empty() => Content::Done,
            NLMSG_DONE => outcome(payload, 4, flags)?,
            // The error code is followed by the header of the request: NETLINK_CAP_ACK is set.
            NLMSG_ERROR => outcome(payload, 4 + HEADER, flags)?,
            _ => Content::Object(message),
        };
        let interrupted = flags & NLM_F_DUMP_INTR != 0;
        replies.push(Reply { sequence: buffer.sequence_number(), interrupted, content });
        // The next message is aligned to 4 bytes; the last one may lack its padding.
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(replies)
}

/// Decodes an error code and the attributes at `attributes`.
fn outcome(payload: &[u8], attributes: usize, flags: u16) -> Result<Content<'static>, NetlinkError> {
    let code = payload.first_chunk().map(|code| i32::from_ne_bytes(*code)).ok_or_else(truncated)?;
    if code == 0 {
        return Ok(Content::Done);
    }
    let attributes = payload.get(attributes..).filter(|_| flags & NLM_F_ACK_TLVS != 0);
    Ok(Content::Rejected { errno: code.saturating_neg(), text: attributes.and_then(explanation) })
}

fn explanation(attributes: &[u8]) -> Option<String> {
    let attribute = NlasIterator::new(attributes).flatten().find(|nla| nla.kind() == NLMSGERR_ATTR_MSG)?;
    let text = String::from_utf8_lossy(attribute.value());
    Some(text.trim_end_matches('\0').to_owned())
}

fn truncated() -> NetlinkError {
    NetlinkError::Decode(DecodeError::from("truncated message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message: type, flags and payload.
    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(HEADER + payload.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn error(code: i32, text: &str) -> Vec<u8> {
        let mut payload = code.to_ne_bytes().to_vec();
        payload.extend([0; HEADER]);
        if !text.is_empty() {
            payload.extend(u16::try_from(4 + text.len() + 1).unwrap().to_ne_bytes());
            payload.extend(NLMSGERR_ATTR_MSG.to_ne_bytes());
            payload.extend(text.bytes());
            payload.push(0);
        }
        payload
    }

    #[test]
    fn each_kind_of_reply_is_recognized() {
        let busy = |text: Option<&str>| Content::Rejected { errno: libc::EBUSY, text: text.map(str::to_owned) };
        let object = message(16, 2, &[1, 2, 3, 4, 5]);
        let table: [(Vec<u8>, Vec<Content<'_>>); 8] = [
            (Vec::new(), vec![]),
            (object.clone(), vec![Content::Object(&object[..HEADER + 5])]),
            (
                [object.clone(), message(NLMSG_DONE, 2, &0i32.to_ne_bytes())].concat(),
                vec![Content::Object(&object[..HEADER + 5]), Content::Done],
            ),
            (message(NLMSG_DONE, 2, &[]), vec![Content::Done]),
            (message(NLMSG_ERROR, 0, &error(0, "")), vec![Content::Done]),
            (message(NLMSG_ERROR, 0, &error(-libc::EBUSY, "")), vec![busy(None)]),
            (message(NLMSG_ERROR, NLM_F_ACK_TLVS, &error(-libc::EBUSY, "try later")), vec![busy(Some("try later"))]),
            (message(NLMSG_DONE, 2, &(-libc::EBUSY).to_ne_bytes()), vec![busy(None)]),
        ];
        for (bytes, expected) in table {
            let replies = replies(&bytes).unwrap();
            assert!(replies.iter().all(|reply| reply.sequence == 7 && !reply.interrupted));
            assert_eq!(replies.into_iter().map(|reply| reply.content).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn an_interrupted_dump_is_recognized() {
        let bytes = message(NLMSG_DONE, NLM_F_DUMP_INTR, &[]);
        assert!(replies(&bytes).unwrap()[0].interrupted);
    }

    #[test]
    fn truncated_replies_are_errors() {
        let bytes = message(NLMSG_ERROR, 0, &error(0, ""));
        for length in [1, HEADER - 1, HEADER, bytes.len() - 1] {
            assert!(replies(&bytes[..length]).is_err(), "{length} bytes");
        }
        assert!(replies(&message(NLMSG_ERROR, 0, &[0, 0])).is_err());
    }
}
