//! How containers and the sandbox end: deletion, and with the last container the VM and all that was made for it.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse};
use serde_json::json;

use crate::sandbox::container::process::Process;
use crate::sandbox::container::{Container, EXIT_RECORDED};
use crate::sandbox::{Error, Machine, Sandbox, now, without_guest};
use crate::state::Owner;
use crate::state::life::VmState;
use crate::state::recent::Kind;
use crate::vm::{DELIVERY, Vm};

/// How long containerd may take to accept the last events before the shim ends without.
const FLUSH: Duration = Duration::from_secs(2);
/// How long the guest's report of what it has done may take to arrive after its answer.
const EVENT_BEHIND: Duration = Duration::from_secs(1);

impl Sandbox {
    /// Deletes an exec or a container that has ended; with the last container the VM goes.
    pub async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<DeleteResponse, Error> {
        let (container, process) = self.process(id, exec_id)?;
        let response = match self.live_vm() {
            Ok(vm) => self.delete_in_guest(&vm, &container, &process).await?,
            Err(Error::Dead { .. }) => without_guest::delete(&container, &process).await?,
            Err(error) => return Err(error),
        };
        if !exec_id.is_empty() {
            // Its exit may still be on its way from the guest, and nobody would publish it for a process that is not known.
            if response.pid != 0 && tokio::time::timeout(EXIT_RECORDED, process.exited()).await.is_err() {
                tracing::warn!(container = id, exec = exec_id, "the guest did not report the exit");
            }
            process.finish_output().await;
            container.remove(exec_id);
            process.forget();
            return Ok(response);
        }
        container.finish_output().await;
        if tokio::time::timeout(EVENT_BEHIND, container.delete_published()).await.is_err() {
            tracing::warn!(container = id, "the guest did not report the deletion");
        }
        self.run_poststop_hooks(id).await;
        self.forget(id).await;
        tracing::info!(container = id, status = response.exit_status, "container deleted");
        Ok(response)
    }

    async fn delete_in_guest(
        &self,
        vm: &Vm,
        container: &Container,
        process: &Process,
    ) -> Result<DeleteResponse, Error> {
        let request =
            DeleteRequest { id: container.id.clone(), exec_id: process.exec_id.clone(), ..Default::default() };
        match vm.guest.task.delete(vm.guest.context(), &request).await {
            Ok(response) => {
                // Of what never ran nothing more is told; but that it was there may still be on its way, and would not be believed of a process
                // that is not known.
                let never_ran = response.pid == 0 && !process.exec_id.is_empty();
                if never_ran && tokio::time::timeout(EVENT_BEHIND, process.announced()).await.is_err() {
                    tracing::warn!(
                        container = container.id,
                        exec = process.exec_id,
                        "the guest did not report the exec"
                    );
                }
                Ok(response)
            }
            // It died under the call: the exit is what it is then.
            Err(_) if vm.cause_of_death().is_some() => without_guest::delete(container, process).await,
            Err(error) => Err(error.into()),
        }
    }

    /// A container is gone, or never came to be: undoes what it made on the host. If it was the last, the VM ends first, so that nothing
    /// is unmounted from under it.
    pub(super) async fn forget(self: &Arc<Self>, id: &str) {
        let last = {
            let mut inner = self.lock();
            inner.containers.remove(id);
            let last = inner.containers.is_empty();
            last.then(|| std::mem::replace(&mut inner.machine, Machine::Stopping))
        };
        match last {
            // In the background: containerd has other things to do with the answer to Delete, and asks for Shutdown after it.
            Some(machine) => drop(tokio::spawn(self.clone().tear_down(machine, "the last container is gone"))),
            None => {
                if let Err(error) = self.journal.undo(Owner::Container(id.to_owned())).await {
                    tracing::error!(container = id, %error, "something is left of the container");
                }
            }
        }
    }

    /// Ends the VM and removes everything that the sandbox made. Whoever took the machine out of its place calls it, so it runs once.
    async fn tear_down(self: Arc<Self>, machine: Machine, cause: &'static str) {
        let ended = || async {
            let containers = self.containers();
            futures::future::join_all(containers.iter().map(|container| container.ended())).await;
        };
        let vm = match machine {
            Machine::Up(vm) => Some(vm),
            Machine::Booting(mut booting) => {
                booting.wait_for(Option::is_some).await.ok().and_then(|booted| booted.clone()?.ok())
            }
            Machine::None | Machine::Stopping => None,
        };
        if let Some(vm) = vm {
            self.stop(&vm, cause, ended()).await;
            // Its last events are being read, and those of its processes that it told no end of end with it.
            if tokio::time::timeout(DELIVERY, ended()).await.is_err() {
                tracing::debug!("processes of the VM are not recorded as ended yet");
            }
        } else if self.journal.vm() == Some(VmState::Pending) {
            self.vm_enters(VmState::Stopped, cause);
        }
        let containers = self.containers();
        for container in &containers {
            container.died(now());
        }
        futures::future::join_all(containers.iter().map(|container| container.finish_output())).await;
        match self.journal.undo_all().await {
            Ok(()) => self.recent().note(Kind::Sandbox, "everything has been removed", json!({})),
            Err(error) => {
                tracing::error!(%error, "something is left of the sandbox");
                let fields = json!({"error": error.to_string()});
                self.recent().note(Kind::Sandbox, "something is left of the sandbox", fields);
            }
        }
        if !self.publisher.flush(FLUSH).await {
            tracing::warn!("containerd did not take the last events");
        }
        self.ended.send_replace(true);
    }

    /// Ends the VM, or finds it dead.
    async fn stop(&self, vm: &Vm, cause: &str, delivered: impl Future<Output = ()>) {
        let died = vm.cause_of_death();
        match &died {
            // Whoever waits for it may not have been told yet.
            Some(cause) => self.vm_died(cause),
            None => self.vm_enters(VmState::Stopping, cause),
        }
        match vm.stop(delivered).await {
            Ok(()) if died.is_some() => {}
            Ok(()) => self.vm_enters(VmState::Stopped, "its processes have ended"),
            Err(error) => {
                tracing::error!(%error, "the VM is not ended");
                if died.is_none() {
                    self.vm_enters(VmState::Failed, &error.to_string());
                }
            }
        }
    }

    /// Ends the sandbox. Without `now`, only if it has no container: containerd asks it of every shim after every deletion.
    pub async fn shutdown(self: &Arc<Self>, now: bool) -> Result<(), Error> {
        let machine = {
            let mut inner = self.lock();
            if !inner.containers.is_empty() && !now {
                return Ok(());
            }
            std::mem::replace(&mut inner.machine, Machine::Stopping)
        };
        self.dismissed.send_replace(true);
        if !matches!(machine, Machine::Stopping) {
            tokio::spawn(self.clone().tear_down(machine, "the sandbox was told to end"));
        }
        self.ended().await;
        Ok(())
    }
}
