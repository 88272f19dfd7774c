//! rtnetlink requests and dumps on a blocking socket with a deadline: rtnetlink(7), netlink(7).
//!
//! A socket belongs to the network namespace of the thread that opens it.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_ECHO, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::NetlinkError;
use super::reply::{Content, replies};

/// Length of the receive buffer. The kernel fills at most 32 KiB per datagram of a dump (NLMSG_GOODSIZE and
/// netlink_dump() in net/netlink/af_netlink.c), except for a single larger object.
const BUFFER: usize = 256 * 1024;
/// Attempts to read a list that changes meanwhile.
const ATTEMPTS: usize = 16;
/// Time to undo what was done when the deadline passes.
const GRACE: Duration = Duration::from_secs(2);

/// An rtnetlink socket.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
    deadline: Instant,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a socket in the thread's network namespace.
    pub(super) fn open(deadline: Instant) -> Result<Self, NetlinkError> {
        let failed = |source| NetlinkError::Socket { action: "open an rtnetlink socket", source };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        // Errors come with an explanation, and without a copy of the request.
        socket.set_ext_ack(true).map_err(failed)?;
        socket.set_cap_ack(true).map_err(failed)?;
        // Without strict checking the kernel ignores filters and lists cached routes as well.
        socket.set_netlink_get_strict_chk(true).map_err(failed)?;
        Ok(Self { socket, sequence: 0, deadline, buffer: vec![0; BUFFER] })
    }

    /// The socket, which belongs to the namespace.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket is open as long as this borrow.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }

    /// Until when requests are answered.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Sets the deadline of the following requests.
    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// Extends the deadline so that there is time to undo changes.
    pub(super) fn grant_grace(&mut self) {
        self.deadline = self.deadline.max(Instant::now() + GRACE);
    }

    /// Changes an object. `flags` are NLM_F_CREATE and the like.
    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.request(message, NLM_F_ACK | flags, &mut |_| Ok(())).map(drop)
    }

    /// Gets an object; none if the kernel acknowledges the request without sending one. Qdiscs need NLM_F_ECHO: without
    /// it, the kernel sends them to the subscribers only (qdisc_notify() in net/sched/sch_api.c).
    pub(super) fn get(&mut self, message: RouteNetlinkMessage) -> Result<Option<RouteNetlinkMessage>, NetlinkError> {
        let mut object = None;
        self.request(message, NLM_F_ACK | NLM_F_ECHO, &mut |bytes| {
            object = decode(bytes)?;
            Ok(())
        })?;
        Ok(object)
    }

    /// Lists objects.
    pub(super) fn dump(&mut self, message: &RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        self.list(message, decode).map(|objects| objects.into_iter().flatten().collect())
    }

    /// Counts objects without decoding them: they may be of kinds that the decoder does not know.
    pub(super) fn count(&mut self, message: &RouteNetlinkMessage) -> Result<usize, NetlinkError> {
        self.list(message, |_| Ok(())).map(|objects| objects.len())
    }

    /// Lists objects, each read by `read` from its bytes, which start with `struct nlmsghdr`.
    pub(super) fn list<T>(
        &mut self,
        message: &RouteNetlinkMessage,
        read: impl Fn(&[u8]) -> Result<T, NetlinkError>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..ATTEMPTS {
            let mut objects = Vec::new();
            let interrupted = self.request(message.clone(), NLM_F_DUMP, &mut |bytes| {
                objects.push(read(bytes)?);
                Ok(())
            })?;
            if !interrupted {
                return Ok(objects);
            }
        }
        Err(NetlinkError::Changing(ATTEMPTS))
    }

    /// Sends a request and passes each object of the reply to `take`. Returns whether the list is inconsistent.
    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        take: &mut impl FnMut(&[u8]) -> Result<(), NetlinkError>,
    ) -> Result<bool, NetlinkError> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        if Instant::now() >= self.deadline {
            return Err(NetlinkError::Deadline);
        }
        self.socket
            .send(&bytes, 0)
            .map_err(|source| NetlinkError::Socket { action: "send an rtnetlink request", source })?;
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            for reply in replies(&self.buffer[..length])? {
                // An earlier request failed half-way, and the rest of its reply is still coming.
                if reply.sequence != self.sequence {
                    continue;
                }
                interrupted |= reply.interrupted;
                match reply.content {
                    Content::Object(bytes) => take(bytes)?,
                    Content::Noop => {}
                    Content::Done => return Ok(interrupted),
                    Content::Rejected { errno, text } => return Err(NetlinkError::Rejected { errno, text }),
                }
            }
        }
    }

    /// Receives one datagram into the buffer and returns its length.
    fn receive(&mut self) -> Result<usize, NetlinkError> {
        let failed = |source| NetlinkError::Socket { action: "receive an rtnetlink reply", source };
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NetlinkError::Deadline);
            }
            // Rounded up: a timeout of 0 ms would spin.
            let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket(), PollFlags::POLLIN)], timeout) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            // MSG_TRUNC: the whole length, even if the buffer is too short.
            let length = self.socket.recv(&mut self.buffer.as_mut_slice(), libc::MSG_TRUNC).map_err(failed)?;
            if length > self.buffer.len() {
                return Err(failed(Errno::EMSGSIZE.into()));
            }
            return Ok(length);
        }
    }
}

