//! The rule that brings DNS queries to PID 1. In the notation of nft(8):
//!
//! ```text
//! table inet husk {
//!     chain output {
//!         type nat hook output priority -100
//!         ip daddr 127.0.0.11 udp dport 53 redirect to :PORT
//!         ip daddr 127.0.0.11 tcp dport 53 redirect to :PORT
//!     }
//! }
//! ```

use std::io;

use husk_protos::NAME_SERVER;
use husk_protos::nftables::{self, Action, Match, Rule};
use libc::{IPPROTO_TCP, IPPROTO_UDP};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

const TABLE: &str = "husk";
/// The kernel replies within the system call that sends a request, so a reply that is missing now never arrives.
const REPLY_TIMEOUT_S: i64 = 5;
/// Longest reply: `struct nlmsgerr` and the rejected message.
const REPLY: usize = 4 * 1024;
/// Where the error code is in a reply, after `struct nlmsghdr`: an i32.
const ERROR: std::ops::Range<usize> = 16..20;

/// Redirects queries to a port of the loopback, in the thread's network namespace.
pub(super) fn add(port: u16) -> io::Result<()> {
    let matches =
        |protocol| [Match::Address(*NAME_SERVER.ip()), Match::Protocol(protocol), Match::Port(NAME_SERVER.port())];
    let (udp, tcp) = (matches(IPPROTO_UDP), matches(IPPROTO_TCP));
    let action = Action::Redirect(port);
    send(&nftables::replace(TABLE, &[Rule { matches: &udp, action }, Rule { matches: &tcp, action }]))
}

/// Removes the rule. Does nothing if there is none: a container may have removed it.
pub(super) fn remove() -> io::Result<()> {
    match send(&nftables::remove(TABLE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Sends messages of which the last one is acknowledged. Errors of others arrive before.
fn send(messages: &[u8]) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.set_cap_ack(true)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(REPLY_TIMEOUT_S))?;
    socket.send(messages, 0)?;
    let mut reply = vec![0; REPLY];
    let length = loop {
        match socket.recv(&mut &mut reply[..], 0) {
            // Signals interrupt a receive with a timeout even if their handlers restart system calls (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    // The kernel sends nothing but acknowledgements and errors.
    let code = reply[..length.min(REPLY)].get(ERROR).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}
