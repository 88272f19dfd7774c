//! A blocking rtnetlink socket.

use std::io::{self, ErrorKind};

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::error::NetlinkError;

/// The kernel replies within the system call that sends a request, so a reply that is missing now never arrives.
const REPLY_TIMEOUT_S: i64 = 5;
/// Bytes of a reply. The kernel fills at most 32 KiB per message of a dump (af_netlink.c).
const REPLY_MAX: usize = 32 * 1024;
/// How often to repeat a dump during which the dumped objects changed.
const DUMPS_MAX: u32 = 8;
/// Bytes of `struct nlmsghdr`, which an error message repeats.
const HEADER: usize = 16;
/// `enum nlmsgerr_attrs` of linux/netlink.h.
const NLMSGERR_ATTR_MSG: u16 = 1;

pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            // Errors carry the kernel's explanation, and only the header of the failed request.
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(REPLY_TIMEOUT_S))?;
            io::Result::Ok(socket)
        };
        Ok(Self { socket: open().map_err(NetlinkError::Open)?, sequence: 0, buffer: vec![0; REPLY_MAX] })
    }

    /// Changes something. `flags` are those of netlink(7) besides NLM_F_REQUEST and NLM_F_ACK.
    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.send(message, NLM_F_ACK | flags)?;
        self.receive(|_| {}).map(|_| ())
    }

    /// Lists all objects of the kind of `message`.
    pub(super) fn dump(&mut self, message: &RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut objects = Vec::new();
        for _ in 0..DUMPS_MAX {
            objects.clear();
            self.send(message.clone(), NLM_F_DUMP)?;
            if self.receive(|object| objects.push(object))? {
                break;
            }
        }
        Ok(objects)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(|_| ()).map_err(NetlinkError::Send)
    }

    /// Receives the reply to the last request, up to the acknowledgement or the end of the dump. Returns whether
    /// nothing changed during the dump.
    fn receive(&mut self, mut each: impl FnMut(RouteNetlinkMessage)) -> Result<bool, NetlinkError> {
        let mut consistent = true;
        loop {
            let length = self.receive_datagram()?;
            let mut rest = &self.buffer[..length];
            while !rest.is_empty() {
                let reply = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(NetlinkError::Decode)?;
                let size = (reply.header.length as usize).max(HEADER).next_multiple_of(4);
                rest = rest.get(size..).unwrap_or_default();
                if reply.header.sequence_number != self.sequence {
                    continue;
                }
                consistent &= reply.header.flags & NLM_F_DUMP_INTR == 0;
                match reply.payload {
                    NetlinkPayload::InnerMessage(object) => each(object),
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok(consistent),
                    NetlinkPayload::Done(done) => {
                        return Err(NetlinkError::Rejected(io::Error::from_raw_os_error(done.code.abs())));
                    }
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(consistent),
                    NetlinkPayload::Error(error) => return Err(rejection(&error)),
                    _ => {}
                }
            }
        }
    }

    fn receive_datagram(&mut self) -> Result<usize, NetlinkError> {
        loop {
            match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(length) => return Ok(length.min(REPLY_MAX)),
                // Signals interrupt a receive with a timeout even if their handlers restart system calls (signal(7)).
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(NetlinkError::Receive(error)),
            }
        }
    }
}

fn rejection(error: &ErrorMessage) -> NetlinkError {
    let explanation = NlasIterator::new(error.header.get(HEADER..).unwrap_or_default())
        .filter_map(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned());
    match explanation {
        Some(explanation) => NetlinkError::Explained { explanation, source: error.to_io() },
        None => NetlinkError::Rejected(error.to_io()),
    }
}
