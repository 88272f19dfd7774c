//! Keeps the NICs of a VM connected to the links of its namespace, while links come, go and change.
//!
//! All sockets are opened inside the namespace and stay there, so that the work needs no thread in the namespace. They
//! keep the namespace as long as the VM, whose taps do the same.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use husk_protos::chain::Chain;
use husk_protos::mac::mac_text;
use husk_protos::network::ConfigureNetworkRequest;

use super::diff::{Diff, NicChange, NicLink, diff};
use super::error::{NetworkError, ObjectError};
use super::link::{Link, alias, spare_name, tap_name};
use super::multicast;
use super::name_server::NameServer;
use super::netlink::Netlink;
use super::netns::Claim;
use super::nic::{NicState, Plugging, Waiting};
use super::redirect::{Classifier, Device, has_ingress, redirect, remove};
use super::scan::{Scan, Sent, scan};
use super::status::{LinkStatus, NetworkStatus, NicStatus};
use super::subscription::{News, Subscription};
use super::tap::{describe, remove_all, rename, set_up};

/// The name of the loopback, which every guest has.
const LOOPBACK: &str = "lo";

/// What the guest has to know after the namespace has changed.
#[derive(Debug)]
pub struct Settled {
    /// The guest's configuration.
    pub config: ConfigureNetworkRequest,
    /// What the guest cannot be given.
    pub problems: Vec<ObjectError>,
    /// The links that can be connected once the machine has another NIC: see [`Follower::new_nic`].
    pub waiting: Vec<Waiting>,
    /// Whether docker's DNS server listens in the namespace.
    pub name_server: bool,
}

/// A VM's NICs, and the namespace that they follow.
pub struct Follower {
    pub(super) claim: Claim,
    /// The VM, as the aliases of its taps name it.
    pub(super) vm: String,
    /// Queue pairs of each NIC.
    pub(super) queues: u16,
    pub(super) netlink: Netlink,
    pub(super) subscription: Subscription,
    pub(super) name_server: NameServer,
    pub(super) classifier: Classifier,
    pub(super) nics: Vec<NicState>,
    /// A NIC that the machine does not have yet.
    pub(super) plugging: Option<Plugging>,
    /// How many NICs the running machine can still be given.
    pub(super) pluggable: usize,
    /// How many it was given.
    pub(super) plugged: usize,
    /// What has happened since the NICs were last connected, and what could not be connected then.
    pub(super) news: News,
    /// The sysctls that the guest has been told.
    pub(super) sysctls: Sent,
}

impl Follower {
    /// A descriptor that is readable when the namespace has changed.
    ///
    /// # Errors
    ///
    /// No descriptor is left.
    pub fn changes(&self) -> Result<OwnedFd, NetworkError> {
        let failed = ObjectError::system("rtnetlink", "duplicate the descriptor of the subscription");
        self.subscription.readable().map_err(|error| self.inside(failed(error)))
    }

    /// Connects the NICs to the links that the namespace has now. Returns what the guest has to know, or `None` if
    /// nothing has changed since the last call, which costs a few system calls. Blocks.
    ///
    /// # Errors
    ///
    /// The namespace cannot be read, or contains a route or rule that a guest cannot be given. The next call tries
    /// again.
    pub fn settle(&mut self, limit: Duration) -> Result<Option<Settled>, NetworkError> {
        self.netlink.set_deadline(Instant::now() + limit);
        self.settle_inside().map_err(|error| self.inside(error))
    }

    fn settle_inside(&mut self) -> Result<Option<Settled>, ObjectError> {
        let nics = &self.nics;
        let plugging = self.plugging.as_ref().map(|plugging| plugging.nic.tap.index);
        self.subscription
            .drain(
                &mut self.news,
                |index| plugging == Some(index) || nics.iter().any(|nic| nic.tap.index == index),
                |index| nics.iter().any(|nic| nic.link.as_ref().is_some_and(|link| link.index == index)),
            )
            .map_err(|error| error.at("rtnetlink", "follow the namespace"))?;
        // docker starts its DNS server before it adds the first link of a network that has one.
        let served = self.name_server.look()?;
        self.news.changed |= served;
        if self.news == News::default() {
            return Ok(None);
        }
        let scan = scan(&mut self.netlink)?;
        let redirectless = self.redirectless();
        // `apply` adds the links whose redirects it cannot make again.
        self.news = News::default();
        let settled = self.apply(scan, |link| redirectless.contains(&link.index));
        // After a problem, the next call tries again.
        self.news.changed |= !settled.problems.is_empty() || !settled.waiting.is_empty();
        Ok(Some(settled))
    }