fn decode(bytes: &[u8]) -> Result<Option<RouteNetlinkMessage>, NetlinkError> {
    match NetlinkMessage::deserialize(bytes).map_err(NetlinkError::Decode)?.payload {
        NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::error::ObjectError;
    use crate::network::netns::claim;
    use crate::network::testing::Namespace;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    const LIMIT: Duration = Duration::from_secs(5);

    /// Runs `work` with a socket in the namespace.
    fn within<T: Send + 'static>(
        namespace: &Namespace,
        work: impl FnOnce(&mut Netlink) -> Result<T, NetlinkError> + Send + 'static,
    ) -> Result<T, NetlinkError> {
        let claim = claim(&namespace.path()).unwrap();
        claim
            .run(LIMIT, move |deadline| Ok(Netlink::open(deadline).and_then(|mut netlink| work(&mut netlink))))
            .unwrap()
    }

    fn names(messages: Vec<RouteNetlinkMessage>) -> Vec<String> {
        let mut names = Vec::new();
        for message in messages {
            let RouteNetlinkMessage::NewLink(link) = message else { panic!("{message:?}") };
            names.extend(link.attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            }));
        }
        names.sort();
        names
    }

    #[test]
    fn a_long_list_is_complete() {
        let namespace = Namespace::new();
        let mut expected = vec!["lo".to_owned()];
        for number in 0..60 {
            namespace.ip(&format!("link add v{number} type veth peer name w{number}"));
            expected.extend([format!("v{number}"), format!("w{number}")]);
        }
        expected.sort();
        let listed = within(&namespace, |netlink| netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default())));
        assert_eq!(names(listed.unwrap()), expected);
    }

    #[test]
    fn the_kernels_explanation_is_part_of_the_error() {
        let error = within(&Namespace::new(), |netlink| {
            let mut link = LinkMessage::default();
            link.header.index = 1;
            link.attributes.push(LinkAttribute::LinkInfo(vec![]));
            link.attributes.push(LinkAttribute::Mtu(u32::MAX));
            netlink.change(RouteNetlinkMessage::SetLink(link), 0)
        })
        .unwrap_err();
        assert_eq!(error.errno(), Some(libc::EINVAL));
        assert_eq!(error.to_string(), "Invalid argument (os error 22): mtu less than device minimum");
        let error: ObjectError = error.at("link lo", "set its MTU");
        assert_eq!(error.to_string(), "link lo: set its MTU");
    }

    #[test]
    fn a_socket_works_after_an_error() {
        let listed = within(&Namespace::new(), |netlink| {
            let mut link = LinkMessage::default();
            link.header.index = 4711;
            assert_eq!(netlink.get(RouteNetlinkMessage::GetLink(link)).unwrap_err().errno(), Some(libc::ENODEV));
            netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))
        });
        assert_eq!(names(listed.unwrap()), ["lo"]);
    }

    #[test]
    fn requests_stop_at_the_deadline_and_grace_extends_it() {
        within(&Namespace::new(), |netlink| {
            netlink.deadline = Instant::now();
            let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
            assert!(matches!(netlink.dump(&message), Err(NetlinkError::Deadline)));
            netlink.grant_grace();
            netlink.count(&message)
        })
        .unwrap();
    }
}
