//! Connects every link of a namespace to a tap, and undoes it.

use std::collections::HashSet;
use std::fmt;
use std::time::{Duration, Instant};

use super::error::{NetworkError, ObjectError};
use super::follow::{Follower, Settled};
use super::link::{self, AnyLink, alias, alias_prefix, is_tap, spare_name, tap_name};
use super::multicast;
use super::name_server::NameServer;
use super::netlink::Netlink;
use super::netns::Claim;
use super::nic::{Nic, NicState, random_mac};
use super::redirect::{Classifier, Device, has_ingress};
use super::scan::{Scan, Sent, scan};
use super::subscription::{News, Subscription};
use super::tap::{create, reserve};

/// The NICs that a VM is to have.
#[derive(Clone, Debug)]
pub struct NicPlan {
    /// Names the VM; without spaces.
    pub vm: String,
    /// Queue pairs of each NIC.
    pub queues: u16,
    /// NICs for links that appear later.
    pub spare: usize,
    /// Most NICs that the machine can have. There are fewer spare NICs if they do not fit.
    pub most: usize,
    /// Most NICs that can be plugged into the running machine.
    pub pluggable: usize,
}

/// What a VM needs to take over a namespace's links.
pub struct Connected {
    /// The NICs, in the follower's order.
    pub nics: Vec<Nic>,
    /// Keeps the NICs connected.
    pub follower: Follower,
    /// The guest's configuration; without problems.
    pub settled: Settled,
}

impl fmt::Debug for Connected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.follower.status().fmt(f)
    }
}

/// Connects every link of the namespace except `lo` to a tap, and makes taps for spare NICs. From then on, what arrives
/// at a link reaches the VM, and not the namespace's own stack. Blocks.
///
/// # Errors
///
/// The namespace is gone, or holds something that a VM cannot be given: the error names the link, route or rule.
/// Nothing stays in the namespace, not even after [`NetworkError::Deadline`]: the work is then undone as soon as the
/// kernel has finished it.
pub fn connect(claim: &Claim, plan: NicPlan, limit: Duration) -> Result<Connected, NetworkError> {
    let namespace = claim.clone();
    let work = move |deadline| connect_inside(deadline, plan, namespace);
    // The taps vanish with their descriptors.
    claim.run_or_undo(limit, work, |mut connected: Connected| connected.follower.release_links())
}

fn connect_inside(deadline: Instant, plan: NicPlan, claim: Claim) -> Result<Connected, ObjectError> {
    let mut netlink = Netlink::open(deadline).map_err(|error| error.at("rtnetlink", "connect"))?;
    // Before the scan: a change after it would be missed.
    let subscription = Subscription::open().map_err(|error| error.at("rtnetlink", "connect"))?;
    reject_others(&mut netlink)?;
    let mut name_server = NameServer::open()?;
    name_server.look()?;
    let scan = scan(&mut netlink)?;
    if let Some(link) = scan.links.get(plan.most) {
        let reason = format!("the machine can have {} network cards only", plan.most);
        return Err(ObjectError::unsupported(format!("link {}", link.name), reason));
    }
    let (mut nics, mut states) = (Vec::<Nic>::new(), Vec::new());
    for number in 0..plan.most.min(scan.links.len() + plan.spare) {
        let (tap, taps) = create(&mut netlink, &spare_name(number), alias(&plan.vm, None), plan.queues)?;
        // The guest need not change it then. Links can have the same one: ipvlan's do.
        let mac = scan.links.get(number).map(|link| link.mac).filter(|mac| nics.iter().all(|nic| nic.mac != *mac));
        let mac = match mac {
            Some(mac) => mac,
            None => random_mac()?,
        };
        nics.push(Nic { taps, mac });
        states.push(NicState { mac, tap, link: None });
    }
    let classifier = Classifier::MatchAll;
    let follower = Follower {
        claim,
        vm: plan.vm,
        queues: plan.queues,
        netlink,
        subscription,
        name_server,
        classifier,
        nics: states,
        plugging: None,
        pluggable: plan.pluggable,
        plugged: 0,
        news: News::default(),
        sysctls: Sent::default(),
    };
    begin(follower, scan, nics)
}

/// Connects the NICs to the links that the namespace has at the beginning.
pub(super) fn begin(mut follower: Follower, scan: Scan, nics: Vec<Nic>) -> Result<Connected, ObjectError> {
    let mut settled = follower.apply(scan, |_| false);
    if settled.problems.is_empty() {
        return Ok(Connected { nics, follower, settled });
    }
    follower.release_links();
    Err(settled.problems.swap_remove(0))
}

/// Fails if the thread's namespace has another VM.
pub(super) fn reject_others(netlink: &mut Netlink) -> Result<(), ObjectError> {
    if let Some(other) = link::all(netlink)?.into_iter().find(|link| is_tap(&link.name)) {
        return Err(ObjectError::unsupported(
            format!("tap {}", other.name),
            format!(
                "the namespace is in use ({}), and its links serve one VM: put both containers into one pod, or connect each to the network",
                if other.alias.is_empty() { "by another VM" } else { &other.alias }
            ),
        ));
    }
    Ok(())
}

/// Removes what a VM's connection left at the links of the namespace: redirects and ingress qdiscs. Leaves a link alone
/// that another VM uses. Does nothing if the namespace is gone. Blocks.
///
/// # Errors
///
/// A tap of the VM still exists, so the VM may still run, or a qdisc cannot be removed.
pub fn disconnect(claim: &Claim, vm: &str, limit: Duration) -> Result<(), NetworkError> {
    if claim.is_gone()? {
        return Ok(());
    }
    let vm = vm.to_owned();
    let removed = claim.run(limit, move |deadline| {
        let mut netlink = Netlink::open(deadline).map_err(|error| error.at("rtnetlink", "connect"))?;
        let links = link::all(&mut netlink)?;
        let is_own = |link: &&AnyLink| is_tap(&link.name) && link.alias.starts_with(&alias_prefix(&vm));
        if let Some(tap) = links.iter().find(is_own) {
            return Err(ObjectError::unsupported(format!("tap {}", tap.name), "still exists: the VM may still run"));
        }
        let taken: HashSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
        let mut result = Ok(());
        for link in &links {
            if !is_tap(&link.name) && !taken.contains(tap_name(link.index).as_str()) {
                // The other links are cleaned up even if one fails.
                result = result.and(clean(&mut netlink, link));
            }
        }
        result
    });
    match removed {
        // It vanished meanwhile.
        Err(_) if claim.is_gone()? => Ok(()),
        other => other,
    }
}

/// Removes the redirect of a link, unless another VM takes the link at this moment.
fn clean(netlink: &mut Netlink, link: &AnyLink) -> Result<(), ObjectError> {
    let device = Device { index: link.index, name: &link.name };
    if !has_ingress(netlink, device)? {
        return Ok(());
    }
    match reserve(&tap_name(link.index))? {
        Some(_reserved) => multicast::release(netlink, device),
        None => Ok(()),
    }
}
