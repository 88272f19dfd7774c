//! The kernel's notifications about a network namespace: rtnetlink(7).
//!
//! A notification only says that something has changed. What it is, a scan finds out.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBuf, RcvBufForce};

use super::error::NetlinkError;
use super::reply::{Content, replies};

/// RTNLGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE and IPV6_RULE (linux/rtnetlink.h).
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];
/// RTM_* (linux/rtnetlink.h).
const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const NEW_NEIGHBOUR: u16 = 28;
const DEL_NEIGHBOUR: u16 = 29;
/// The types of messages about addresses, whose headers contain the link's index.
const ADDRESSES: [u16; 2] = [20, 21];
/// NUD_PERMANENT (linux/neighbour.h). The other neighbours come and go with the traffic.
const PERMANENT: u16 = 0x80;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of the receive buffer. A notification is about one object.
const BUFFER: usize = 64 * 1024;
/// Length of the socket's queue, which the kernel doubles for its own records. A plugin that adds hundreds of routes
/// fills the usual 208 KiB before they are read.
const QUEUE: usize = 1024 * 1024;
/// Notifications that are read at once. A namespace that never rests must not keep its reader.
const AT_ONCE: usize = 4096;

/// A subscription to a namespace's changes.
pub(super) struct Subscription {
    socket: Socket,
    buffer: Vec<u8>,
}

/// What has happened in the namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// Something has changed.
    pub(super) changed: bool,
    /// Notifications are lost.
    pub(super) lost: bool,
    /// The links that left the namespace. They may have returned since.
    pub(super) left: Vec<u32>,
}

impl Subscription {
    /// Subscribes to the changes of the thread's network namespace.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let failed = |source| NetlinkError::Socket { action: "subscribe to the namespace's changes", source };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(failed)?;
        socket.set_non_blocking(true).map_err(failed)?;
        enlarge(&socket).map_err(failed)?;
        for group in GROUPS {
            socket.add_membership(group).map_err(failed)?;
        }
        Ok(Self { socket, buffer: vec![0; BUFFER] })
    }

    /// A descriptor that is readable when there are notifications.
    pub(super) fn readable(&self) -> io::Result<OwnedFd> {
        // SAFETY: the socket outlives this borrow.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }.try_clone_to_owned()
    }

    /// Reads all notifications and adds them to `news`. Those about the links that `own` recognizes do not count.
    /// `of_interest` chooses the links in [`News::left`].
    pub(super) fn drain(
        &mut self,
        news: &mut News,
        own: impl Fn(u32) -> bool,
        of_interest: impl Fn(u32) -> bool,
    ) -> Result<(), NetlinkError> {
        for _ in 0..AT_ONCE {
            // MSG_TRUNC: the whole length, even if the buffer is too short.
            match self.socket.recv(&mut self.buffer.as_mut_slice(), libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => news.lost = true,
                Ok(length) => note(&self.buffer[..length], &own, &of_interest, news)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => news.lost = true,
                Err(source) => {
                    return Err(NetlinkError::Socket { action: "receive the namespace's changes", source });
                }
            }
        }
        news.lost = true;
        Ok(())
    }
}

/// Gives a socket room for [`QUEUE`] bytes of notifications, or for as many as the host's limit (net.core.rmem_max) allows
/// to a process without CAP_NET_ADMIN in the initial user namespace.
fn enlarge(socket: &Socket) -> io::Result<()> {
    // SAFETY: the socket outlives this borrow.
    let socket = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    match setsockopt(&socket, RcvBufForce, &QUEUE) {
        Err(Errno::EPERM) => setsockopt(&socket, RcvBuf, &QUEUE)?,
        other => other?,
    }
    Ok(())
}

