//! The processes that represent containers on the host, one for each: `crate::host::holder` starts them.
//!
//! A holder lives from before the container's first hook until the container's exit is recorded. If something else
//! kills it, the container is killed: on the host, the holder is the container.

use std::sync::Arc;
use std::time::Instant;

use containerd_shim_protos::api::KillRequest;
use husk_protos::chain::Chain;

use crate::host::child::Child;
use crate::host::holder;
use crate::host::process::ProcessId;
use crate::network::Claim;
use crate::prepare::Prepared;
use crate::sandbox::container::Container;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Sandbox, VmSlot};
use crate::state::{Owner, Step};
use crate::vm::Vm;
use crate::vm::cgroup::{self, Hierarchies, HostCgroup};

impl Sandbox {
    /// The cgroup of the sandbox's processes on the host, created for the first container. `None` if that container's
    /// spec names none: the processes stay in the shim's.
    pub(super) fn host_cgroup(&self, prepared: &Prepared) -> Result<Option<HostCgroup>, SandboxError> {
        let mut slots = self.lock();
        if let (VmSlot::Empty, None, Some(path)) = (&slots.vm, &slots.cgroup, &prepared.rewritten.cgroups_path) {
            let record = &mut |steps| self.journal.record(&Owner::Sandbox, steps);
            slots.cgroup = Some(Hierarchies::of_host()?.create(record, path)?);
        }
        Ok(slots.cgroup.clone())
    }

    /// Starts a container's holder in a network namespace, or in the shim's own. The journal ends the holder with the
    /// container.
    pub(super) fn start_holder(&self, id: &str, network: Option<&Claim>) -> Result<Child, SandboxError> {
        let started = Instant::now();
        let netns = network.map(Claim::open).transpose()?;
        let holder = holder::start(&format!("{}/{id}", self.namespace), netns)?;
        let step = Step::Process { id: holder.process(), name: "husk-holder".into() };
        self.journal.record(&Owner::Container(id.to_owned()), [step]).inspect_err(|_| holder.kill())?;
        let us = started.elapsed().as_micros() as u64;
        tracing::debug!(container = id, pid = holder.process().pid, us, "started the holder");
        Ok(holder)
    }
}

/// Moves a holder to the sandbox's cgroup, on a separate thread because the kernel waits for a grace period.
pub(super) async fn join_cgroup(cgroup: Option<HostCgroup>, holder: ProcessId) -> Result<(), SandboxError> {
    let Some(cgroup) = cgroup else { return Ok(()) };
    let joined = tokio::task::spawn_blocking(move || cgroup::join(&cgroup.open()?, holder)).await;
    let joined = joined.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    joined.map_err(|error| SandboxError::Internal(format!("move the holder to the sandbox's cgroup: {error}")))
}

/// Ends the holder with its container, and the container with its holder.
pub(super) fn watch_holder(vm: &Arc<Vm>, container: &Container, holder: Child) {
    let Some(init) = container.process("") else { return holder.kill() };
    let (vm, id) = (vm.clone(), container.id.clone());
    tokio::spawn(async move {
        tokio::select! {
            biased;
            _ = init.exited() => {}
            exit = holder.exited() => {
                tracing::warn!(container = id, pid = holder.process().pid, %exit, "the holder has ended: killing its container");
                let kill = KillRequest { id: id.clone(), signal: libc::SIGKILL as u32, ..Default::default() };
                if let Err(error) = vm.guest.task.kill(vm.guest.context(), &kill).await {
                    // It may have exited in the meantime.
                    tracing::warn!(container = id, error = %Chain(&error), "failed to kill the container");
                }
            }
        }
        holder.kill();
    });
}
