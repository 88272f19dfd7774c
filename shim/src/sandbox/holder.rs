//! The processes that represent containers on the host, one for each: `crate::host::holder` starts them.
//!
//! A holder lives from before the container's first hook until the container's exit, which is recorded when the holder
//! has ended. If something else kills it, the container is killed: on the host, the holder is the container.

use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::KillRequest;
use husk_protos::chain::Chain;
use husk_protos::lock::lock;

use crate::guest::client::GuestError;
use crate::host::cgroup::User;
use crate::host::child::Child;
use crate::host::holder;
use crate::host::process::ProcessId;
use crate::network::Claim;
use crate::prepare::Prepared;
use crate::sandbox::container::Container;
use crate::sandbox::container::process::Process;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Sandbox, VmSlot};
use crate::sandbox::thread::blocking;
use crate::state::{Owner, Step};
use crate::vm::Vm;
use crate::vm::cgroup::{self, Hierarchies, HostCgroup};

/// How long a killed holder may take to end, on a loaded machine.
const HOLDER_END: Duration = Duration::from_secs(2);

impl Sandbox {
    /// The cgroup of the sandbox's processes on the host, created for the first container. `None` if that container's
    /// spec names none: the processes stay in the shim's.
    pub(super) async fn host_cgroup(&self, prepared: &Prepared) -> Result<Option<HostCgroup>, SandboxError> {
        let mut cgroup = self.cgroup.lock().await;
        let no_vm = matches!(self.lock().vm, VmSlot::Empty);
        if let (true, None, Some(path)) = (no_vm, &*cgroup, prepared.rewritten.cgroups_path.clone()) {
            let journal = self.journal.clone();
            let user = User::new(&self.namespace, &self.id);
            let create = move || -> Result<_, SandboxError> {
                let record = &mut |steps| journal.record(&Owner::Sandbox, steps);
                Ok(Hierarchies::of_host()?.create(record, user, &path)?)
            };
            *cgroup = Some(blocking("create the sandbox's cgroup", create).await?);
            *lock(&self.host_memory) = prepared.host_memory();
        }
        Ok(cgroup.clone())
    }

    /// Starts the holder of the container or the sandbox `id` in a network namespace, or in the shim's own. The journal
    /// ends the holder with its owner.
    pub(super) async fn start_holder(
        &self,
        owner: Owner,
        id: &str,
        network: Option<Claim>,
    ) -> Result<Child, SandboxError> {
        let started = Instant::now();
        let journal = self.journal.clone();
        let name = format!("{}/{id}", self.namespace);
        let start = move || -> Result<_, SandboxError> {
            let netns = network.as_ref().map(Claim::open).transpose()?;
            let holder = holder::start(&name, netns)?;
            let step = Step::Process { id: holder.process(), name: "husk-holder".into() };
            journal.record(&owner, [step]).inspect_err(|_| holder.kill())?;
            Ok(holder)
        };
        let holder = blocking("start the holder", start).await?;
        let us = started.elapsed().as_micros() as u64;
        tracing::debug!(holder_of = id, pid = holder.process().pid, us, "started the holder");
        Ok(holder)
    }
}

/// Moves a holder to the sandbox's cgroup, on a separate thread because the kernel waits for a grace period.
pub(super) async fn join_cgroup(cgroup: Option<HostCgroup>, holder: ProcessId) -> Result<(), SandboxError> {
    let Some(cgroup) = cgroup else { return Ok(()) };
    let what = "move the holder to the sandbox's cgroup";
    let join = move || {
        let joined = cgroup.open().and_then(|procs| cgroup::join(&procs, holder));
        joined.map_err(|error| SandboxError::Internal(format!("{what}: {error}")))
    };
    blocking(what, join).await
}

/// Ends the holder with its container, and the container with its holder.
pub(super) fn watch_holder(vm: &Arc<Vm>, container: &Container, holder: Child) {
    let Some(init) = container.process("") else { return holder.kill() };
    let (vm, id) = (vm.clone(), container.id.clone());
    let representing = init.represent();
    tokio::spawn(async move {
        tokio::select! {
            biased;
            _ = init.ending() => {}
            exit = holder.exited() => {
                tracing::warn!(container = id, pid = holder.process().pid, %exit, "the holder has ended: killing its container");
                kill_with_holder(&vm, &id, &init).await;
            }
        }
        holder.kill();
        if tokio::time::timeout(HOLDER_END, holder.exited()).await.is_err() {
            tracing::error!(container = id, pid = holder.process().pid, "the holder did not end when it was killed");
        }
        drop(representing);
    });
}

/// Kills a container whose holder has ended. A container must not run on without a holder: if the guest does not report
/// its exit, the VM is killed.
async fn kill_with_holder(vm: &Vm, id: &str, init: &Process) {
    let kill = KillRequest { id: id.to_owned(), signal: libc::SIGKILL as u32, ..Default::default() };
    let killed = async {
        if let Err(error) = vm.guest.task.kill(vm.guest.context(), &kill).await.map_err(GuestError::from) {
            // It may have exited in the meantime.
            tracing::warn!(container = id, error = %Chain(&error), "failed to kill the container");
        }
        init.exit_reported().await;
    };
    vm.enforce(&format!("container {id}: its holder was killed, and the guest reported no exit"), killed).await;
}
