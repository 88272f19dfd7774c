//! Deletes processes and containers. The last container's deletion stops the VM and undoes everything that was created
//! for the sandbox.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse};
use husk_protos::chain::Chain;
use protobuf::well_known_types::timestamp::Timestamp;
use serde_json::json;

use crate::sandbox::container::Container;
use crate::sandbox::container::guest_reply;
use crate::sandbox::container::order::Request;
use crate::sandbox::container::process::{EXIT_RECORDED, Process};
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Sandbox, VmSlot};
use crate::sandbox::without_guest;
use crate::state::Owner;
use crate::state::life::VmState;
use crate::state::recent::EventKind;
use crate::vm::{DELIVERY, StillRunning, Vm};

/// How long containerd may take to accept the last events. After that the shim exits without delivering them.
const FLUSH: Duration = Duration::from_secs(2);
/// How long the guest's event may take to arrive after the response to the call that caused it.
const EVENT_LAG: Duration = Duration::from_secs(1);

/// How a VM ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The guest stops everything first.
    Shutdown,
    /// Nothing runs in it that anybody needs.
    Kill,
}

impl Sandbox {
    /// Deletes an exec or a container that has exited. The last container's deletion also ends the sandbox.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<DeleteResponse, SandboxError> {
        let (container, process) = self.process(id, exec_id)?;
        let response = match self.live_vm() {
            Ok(vm) if !(exec_id.is_empty() && self.ends_with(&vm, &container)) => {
                delete_by_guest(&vm, &container, &process).await?
            }
            Ok(_) | Err(SandboxError::VmDead { .. }) => without_guest::delete(&container, &process).await?,
            Err(error) => return Err(error),
        };
        if !exec_id.is_empty() {
            // Wait for the guest's exit event: after the removal the process would be unknown and its exit lost.
            if response.pid != 0 && tokio::time::timeout(EXIT_RECORDED, process.exited()).await.is_err() {
                tracing::warn!(container = id, exec = exec_id, "the guest did not report the exit");
            }
            process.finish_output().await;
            container.remove(exec_id);
            process.discard();
            return Ok(response);
        }
        container.changes_finished().await;
        container.finish_output().await;
        if tokio::time::timeout(EVENT_LAG, container.delete_published()).await.is_err() {
            tracing::warn!(container = id, "the guest did not report the deletion");
        }
        self.run_poststop_hooks(id).await;
        self.remove_container(id).await;
        tracing::info!(container = id, status = response.exit_status, "container deleted");
        Ok(response)
    }

    /// Decides whether the VM ends with this container. Then the guest need not delete the container nor shut down, which
    /// takes longer than the VM's kill: the container is the last one, and neither a process nor a mount of it nor a disk
    /// is left that could have something to write. Nothing else in the guest needs an orderly end. No other container is
    /// created any more.
    fn ends_with(&self, vm: &Arc<Vm>, container: &Container) -> bool {
        let mut slots = self.lock();
        let is_last = slots.containers.len() == 1 && slots.managed.is_none();
        let is_up = matches!(&slots.vm, VmSlot::Up(up) if Arc::ptr_eq(up, vm));
        let orderly = vm.ends_in_order() || self.disks.any_writable();
        slots.ends = is_last && is_up && container.is_over() && !orderly;
        slots.ends
    }

    /// Removes a container, which may not have been created, and undoes its effects on the host. If it was the last
    /// one, the VM stops first, so that no mount that it uses is unmounted.
    pub(super) async fn remove_container(self: &Arc<Self>, id: &str) {
        let last = {
            let mut slots = self.lock();
            slots.containers.remove(id);
            if matches!(slots.vm, VmSlot::Empty) && slots.first.as_deref() == Some(id) {
                slots.first = None;
            }
            self.sockets.remove(id);
            let last = slots.containers.is_empty() && slots.managed.is_none();
            last.then(|| (std::mem::replace(&mut slots.vm, VmSlot::Stopping), slots.ends))
        };
        match last {
            // In the background: containerd needs the response to Delete before it requests Shutdown.
            Some((vm, ends)) => {
                let end = if ends { End::Kill } else { End::Shutdown };
                drop(tokio::spawn(self.clone().tear_down(vm, end, "the last container was deleted")));
            }
            None => {
                self.detach_disks(id).await;
                self.release_share(id).await;
                self.release_demand(id);
                self.remove_oom_score(id);
                self.limit_cgroup_again(id).await;
                self.release_cpuset(id).await;
                if let Err(error) = self.journal.undo(Owner::Container(id.to_owned())).await {
                    tracing::error!(container = id, error = %Chain(&error), "failed to undo all effects of the container");
                }
            }
        }
    }

    /// Stops the VM and removes everything that the sandbox created. It runs once: its caller took `vm` out of the
    /// slot.
    async fn tear_down(self: Arc<Self>, vm: VmSlot, end: End, cause: &'static str) {
        let vm = match vm {
            VmSlot::Up(vm) => Some(vm),
            VmSlot::Booting(mut booting) => {
                booting.wait_for(Option::is_some).await.ok().and_then(|booted| booted.clone()?.ok())
            }
            VmSlot::Empty | VmSlot::Stopping => None,
        };
        self.discard_spare("nobody has used it").await;
        if let Some(vm) = vm {
            match end {
                End::Shutdown => self.stop(&vm, cause, vm.stop(self.delivered())).await,
                End::Kill => self.stop(&vm, cause, vm.discard()).await,
            }
            // The VM's last events are still being read. Processes without an exit event end with the VM.
            if tokio::time::timeout(DELIVERY, self.containers_ended()).await.is_err() {
                tracing::debug!("the exits of some processes of the VM are not recorded yet");
            }
        } else if self.journal.vm() == Some(VmState::Pending) {
            self.set_vm_state(VmState::Stopped, cause);
        }
        let containers = self.containers();
        for container in &containers {
            container.vm_died(Timestamp::now());
        }
        futures::future::join_all(containers.iter().map(|container| container.finish_output())).await;
        self.end_managed();
        // Before its cgroup is removed.
        self.leave_cgroup().await;
        // Before its rule is removed.
        self.lock().forwarding = None;
        self.disks.clear();
        self.undo_all().await;
        if !self.publisher.flush(FLUSH).await {
            tracing::warn!("containerd did not accept the last events");
        }
        self.ended.send_replace(true);
    }

    /// Waits until the containers' last output and exits are delivered, or no output moves any more.
    pub(super) async fn delivered(&self) {
        let containers = self.containers();
        futures::future::join_all(containers.iter().map(|container| container.drained_within(DELIVERY))).await;
        // An exit that does not follow its output is lost.
        let _ = tokio::time::timeout(DELIVERY, self.containers_ended()).await;
    }

    /// Waits until the exit of every process of every container is recorded.
    pub(super) async fn containers_ended(&self) {
        let containers = self.containers();
        futures::future::join_all(containers.iter().map(|container| container.ended())).await;
    }

    async fn undo_all(&self) {
        match self.journal.undo_all().await {
            Ok(()) => self.recent().note(EventKind::Sandbox, "everything has been removed", json!({})),
            Err(error) => {
                let error = Chain(&error).to_string();
                tracing::error!(error, "failed to undo all effects of the sandbox");
                let fields = json!({"error": error});
                self.recent().note(EventKind::Sandbox, "failed to undo all effects of the sandbox", fields);
            }
        }
    }

    /// Has the VM stopped, which may be dead already, and records it.
    pub(super) async fn stop(&self, vm: &Vm, cause: &str, stopped: impl Future<Output = Result<(), StillRunning>>) {
        let died = vm.cause_of_death();
        match &died {
            // The task that watches for the death may not have recorded it yet.
            Some(cause) => self.record_vm_death(cause),
            None => self.set_vm_state(VmState::Stopping, cause),
        }
        match stopped.await {
            Ok(()) if died.is_some() => {}
            Ok(()) => self.set_vm_state(VmState::Stopped, "its processes have exited"),
            Err(error) => {
                let error = Chain(&error).to_string();
                tracing::error!(error, "failed to stop the VM");
                if died.is_none() {
                    self.set_vm_state(VmState::Failed, &error);
                }
            }
        }
    }

    /// Ends the sandbox. Without `now`, only if it has no container and the Sandbox API does not manage it: containerd
    /// calls Shutdown after every deletion.
    pub(crate) async fn shutdown(self: &Arc<Self>, now: bool) -> Result<(), SandboxError> {
        let vm = {
            let mut slots = self.lock();
            if (!slots.containers.is_empty() || slots.managed.is_some()) && !now {
                return Ok(());
            }
            std::mem::replace(&mut slots.vm, VmSlot::Stopping)
        };
        self.shutdown_requested.send_replace(true);
        if !matches!(vm, VmSlot::Stopping) {
            tokio::spawn(self.clone().tear_down(vm, End::Shutdown, "a shutdown was requested"));
        }
        self.ended().await;
        Ok(())
    }

    /// Ends the sandbox if containerd has forgotten it: it has no container, or containerd has removed the bundles of all.
    /// A containerd that is killed while it starts a shim or creates a task may not know them when it runs again.
    pub(crate) async fn end_if_forgotten(self: &Arc<Self>) -> Result<(), SandboxError> {
        let bundles = self.journal.with(|state| {
            let bundle = |facts: &serde_json::Value| facts["bundle"].as_str().map(PathBuf::from);
            Ok(state.containers().values().filter_map(bundle).collect::<Vec<_>>())
        })?;
        let removed = |bundle: &PathBuf| matches!(bundle.try_exists(), Ok(false));
        let forgotten = !bundles.is_empty() && bundles.iter().all(removed);
        if forgotten {
            tracing::warn!(?bundles, "containerd has removed the bundles of all containers without deleting these");
        }
        self.shutdown(forgotten).await
    }
}

