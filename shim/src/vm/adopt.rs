//! What a VM becomes part of. Each learns whose it is: a VM that is booted for its sandbox before it starts, one that
//! has waited for a sandbox when it gets one. The latter also moves to that sandbox's cgroup and network namespace, and
//! gets the time and random numbers.

use std::sync::Arc;

use husk_protos::lock::lock;
use husk_protos::network::ConfigureNetworkRequest;

use super::cgroup;
use super::error::{BootError, io};
use super::follow::{DEADLINE, Following};
use super::identity::identify;
use super::network::names;
use super::place::{open_cgroups, unprotect};
use super::plan::BootPlan;
use super::running::Vm;
use crate::guest::clock;
use crate::network::{self, Claim, Connected};
use crate::state::journal::Journal;
use crate::state::{Owner, Step};

/// Bytes of the host's random numbers for a guest.
const SEED: usize = 32;

impl Vm {
    /// Moves a VM that has waited to its sandbox's place on the host, and gives its guest what no two guests may share.
    ///
    /// # Errors
    ///
    /// A step fails. The VM cannot be used then.
    pub(crate) async fn adopt(&self, plan: &BootPlan, journal: &Journal) -> Result<(), BootError> {
        let mut seed = [0; SEED];
        getrandom::fill(&mut seed)
            .map_err(|error| io("choose random numbers for the guest")(std::io::Error::other(error)))?;
        let guest = async { Ok(clock::set(&self.guest, Some(&seed)).await?) };
        tokio::try_join!(self.join_cgroup(plan), self.join_network(plan, journal), guest)?;
        identify(self.guest.link(), plan, journal)
    }

    /// Moves the VM's processes to the sandbox's cgroup, on a separate thread because the kernel waits for a grace
    /// period.
    async fn join_cgroup(&self, plan: &BootPlan) -> Result<(), BootError> {
        let (plan, processes) = (plan.clone(), self.processes());
        let joined = tokio::task::spawn_blocking(move || {
            let cgroups = open_cgroups(&plan)?;
            for process in processes {
                unprotect(&plan, process)?;
                cgroup::join(&cgroups, process)
                    .map_err(io(format!("move process {} to the VM's cgroup", process.pid)))?;
            }
            Ok(())
        });
        joined.await.map_err(|error| io("run a thread for the cgroup")(std::io::Error::other(error)))?
    }

    /// Connects the VM's NICs to the links of the sandbox's network namespace, unless it is the one that the VM has waited
    /// in.
    async fn join_network(&self, plan: &BootPlan, journal: &Journal) -> Result<(), BootError> {
        let (Some(claim), Some(following)) = (&plan.network, self.following()) else { return Ok(()) };
        if following.status().netns == claim.netns {
            return Ok(());
        }
        let (names, vm) = names(claim, journal)?;
        journal.record(&Owner::Sandbox, [Step::Network { claim: claim.clone(), vm: vm.clone() }])?;
        let follower = following.leave().await?;
        // What the guest has was that of another namespace.
        let has = ConfigureNetworkRequest::default();
        let Connected { follower, settled, .. } = relocate(follower, claim.clone(), vm).await?;
        let (guest, machine) = (self.guest.clone(), self.machine.clone());
        let following = Following::start(follower, settled, has, names, guest, machine, self.dead.clone()).await?;
        *lock(&self.network) = Some(Arc::new(following));
        Ok(())
    }
}

async fn relocate(follower: network::Follower, claim: Claim, vm: String) -> Result<Connected, BootError> {
    let moved = tokio::task::spawn_blocking(move || network::relocate(follower, &claim, vm, DEADLINE)).await;
    Ok(moved.map_err(|error| io("run a thread for the network")(std::io::Error::other(error)))??)
}
