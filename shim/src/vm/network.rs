//! Connects a VM to the network namespace of its sandbox: before the boot on the host, after it in the guest.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::error::{BootError, io};
use super::follow::Following;
use super::plan::BootPlan;
use crate::guest::client::Guest;
use crate::network::{self, Connected, Follower, NetworkError, NicPlan, Settled};
use crate::state::journal::Journal;
use crate::state::{Owner, Step};
use crate::vmm::{NicEnd, Vmm};

/// Deadline for all changes in the namespace.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// More queue pairs gain little, and each takes up to two of the descriptors that a machine's process can inherit.
const MAX_QUEUES: u16 = 4;

/// The VM's network cards, and what configures the guest.
#[derive(Default)]
pub(super) struct Network {
    pub(super) nics: Vec<NicEnd>,
    connected: Option<(Follower, Settled)>,
}

/// Connects the links of the plan's namespace, if it names one.
pub(super) async fn connect(vmm: &dyn Vmm, plan: &BootPlan, journal: &Journal) -> Result<Network, BootError> {
    let Some(claim) = plan.network.clone() else { return Ok(Network::default()) };
    let name = journal.with(|state| Ok(format!("{}/{}", state.namespace(), state.sandbox())))?;
    journal.record(&Owner::Sandbox, [Step::Network { claim: claim.clone(), vm: name.clone() }])?;
    let queues = u16::try_from(plan.spec.vcpus).map_or(MAX_QUEUES, |vcpus| vcpus.min(MAX_QUEUES));
    let nics = NicPlan { vm: name, queues, spare: plan.spare_nics as usize, most: vmm.most_nics(&plan.spec, queues) };
    let connected = in_namespace(move || network::connect(&claim, nics, DEADLINE)).await?;
    tracing::info!(network = ?connected, "connected the VM to its network namespace");
    let Connected { nics, follower, settled } = connected;
    let nics = nics.into_iter().map(|nic| NicEnd { mac: nic.mac, taps: nic.taps }).collect();
    Ok(Network { nics, connected: Some((follower, settled)) })
}

impl Network {
    /// Configures the guest, before it runs anything, and follows the namespace until `dead` has a value.
    pub(super) async fn follow(
        self,
        guest: &Arc<Guest>,
        dead: watch::Receiver<Option<String>>,
    ) -> Result<Option<Following>, BootError> {
        let Some((follower, settled)) = self.connected else { return Ok(None) };
        Ok(Some(Following::start(follower, settled, guest.clone(), dead).await?))
    }
}

async fn in_namespace<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, BootError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| io("run a thread for the network")(std::io::Error::other(error)))??)
}
