//! The sandbox as an operator sees it: what is on disk, and what only this process knows.

use std::sync::Arc;

use crate::console::GuestLogs;
use crate::guest::report;
use crate::sandbox::container::Container;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{ContainerSlot, Sandbox, VmSlot};
use crate::state::State;
use crate::state::recent::Recent;
use crate::state::status;
use crate::state::status::{ContainerStatus, HealthStatus, List, Live, RootStatus, Status, Summary};
use crate::vm::Vm;

/// Why an operator's request cannot be met.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    /// The sandbox has been deleted.
    #[error("everything of this sandbox has been removed, and its shim is about to exit")]
    Removed,
    /// The VM does not run.
    #[error(transparent)]
    NoVm(#[from] SandboxError),
    /// The VM runs without debug mode.
    #[error(
        "the VM is not in debug mode, which cannot be enabled while it runs: create the sandbox with the annotation \
         io.husk.debug=true, or with debug = true in husk's configuration"
    )]
    NotInDebugMode,
}

impl Sandbox {
    /// The sandbox's latest events.
    pub(crate) fn recent(&self) -> &Recent {
        self.journal.recent()
    }

    /// The guest's console and the log of its init.
    pub(crate) fn guest_logs(&self) -> &GuestLogs {
        &self.guest_logs
    }

    /// Everything that is known about the sandbox.
    ///
    /// # Errors
    /// [`StatusError::Removed`].
    pub(crate) async fn status(&self) -> Result<Status, StatusError> {
        // First, because it may take seconds: the rest is as it is afterwards.
        let live = self.live().await;
        let mut status = self.on_disk(status::of)?;
        status.summary.containers = self.container_statuses();
        status.live = Some(live);
        Ok(status)
    }

    /// The sandbox as the only entry of a list.
    ///
    /// # Errors
    /// [`StatusError::Removed`].
    pub(crate) fn list(&self) -> Result<List, StatusError> {
        let summary = Summary { containers: self.container_statuses(), ..self.on_disk(status::summary)? };
        Ok(List { sandboxes: vec![summary] })
    }

    /// The VM, if processes may be started in it.
    ///
    /// # Errors
    /// [`StatusError::NoVm`] and [`StatusError::NotInDebugMode`].
    pub(crate) fn vm_in_debug_mode(&self) -> Result<Arc<Vm>, StatusError> {
        let vm = self.live_vm()?;
        if vm.debug { Ok(vm) } else { Err(StatusError::NotInDebugMode) }
    }

    fn on_disk<T>(&self, read: impl Fn(&State) -> T) -> Result<T, StatusError> {
        self.journal.with(|state| Ok(read(state))).map_err(|_| StatusError::Removed)
    }

    fn container_statuses(&self) -> Vec<ContainerStatus> {
        let inner = self.lock();
        let status = |(id, slot): (&String, &ContainerSlot)| match slot {
            ContainerSlot::Creating => ContainerStatus { id: id.clone(), creating: true, processes: None },
            ContainerSlot::Ready(container) => {
                ContainerStatus { id: id.clone(), creating: false, processes: Some(container.process_statuses()) }
            }
        };
        let mut containers: Vec<_> = inner.containers.iter().map(status).collect();
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        containers
    }

    async fn live(&self) -> Live {
        let vm = match &self.lock().vm {
            VmSlot::Up(vm) => vm.clone(),
            VmSlot::Empty | VmSlot::Booting(_) | VmSlot::Stopping => return Live::default(),
        };
        let network = Some(vm.network_status().await);
        let cause_of_death = vm.cause_of_death();
        let health = HealthStatus {
            heartbeats: report::heartbeats(vm.health().snapshot()),
            alive: cause_of_death.is_none(),
            cause_of_death,
        };
        let supervisor = vm.health().supervisor().borrow().as_ref().map(report::supervisor_status);
        let shared_volumes = self.shared_volumes().await;
        let (memory, files) = (Some(vm.memory_status().await), Some(vm.files_status()));
        let (watches, disks, roots) = (self.watches.status(), self.disks.status(), self.root_statuses());
        Live { health: Some(health), supervisor, network, memory, files, shared_volumes, watches, disks, roots }
    }

    fn root_statuses(&self) -> Vec<RootStatus> {
        let status = |container: &Arc<Container>| RootStatus {
            container: container.id.clone(),
            kind: container.root.choice.kind.name().to_owned(),
            reason: container.root.choice.why.to_owned(),
        };
        let mut roots: Vec<RootStatus> = self.containers().iter().map(status).collect();
        roots.sort_by(|a, b| a.container.cmp(&b.container));
        roots
    }
}