/// Adds what a datagram says.
fn note(
    datagram: &[u8],
    own: &impl Fn(u32) -> bool,
    of_interest: &impl Fn(u32) -> bool,
    news: &mut News,
) -> Result<(), NetlinkError> {
    for reply in replies(datagram)? {
        let Content::Object(message) = reply.content else { continue };
        let short = |at: usize| message.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
        // struct ifinfomsg, ifaddrmsg and ndmsg all have the link's index here.
        let index = message.get(HEADER + 4..HEADER + 8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
        let (Some(kind), Some(index)) = (short(4), index) else { continue };
        let about_link =
            matches!(kind, NEW_LINK | DEL_LINK | NEW_NEIGHBOUR | DEL_NEIGHBOUR) || ADDRESSES.contains(&kind);
        let passing = kind == NEW_NEIGHBOUR && short(HEADER + 8).is_some_and(|state| state & PERMANENT == 0);
        if passing || (about_link && own(index)) {
            continue;
        }
        news.changed = true;
        // A bridge reports the loss of a port in the same way, with its address family.
        let is_link = message.get(HEADER).is_some_and(|family| i32::from(*family) == libc::AF_UNSPEC);
        if kind == DEL_LINK && is_link && of_interest(index) && !news.left.contains(&index) {
            news.left.push(index);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;
    use crate::network::netns::claim;
    use crate::network::testing::Namespace;

    fn subscribe(namespace: &Namespace) -> Subscription {
        let claim = claim(&namespace.path()).unwrap();
        let opened = claim.run(Duration::from_secs(5), |_| Ok(Subscription::open().unwrap()));
        opened.unwrap()
    }

    fn drain(subscription: &mut Subscription, own: u32) -> News {
        let mut news = News::default();
        subscription.drain(&mut news, |index| index == own, |_| true).unwrap();
        news
    }

    fn index(namespace: &Namespace, name: &str) -> u32 {
        let shown = namespace.ip_json(&format!("link show dev {name}"));
        u32::try_from(shown[0]["ifindex"].as_u64().unwrap()).unwrap()
    }

    #[test]
    fn every_kind_of_change_is_noticed_once() {
        let namespace = Namespace::new();
        namespace.ip("link add eth0 type veth peer name peer");
        namespace.ip("link set peer up");
        let mut subscription = subscribe(&namespace);
        let mut drain = || drain(&mut subscription, u32::MAX);
        assert_eq!(drain(), News::default());
        for change in [
            "link set eth0 up",
            "link set eth0 mtu 1400",
            "link set eth0 address 02:00:00:00:00:09",
            "addr add 10.0.0.2/24 dev eth0",
            "addr add fd00::2/64 dev eth0 nodad",
            "route add default via 10.0.0.1",
            "-6 route add default via fd00::1",
            "neigh add 10.0.0.1 lladdr 02:00:00:00:00:01 dev eth0",
            "neigh del 10.0.0.1 dev eth0",
            "rule add from 10.0.0.2 table 7 priority 7",
            "-6 rule add from fd00::2 table 7 priority 7",
            "route del default",
            "link set eth0 down",
        ] {
            namespace.ip(change);
            let news = drain();
            assert!(news.changed && !news.lost && news.left.is_empty(), "{change}: {news:?}");
        }
        // The kernel reports carriers and link-local addresses later.
        namespace.ip("link set peer down");
        drain();
        let eth0 = index(&namespace, "eth0");
        namespace.ip("link del eth0");
        assert!(drain().left.contains(&eth0));
    }

    #[test]
    fn own_links_and_passing_neighbours_are_no_news() {
        let namespace = Namespace::new();
        namespace.ip("link add eth0 type veth peer name husk-2");
        let tap = index(&namespace, "husk-2");
        let mut subscription = subscribe(&namespace);
        namespace.ip("link set husk-2 mtu 1400");
        namespace.ip("neigh add 10.0.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud stale");
        assert_eq!(drain(&mut subscription, tap), News::default());
    }

    #[test]
    fn hundreds_of_changes_at_once_are_not_lost() {
        let namespace = Namespace::new();
        let mut subscription = subscribe(&namespace);
        assert!(subscription.socket.get_rx_buf_sz().unwrap() >= QUEUE);
        let mut changes = tempfile::NamedTempFile::new().unwrap();
        for number in 0..500 {
            writeln!(changes, "addr add 10.0.{}.{}/32 dev lo", number / 250, number % 250 + 1).unwrap();
        }
        namespace.ip(&format!("-batch {}", changes.path().display()));
        let news = drain(&mut subscription, u32::MAX);
        assert!(news.changed && !news.lost, "{news:?}");
    }

    #[test]
    fn lost_notifications_are_noticed() {
        let namespace = Namespace::new();
        let mut subscription = subscribe(&namespace);
        subscription.socket.set_rx_buf_sz(1u32).unwrap();
        for number in 0..50 {
            namespace.ip(&format!("addr add 10.0.0.{number}/24 dev lo"));
        }
        assert!(drain(&mut subscription, u32::MAX).lost);
        assert_eq!(drain(&mut subscription, u32::MAX), News::default());
    }
}
