//! Connects a VM to the network of its sandbox: before the boot on the host, after it in the guest. The network is a
//! namespace of the host, or the VMM's own in user mode.

use std::sync::Arc;

use husk_protos::network::ConfigureNetworkRequest;
use tokio::sync::watch;

use super::error::{BootError, io};
use super::follow::{DEADLINE, Following};
use super::plan::BootPlan;
use crate::forward::names::Names;
use crate::guest::client::{Guest, GuestError};
use crate::network::user::{HostPort, UserNetwork};
use crate::network::{self, Claim, Connected, Follower, NetworkError, NicPlan, Settled};
use crate::state::journal::Journal;
use crate::state::ports::PortError;
use crate::state::{Owner, StateError, Step};
use crate::vmm::{Machine, NicEnd, Vmm};

/// More queue pairs gain little, and each takes up to two of the descriptors that a machine's process can inherit.
const MAX_QUEUES: u16 = 4;

/// The VM's network cards, and what configures the guest.
#[derive(Default)]
pub(super) struct Network {
    pub(super) nics: Vec<NicEnd>,
    connected: Option<(Follower, Settled, Names)>,
    /// The guest's configuration in user mode.
    user: Option<ConfigureNetworkRequest>,
}

/// Connects the links of the plan's namespace, if it names one, or leases the ports of a VM in user mode.
pub(super) async fn connect(vmm: &dyn Vmm, plan: &BootPlan, journal: &Journal) -> Result<Network, BootError> {
    if let Some(user) = &plan.spec.user_network {
        lease_ports(user, journal).await?;
        return Ok(Network { user: Some(UserNetwork::configuration()), ..Network::default() });
    }
    let Some(claim) = plan.network.clone() else { return Ok(Network::default()) };
    let (names, name) = names(&claim, journal)?;
    journal.record(&Owner::Sandbox, [Step::Network { claim: claim.clone(), vm: name.clone() }])?;
    let queues = u16::try_from(plan.spec.vcpus).map_or(MAX_QUEUES, |vcpus| vcpus.min(MAX_QUEUES));
    let nics = NicPlan {
        vm: name,
        queues,
        spare: plan.spare_nics as usize,
        most: vmm.most_nics(&plan.spec, queues),
        pluggable: plan.spec.pluggable_nics,
    };
    let connected = in_namespace(move || network::connect(&claim, nics, DEADLINE)).await?;
    tracing::info!(network = ?connected, "connected the VM to its network namespace");
    let Connected { nics, follower, settled } = connected;
    let nics = nics.into_iter().map(|nic| NicEnd { mac: nic.mac, taps: nic.taps }).collect();
    Ok(Network { nics, connected: Some((follower, settled, names)), user: None })
}

/// What relays the containers' DNS queries, and the VM's name for its taps.
pub(super) fn names(claim: &Claim, journal: &Journal) -> Result<(Names, String), StateError> {
    journal.with(|state| {
        let names = Names::new(claim.clone(), state.sandbox().to_owned(), journal.clone());
        Ok((names, format!("{}/{}", state.namespace(), state.sandbox())))
    })
}

impl Network {
    /// The MAC addresses of the network cards that no link has.
    pub(super) fn spare_nics(&self) -> Vec<[u8; 6]> {
        let Some((_, settled, _)) = &self.connected else { return Vec::new() };
        settled.config.spare_nics.iter().filter_map(|mac| mac.as_slice().try_into().ok()).collect()
    }

    /// Configures the guest, before it runs anything, and follows the namespace until `dead` has a value. `machine` is
    /// given further network cards for links that appear later. `holds_nics`: the guest's kernel has left the spare
    /// ones alone.
    pub(super) async fn follow(
        self,
        guest: &Arc<Guest>,
        holds_nics: bool,
        machine: Arc<dyn Machine>,
        dead: watch::Receiver<Option<String>>,
    ) -> Result<Option<Following>, BootError> {
        if let Some(config) = self.user {
            guest.network.configure(guest.context(), &config).await.map_err(GuestError::from)?;
        }
        let Some((follower, settled, names)) = self.connected else { return Ok(None) };
        let spare_nics = if holds_nics { settled.config.spare_nics.clone() } else { Vec::new() };
        let applied = ConfigureNetworkRequest { spare_nics, ..Default::default() };
        Ok(Some(Following::start(follower, settled, applied, names, guest.clone(), machine, dead).await?))
    }
}

/// Leases the ports of a VM in user mode, on a separate thread because waiting for the lock may block.
async fn lease_ports(user: &UserNetwork, journal: &Journal) -> Result<(), BootError> {
    if user.ports.is_empty() {
        return Ok(());
    }
    let ports: Vec<HostPort> = user.ports.iter().map(|mapping| mapping.host).collect();
    let journal = journal.clone();
    let leased = tokio::task::spawn_blocking(move || {
        let (leases, holder) = journal.with(|state| Ok((state.port_leases(), state.holder()?)))?;
        let step = Step::Ports { ports: ports.clone(), leases: leases.clone(), shim: holder.shim };
        leases.lease(&ports, &holder, || journal.record(&Owner::Sandbox, [step]))
    });
    let leased: Result<(), PortError> =
        leased.await.map_err(|error| io("run a thread for the ports")(std::io::Error::other(error)))?;
    Ok(leased?)
}

async fn in_namespace<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, BootError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| io("run a thread for the network")(std::io::Error::other(error)))??)
}