/// Lets the guest delete a process. If it does not, and the process has exited, the host ends the VM.
async fn delete_by_guest(
    vm: &Arc<Vm>,
    container: &Arc<Container>,
    process: &Process,
) -> Result<DeleteResponse, SandboxError> {
    let name = if process.exec_id.is_empty() { &container.id } else { &process.exec_id };
    let missing = format!("container {}: the guest did not delete {name}", container.id);
    let deleted = match vm.enforce(&missing, delete_in_guest(vm, container, process)).await {
        Some(deleted) => deleted,
        None => without_guest::delete(container, process).await,
    };
    if deleted.is_err() && process.exec_id.is_empty() && process.exit().is_some() {
        // A client may try again until the deadline.
        let (vm, container) = (vm.clone(), container.clone());
        tokio::spawn(async move { vm.enforce(&missing, container.delete_published()).await });
    }
    deleted
}

async fn delete_in_guest(vm: &Vm, container: &Container, process: &Process) -> Result<DeleteResponse, SandboxError> {
    let request = DeleteRequest { id: container.id.clone(), exec_id: process.exec_id.clone(), ..Default::default() };
    let call = vm.guest.task.delete(vm.guest.context(), &request);
    let called = match process.exec_id.is_empty() {
        true => container.request(Request::Delete, call).await,
        false => call.await,
    };
    match called {
        Ok(claimed) => {
            let valid = guest_reply::deleted(&claimed, process.exit(), &Timestamp::now());
            let response = DeleteResponse { pid: process.pid_for(valid.pid), ..valid };
            // The guest reports no exit of an exec that never ran. Its ExecAdded event may still be on its way, and
            // would be rejected after the exec's removal.
            let never_ran = response.pid == 0 && !process.exec_id.is_empty();
            if never_ran && tokio::time::timeout(EVENT_LAG, process.announced()).await.is_err() {
                tracing::warn!(container = container.id, exec = process.exec_id, "the guest did not report the exec");
            }
            Ok(response)
        }
        // The VM died during the call: the recorded exit counts.
        Err(_) if vm.cause_of_death().is_some() => without_guest::delete(container, process).await,
        Err(error) => Err(error.into()),
    }
}
