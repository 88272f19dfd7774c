//! A socket of netfilter. It belongs to the network namespace in which it was opened, and works from any thread.

use std::os::fd::AsFd;
use std::time::Instant;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::{TimeVal, TimeValLike};

use crate::network::error::NetlinkError;
use crate::network::reply::{Content, replies};

/// Longest reply: that of a rejected message, or a connection.
const REPLY: usize = 8 * 1024;

pub(super) struct Netfilter(Socket);

impl Netfilter {
    /// Opens a socket in the thread's network namespace.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let failed = |action| move |source| NetlinkError::Socket { action, source };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed("open a netfilter socket"))?;
        socket.bind_auto().map_err(failed("bind a netfilter socket"))?;
        socket.set_ext_ack(true).map_err(failed("request explanations of errors"))?;
        socket.set_cap_ack(true).map_err(failed("request short acknowledgements"))?;
        Ok(Self(socket))
    }

    /// Sends a request, and waits for its acknowledgement or for the object that it asks for.
    pub(super) fn request(&self, request: &[u8], deadline: Instant) -> Result<Option<Vec<u8>>, NetlinkError> {
        let failed = |action| move |source| NetlinkError::Socket { action, source };
        // A timeout of 0 would be none.
        let left = deadline.saturating_duration_since(Instant::now()).as_millis().max(1);
        let timeout = TimeVal::milliseconds(left.try_into().unwrap_or(i64::from(i32::MAX)));
        setsockopt(&self.0.as_fd(), ReceiveTimeout, &timeout)
            .map_err(|errno| failed("limit the time of a netfilter request")(errno.into()))?;
        self.0.send(request, 0).map_err(failed("send a netfilter request"))?;
        let mut buffer = vec![0; REPLY];
        loop {
            let received = self.0.recv(&mut buffer.as_mut_slice(), 0);
            let length = match received {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Err(NetlinkError::Deadline),
                other => other.map_err(failed("receive the reply to a netfilter request"))?,
            };
            for reply in replies(&buffer[..length])? {
                match reply.content {
                    // Errors of earlier changes arrive before the acknowledgement.
                    Content::Rejected { errno, text } => return Err(NetlinkError::Rejected { errno, text }),
                    Content::Done => return Ok(None),
                    Content::Object(object) => return Ok(Some(object.to_vec())),
                    Content::Noop => {}
                }
            }
        }
    }
}
