//! Connects a VM to the network of its sandbox: before the boot on the host, after it in the guest. The network is a
//! namespace of the host, or the VMM's own in user mode.

use std::time::Duration;

use husk_protos::network::ConfigureNetworkRequest;

use super::error::{BootError, io};
use super::plan::BootPlan;
use crate::guest::client::{Guest, GuestError};
use crate::network::user::{HostPort, UserNetwork};
use crate::network::{self, Connected, NetworkError, NetworkStatus, Nic};
use crate::state::journal::Journal;
use crate::state::lease::Holder;
use crate::state::ports::PortError;
use crate::state::{Owner, StateError, Step};
use crate::vmm::NicEnd;

/// Deadline for all changes in the namespace.
const DEADLINE: Duration = Duration::from_secs(10);

/// More queue pairs gain little, and each takes up to two of the descriptors that a machine's process can inherit.
const MAX_QUEUES: u16 = 4;

/// The VM's network cards, and the guest's configuration.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) nics: Vec<NicEnd>,
    /// What the NICs are connected to; none without a namespace.
    pub(super) connections: Option<NetworkStatus>,
    config: Option<ConfigureNetworkRequest>,
}

/// Connects the links of the plan's namespace, if it names one, or leases the ports of a VM in user mode.
pub(super) async fn connect(plan: &BootPlan, journal: &Journal) -> Result<Network, BootError> {
    if let Some(user) = &plan.spec.user_network {
        lease_ports(user, journal).await?;
        return Ok(Network { nics: Vec::new(), connections: None, config: Some(UserNetwork::configuration()) });
    }
    let Some(claim) = plan.network.clone() else { return Ok(Network::default()) };
    journal.record(&Owner::Sandbox, [Step::Network { claim: claim.clone() }])?;
    let queues = u16::try_from(plan.spec.vcpus).map_or(MAX_QUEUES, |vcpus| vcpus.min(MAX_QUEUES));
    let netns = claim.netns.clone();
    let Connected { nics, config } = in_namespace(move || network::connect(&claim, queues, DEADLINE)).await?;
    tracing::info!(?nics, "connected the VM to its network namespace");
    let connections = NetworkStatus { netns, nics: nics.iter().map(Nic::status).collect(), problems: Vec::new() };
    let nics = nics.into_iter().map(|nic| NicEnd { mac: nic.mac, taps: nic.taps }).collect();
    Ok(Network { nics, connections: Some(connections), config: Some(config) })
}

impl Network {
    /// Configures the guest, before it runs anything.
    pub(super) async fn configure(self, guest: &Guest) -> Result<(), BootError> {
        let Some(config) = self.config else { return Ok(()) };
        guest.network.configure(guest.context(), &config).await.map_err(GuestError::from)?;
        Ok(())
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
        let (leases, holder) = journal.with(|state| {
            let shim = state.shim().ok_or_else(|| StateError::NotFound(state.dir().to_owned()))?;
            let holder = Holder { namespace: state.namespace().to_owned(), sandbox: state.sandbox().to_owned(), shim };
            Ok((state.port_leases(), holder))
        })?;
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
