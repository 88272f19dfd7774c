//! A network namespace that the shim creates for a sandbox whose spec names none.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use nix::sched::{CloneFlags, unshare};

use super::error::{NetworkError, ObjectError};
use super::link::LOOPBACK_INDEX;
use super::netlink::Netlink;
use super::netns::{Claim, open};

/// The namespace of the calling thread.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// A new network namespace. It exists until this value is dropped and no process, device or mount uses it any more: it
/// ends with the shim, so its creation needs no undo step.
#[derive(Debug)]
pub struct PrivateNamespace {
    claim: Claim,
    /// `claim` names the namespace by this descriptor.
    _file: File,
}

impl PrivateNamespace {
    /// The claim on the namespace, whose path is that of the shim's descriptor.
    pub fn claim(&self) -> &Claim {
        &self.claim
    }
}

/// Creates a network namespace in which only `lo` exists and is up, as runc does for a container. Blocks.
///
/// # Errors
///
/// The kernel cannot create it, or `lo` cannot be brought up.
pub fn create(limit: Duration) -> Result<PrivateNamespace, NetworkError> {
    let failed = |source| NetworkError::Create { source };
    let (sender, receiver) = mpsc::channel();
    // unshare(2) moves only the calling thread, which ends with the closure.
    thread::Builder::new()
        .name("netns".into())
        .spawn(move || {
            // The caller may have given up; the namespace vanishes then.
            drop(sender.send(create_here(Instant::now() + limit)));
        })
        .map_err(failed)?;
    match receiver.recv_timeout(limit) {
        Ok(created) => created,
        Err(RecvTimeoutError::Timeout) => Err(failed(std::io::ErrorKind::TimedOut.into())),
        Err(RecvTimeoutError::Disconnected) => Err(failed(std::io::Error::other("its thread panicked"))),
    }
}

fn create_here(deadline: Instant) -> Result<PrivateNamespace, NetworkError> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| NetworkError::Create { source: errno.into() })?;
    let (file, mut claim) = open(CURRENT.as_ref())?;
    claim.netns = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into();
    bring_loopback_up(deadline).map_err(|source| NetworkError::Inside { path: claim.netns.clone(), source })?;
    Ok(PrivateNamespace { claim, _file: file })
}

fn bring_loopback_up(deadline: Instant) -> Result<(), ObjectError> {
    let mut netlink = Netlink::open(deadline).map_err(|error| error.at("rtnetlink", "connect"))?;
    let mut message = LinkMessage::default();
    message.header.index = LOOPBACK_INDEX;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    netlink.change(RouteNetlinkMessage::SetLink(message), 0).map_err(|error| error.at("lo", "bring it up"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::netns;
    use nix::net::if_::if_nameindex;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_new_namespace_has_only_a_loopback_that_is_up_and_ends_with_its_value() {
        let namespace = create(SECOND).unwrap();
        let claim = namespace.claim().clone();
        assert_eq!(netns::claim(&claim.netns).unwrap(), claim);
        let (links, answers) = claim
            .run(SECOND, |_| {
                let links: Vec<String> =
                    if_nameindex().unwrap().iter().map(|link| link.name().to_string_lossy().into_owned()).collect();
                // Fails with ENETUNREACH while lo is down.
                Ok((links, std::net::UdpSocket::bind("127.0.0.1:0").unwrap().connect("127.0.0.1:9").is_ok()))
            })
            .unwrap();
        assert_eq!((links, answers), (vec!["lo".to_owned()], true));
        assert!(!claim.is_gone().unwrap());
        drop(namespace);
        assert!(claim.is_gone().unwrap());
    }
}
