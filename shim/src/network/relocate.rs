//! Moves the NICs of a VM to another network namespace: those of a VM that has waited for its sandbox. QEMU keeps the
//! taps open meanwhile.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::connect::{Connected, begin, reject_others};
use super::error::{NetworkError, ObjectError};
use super::follow::Follower;
use super::link::alias;
use super::name_server::NameServer;
use super::netlink::Netlink;
use super::netns::Claim;
use super::redirect::Classifier;
use super::scan::{Sent, scan};
use super::subscription::{News, Subscription};
use super::tap::{enter, send};

/// The thread's network namespace.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// Moves the NICs of `follower`, none of which has a link, to the namespace of `claim`, as those of the VM `vm`, and
/// connects them to its links. Blocks.
///
/// # Errors
///
/// As for [`super::connect`], or the machine has too few NICs. The NICs are lost then: the VM cannot be used.
pub fn relocate(follower: Follower, claim: &Claim, vm: String, limit: Duration) -> Result<Connected, NetworkError> {
    let namespace = claim.clone();
    let work = move |deadline| relocate_inside(deadline, follower, namespace, vm);
    claim.run_or_undo(limit, work, |mut connected: Connected| connected.follower.release_links())
}

fn relocate_inside(deadline: Instant, follower: Follower, claim: Claim, vm: String) -> Result<Connected, ObjectError> {
    let mut netlink = Netlink::open(deadline).map_err(|error| error.at("rtnetlink", "connect"))?;
    let subscription = Subscription::open().map_err(|error| error.at("rtnetlink", "connect"))?;
    reject_others(&mut netlink)?;
    let mut name_server = NameServer::open()?;
    name_server.look()?;
    let Follower { netlink: mut before, mut nics, queues, pluggable, plugged, .. } = follower;
    if let Some(nic) = nics.iter().find(|nic| nic.link.is_some()) {
        return Err(ObjectError::unsupported(format!("tap {}", nic.tap.name), "has a link".to_owned()));
    }
    before.set_deadline(deadline);
    let here = File::open(CURRENT).map_err(ObjectError::system(CURRENT, "open the network namespace"))?;
    for nic in &mut nics {
        send(&mut before, &nic.tap, here.as_raw_fd())?;
        nic.tap = enter(&mut netlink, &nic.tap.name, alias(&vm, None))?;
    }
    let scan = scan(&mut netlink)?;
    let follower = Follower {
        claim,
        vm,
        queues,
        netlink,
        subscription,
        name_server,
        classifier: Classifier::MatchAll,
        nics,
        plugging: None,
        pluggable,
        plugged,
        news: News::default(),
        sysctls: Sent::default(),
    };
    // The machine has the taps' descriptors, and the taps vanish with it.
    let mut connected = begin(follower, scan, Vec::new())?;
    // Links that wait for a NIC get one when the namespace settles.
    connected.follower.news.changed |= !connected.settled.waiting.is_empty();
    Ok(connected)
}