    /// The links whose redirects are lost: they have left the namespace, and may have returned. If notifications are
    /// lost, so is the news of that, but a link that has left has lost its ingress qdisc.
    fn redirectless(&mut self) -> Vec<u32> {
        let mut found = self.news.left.clone();
        if self.news.lost {
            let netlink = &mut self.netlink;
            let links = self.nics.iter().filter_map(|nic| nic.link.as_ref());
            // Whatever prevents the answer is reported when the redirect is made again.
            found.extend(
                links.filter(|link| !has_ingress(netlink, device(link)).unwrap_or(false)).map(|link| link.index),
            );
        }
        found
    }

    /// Connects the NICs to the links of a scan. `lost` recognizes links whose redirects may be lost.
    pub(super) fn apply(&mut self, scan: Scan, lost: impl Fn(&Link) -> bool) -> Settled {
        let Scan { links, rejected: mut problems, config } = scan;
        let nics: Vec<_> = self.nics.iter().map(|nic| NicLink { mac: nic.mac, link: nic.link.as_ref() }).collect();
        let Diff { changes, unconnected } = diff(&nics, &links, lost);
        for change in changes {
            // The other NICs are connected even if one is not.
            problems.extend(self.make(change, &links).err());
        }
        let mut unconnected = unconnected.into_iter().map(|link| &links[link]);
        let waiting = unconnected.by_ref().take(self.pluggable).map(Waiting::new).collect();
        problems.extend(unconnected.map(|link| self.no_nic_left(link)));
        let name_server = self.name_server.listens();
        Settled { config: self.config(config), problems, waiting, name_server }
    }

    /// Why a link stays without a NIC.
    fn no_nic_left(&self, link: &Link) -> ObjectError {
        let plugged = match self.plugged {
            0 => String::new(),
            plugged => format!(", and cannot be given more than the {plugged} that were plugged into it"),
        };
        let reason = format!(
            "the VM has no network card left for it: it has {}, all of which have links{plugged} (see network_spare_nics)",
            self.nics.len()
        );
        ObjectError::unsupported(format!("link {}", link.name), reason)
    }

    fn make(&mut self, change: NicChange, links: &[Link]) -> Result<(), ObjectError> {
        match change {
            NicChange::Disconnect { nic } => self.disconnect(nic),
            NicChange::Connect { nic, link } => self.connect(nic, &links[link]),
            NicChange::Reconnect { nic, link } => {
                let link = &links[link];
                let reconnected = self.update(nic, link).and_then(|()| self.redirect(nic, link));
                if reconnected.is_err() {
                    self.news.left.push(link.index);
                }
                reconnected
            }
            NicChange::Update { nic, link } => self.update(nic, &links[link]),
        }
    }

    /// Connects a spare NIC. If it fails, the NIC is spare again.
    fn connect(&mut self, nic: usize, link: &Link) -> Result<(), ObjectError> {
        let netlink = &mut self.netlink;
        let tap = &mut self.nics[nic].tap;
        // Fails if another VM uses the link: its redirect must stay.
        rename(netlink, tap, tap_name(link.index))?;
        let connected = describe(netlink, tap, alias(&self.vm, Some(&link.name)), Some(link.mtu))
            .and_then(|()| self.redirect(nic, link));
        match connected {
            Ok(()) => {
                self.nics[nic].link = Some(link.clone());
                Ok(())
            }
            Err(error) => {
                self.netlink.grant_grace();
                if let Err(error) = self.release(nic, device(link)) {
                    tracing::warn!(link = %link.name, error = %Chain(&error), "failed to undo the connection of a link");
                }
                Err(error)
            }
        }
    }

    /// Redirects all traffic between a link and its tap.
    fn redirect(&mut self, nic: usize, link: &Link) -> Result<(), ObjectError> {
        let tap = &self.nics[nic].tap;
        let (outer, inner) = (device(link), Device { index: tap.index, name: &tap.name });
        redirect(&mut self.netlink, &mut self.classifier, inner, outer)?;
        // A redirect to a device that is down drops the frames and logs each, so the link's redirect comes last.
        set_up(&mut self.netlink, tap, true)?;
        redirect(&mut self.netlink, &mut self.classifier, outer, inner)?;
        multicast::receive_all(&mut self.netlink, self.classifier, outer, inner)
    }

