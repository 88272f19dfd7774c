//! The NICs of a VM, and the links that wait for one.

use std::os::fd::OwnedFd;

use husk_protos::chain::Chain;

use super::error::ObjectError;
use super::link::Link;
use super::tap::Tap;

/// A NIC of the VM.
pub struct Nic {
    /// The tap's descriptors, one for each queue pair. The tap vanishes with the last of them.
    pub taps: Vec<OwnedFd>,
    /// The MAC that the machine gives to the NIC.
    pub mac: [u8; 6],
}

/// A NIC of the VM, its tap, and the link that it is connected to.
#[derive(Debug)]
pub(super) struct NicState {
    /// The MAC that the machine gave to the NIC, which identifies it.
    pub(super) mac: [u8; 6],
    pub(super) tap: Tap,
    pub(super) link: Option<Link>,
}

/// A link that waits for a NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    name: String,
    pub(super) mac: [u8; 6],
}

impl Waiting {
    pub(super) fn new(link: &Link) -> Self {
        Self { name: link.name.clone(), mac: link.mac }
    }

    /// The machine cannot be given a NIC for it.
    #[must_use]
    pub fn failed(&self, error: &(dyn std::error::Error + 'static)) -> ObjectError {
        let reason = format!("the VM has no network card left for it, and cannot be given one: {}", Chain(error));
        ObjectError::unsupported(format!("link {}", self.name), reason)
    }
}

/// A NIC that is being plugged. Its tap stays if that fails, for the next attempt: a tap that comes and goes would be
/// news of the namespace each time.
pub(super) struct Plugging {
    pub(super) nic: NicState,
    pub(super) taps: Vec<OwnedFd>,
}

/// A MAC for a NIC without a link: random, locally administered, and of a single station (IEEE 802).
pub(super) fn random_mac() -> Result<[u8; 6], ObjectError> {
    let mut mac = [0; 6];
    let failed = |error| ObjectError::system("spare network card", "choose its MAC")(std::io::Error::other(error));
    getrandom::fill(&mut mac).map_err(failed)?;
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}
