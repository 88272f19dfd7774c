//! NICs that are plugged into the running machine, for links that appear when the VM has no NIC left.

use std::os::fd::AsFd;
use std::time::Duration;

use husk_protos::mac::mac_text;

use super::error::{NetworkError, ObjectError};
use super::follow::Follower;
use super::link::{alias, spare_name};
use super::netlink::Netlink;
use super::nic::{Nic, NicState, Plugging, Waiting, random_mac};
use super::tap::create;

impl Follower {
    /// Creates the tap of another NIC, unless an earlier call has created it for a NIC that could not be plugged. The
    /// caller gives the NIC to the machine, and then calls [`Self::plugged`]. Blocks.
    ///
    /// # Errors
    ///
    /// The tap cannot be created.
    pub fn new_nic(&mut self, waiting: &Waiting, limit: Duration) -> Result<Nic, NetworkError> {
        let plugging = match self.plugging.take() {
            Some(plugging) => plugging,
            None => self.create_nic(waiting, limit)?,
        };
        let Plugging { nic: NicState { mac, tap, .. }, taps } = self.plugging.insert(plugging);
        let (mac, object) = (*mac, format!("tap {}", tap.name));
        let taps: Result<_, _> = taps.iter().map(|tap| tap.as_fd().try_clone_to_owned()).collect();
        let failed = ObjectError::system(object, "duplicate its descriptors");
        Ok(Nic { taps: taps.map_err(|error| self.inside(failed(error)))?, mac })
    }

    fn create_nic(&self, waiting: &Waiting, limit: Duration) -> Result<Plugging, NetworkError> {
        let (name, alias, queues) = (spare_name(self.nics.len()), alias(&self.vm, None), self.queues);
        // The guest need not change it then. Links can have the same one: ipvlan's do.
        let mac = match self.nics.iter().any(|nic| nic.mac == waiting.mac) {
            false => waiting.mac,
            true => random_mac().map_err(|error| self.inside(error))?,
        };
        // The kernel creates a tap in the namespace of the thread.
        let (tap, taps) = self.claim.run(limit, move |deadline| {
            let mut netlink = Netlink::open(deadline).map_err(|error| error.at("rtnetlink", "connect"))?;
            create(&mut netlink, &name, alias, queues)
        })?;
        Ok(Plugging { nic: NicState { mac, tap, link: None }, taps })
    }

    /// The machine has the NIC that [`Self::new_nic`] has returned. The next [`Self::settle`] connects it.
    pub fn plugged(&mut self) {
        // The shim's descriptors are closed: the tap vanishes with the machine.
        let Some(Plugging { nic, .. }) = self.plugging.take() else { return };
        tracing::info!(nic = mac_text(&nic.mac), tap = nic.tap.name, "plugged a network card into the VM");
        self.nics.push(nic);
        self.pluggable = self.pluggable.saturating_sub(1);
        self.plugged += 1;
        self.news.changed = true;
    }
}