    /// Follows a link's name and MTU. Everything else is the guest's affair.
    fn update(&mut self, nic: usize, link: &Link) -> Result<(), ObjectError> {
        let state = &mut self.nics[nic];
        let old = state.link.as_ref();
        if old.is_none_or(|old| old.mtu != link.mtu || old.name != link.name) {
            describe(&mut self.netlink, &state.tap, alias(&self.vm, Some(&link.name)), Some(link.mtu))?;
        }
        state.link = Some(link.clone());
        Ok(())
    }

    /// Makes a NIC spare whose link has left.
    fn disconnect(&mut self, nic: usize) -> Result<(), ObjectError> {
        let Some(link) = self.nics[nic].link.clone() else { return Ok(()) };
        self.release(nic, device(&link))?;
        self.nics[nic].link = None;
        Ok(())
    }

    /// Removes both redirects and makes the tap spare. What is gone already is no error.
    fn release(&mut self, nic: usize, link: Device<'_>) -> Result<(), ObjectError> {
        let netlink = &mut self.netlink;
        let tap = &mut self.nics[nic].tap;
        multicast::release(netlink, link)?;
        set_up(netlink, tap, false)?;
        remove(netlink, Device { index: tap.index, name: &tap.name })?;
        rename(netlink, tap, spare_name(nic))?;
        describe(netlink, tap, alias(&self.vm, None), None)
    }

    /// Removes the redirects of all links: the VM does not start. The taps vanish with their descriptors.
    pub(super) fn release_links(&mut self) {
        self.netlink.grant_grace();
        for link in self.nics.iter().filter_map(|nic| nic.link.as_ref()) {
            if let Err(error) = multicast::release(&mut self.netlink, device(link)) {
                tracing::warn!(link = %link.name, error = %Chain(&error), "failed to undo the redirect of a link");
            }
        }
    }

    /// Ends the VM's connection: removes its taps, which its processes may still have open. The caller undoes the
    /// redirects with [`super::disconnect`]. Blocks.
    ///
    /// # Errors
    ///
    /// The kernel does not remove them in time. They vanish with the VM's processes.
    pub fn end(mut self, limit: Duration) -> Result<(), NetworkError> {
        self.netlink.set_deadline(Instant::now() + limit);
        remove_all(&mut self.netlink).map_err(|error| self.inside(error))
    }

    /// The part of a namespace's configuration that the NICs' links have.
    fn config(&mut self, mut config: ConfigureNetworkRequest) -> ConfigureNetworkRequest {
        let nic_of = |name: &str| self.nics.iter().find(|nic| nic.link.as_ref().is_some_and(|link| link.name == name));
        config.links.retain_mut(|link| {
            let Some(nic) = nic_of(&link.name) else { return false };
            if link.mac != nic.mac {
                link.nic = nic.mac.to_vec();
            }
            true
        });
        config.routes.retain(|route| ["", LOOPBACK].contains(&route.link.as_str()) || nic_of(&route.link).is_some());
        config.neighbours.retain(|neighbour| nic_of(&neighbour.link).is_some());
        config.spare_nics = self.nics.iter().filter(|nic| nic.link.is_none()).map(|nic| nic.mac.to_vec()).collect();
        self.sysctls.complete(&mut config);
        config
    }

    /// What the NICs are connected to.
    pub fn status(&self) -> NetworkStatus {
        let link = |link: &Link| LinkStatus {
            name: link.name.clone(),
            index: link.index,
            mac: mac_text(&link.mac),
            mtu: link.mtu,
            up: link.up,
        };
        let nic = |nic: &NicState| NicStatus {
            nic: mac_text(&nic.mac),
            tap: nic.tap.name.clone(),
            link: nic.link.as_ref().map(link),
        };
        NetworkStatus {
            netns: self.claim.netns.clone(),
            nics: self.nics.iter().map(nic).collect(),
            problems: Vec::new(),
        }
    }

    pub(super) fn inside(&self, source: ObjectError) -> NetworkError {
        NetworkError::Inside { path: self.claim.netns.clone(), source }
    }
}

fn device(link: &Link) -> Device<'_> {
    Device { index: link.index, name: &link.name }
}
