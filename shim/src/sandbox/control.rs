//! Calls on existing containers: state, wait, signals, pause and statistics. The guest answers most of them.
//!
//! The shim rebuilds the guest's responses (`container/guest_reply.rs`): containerd's clients decode whatever type a
//! message names, and show what it contains.

use std::sync::Arc;

use containerd_shim_protos::api::{
    KillRequest, PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, StateRequest, StateResponse,
    StatsRequest, StatsResponse,
};
use husk_protos::chain::Chain;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::sandbox::container::guest_reply;
use crate::sandbox::container::order::Request;
use crate::sandbox::container::process::{EXIT_RECORDED, Exit, Process};
use crate::sandbox::error::{SandboxError, not_found};
use crate::sandbox::registry::Sandbox;
use crate::sandbox::without_guest;
use crate::vm::Vm;

/// The number of the signal that ends a process in any case.
const SIGKILL: u32 = libc::SIGKILL as u32;

impl Sandbox {
    /// The state of a process.
    pub(crate) async fn state(&self, id: &str, exec_id: &str) -> Result<StateResponse, SandboxError> {
        let (container, process) = self.process(id, exec_id)?;
        let mut state = self.guest_state(id, &process).await?;
        // As in runc's shim, `id` is the exec's id for an exec, and `exec_id` stays empty.
        state.id = if exec_id.is_empty() { id.to_owned() } else { exec_id.to_owned() };
        state.bundle = container.subject.bundle.display().to_string();
        state.stdin = process.stdio.stdin.clone();
        state.stdout = process.stdio.stdout.clone();
        state.stderr = process.stdio.stderr.clone();
        state.terminal = process.stdio.terminal;
        Ok(state)
    }

    /// The guest's response, or the shim's own record if the VM is dead.
    async fn guest_state(&self, id: &str, process: &Process) -> Result<StateResponse, SandboxError> {
        let vm = match self.live_vm() {
            Ok(vm) => vm,
            Err(SandboxError::VmDead { .. }) => return Ok(without_guest::state(process)),
            Err(error) => return Err(error),
        };
        let request = StateRequest { id: id.to_owned(), exec_id: process.exec_id.clone(), ..Default::default() };
        match vm.guest.task.state(vm.guest.context(), &request).await {
            Ok(claimed) => {
                let state = guest_reply::state(&claimed, process.exit(), &Timestamp::now());
                Ok(StateResponse { pid: process.pid_for(state.pid), ..state })
            }
            Err(_) if vm.cause_of_death().is_some() => Ok(without_guest::state(process)),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until a process has exited and its output is delivered.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, SandboxError> {
        let (_, process) = self.process(id, exec_id)?;
        process.exited().await.ok_or_else(|| not_found("process", exec_id))
    }

    /// Closes a process's stdin.
    pub(crate) fn close_io(&self, id: &str, exec_id: &str, stdin: bool) -> Result<(), SandboxError> {
        let (_, process) = self.process(id, exec_id)?;
        if stdin {
            process.close_stdin();
        }
        Ok(())
    }

    /// Sends a signal. If SIGKILL does not end a container in time, the host ends the VM.
    pub(crate) async fn kill(&self, request: KillRequest) -> Result<(), SandboxError> {
        let vm = self.vm_of_process(&request.id, &request.exec_id)?;
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        // The guest decides about a process that it has not created yet.
        let ends = request.signal == SIGKILL
            && request.exec_id.is_empty()
            && process.guest_pid() != 0
            && process.exit().is_none();
        if ends && process.note_kill() {
            tokio::spawn(enforce_kill(vm.clone(), request.id.clone(), process.clone()));
        }
        let Err(error) = vm.guest.task.kill(vm.guest.context(), &request).await else { return Ok(()) };
        let error = SandboxError::from(error);
        if ends && error.may_be_death() && vm.died_under_call().await.is_some() {
            // The container has ended with its VM. Without a record of that in time, its output is stalled.
            let _ = tokio::time::timeout(EXIT_RECORDED, process.exited()).await;
            return Ok(());
        }
        Err(error)
    }

    /// Resizes a process's terminal.
    pub(crate) async fn resize_pty(&self, request: ResizePtyRequest) -> Result<(), SandboxError> {
        let vm = self.vm_of_process(&request.id, &request.exec_id)?;
        vm.guest.task.resize_pty(vm.guest.context(), &request).await?;
        Ok(())
    }

    /// Freezes all processes of a container. When this returns, the host has all changes of its root filesystem; if it
    /// cannot have them, the processes run again.
    pub(crate) async fn pause(&self, request: PauseRequest) -> Result<(), SandboxError> {
        let (container, vm) = (self.container(&request.id)?, self.live_vm()?);
        container.request(Request::Pause, vm.guest.task.pause(vm.guest.context(), &request)).await?;
        let Some(changes) = &container.root.changes else { return Ok(()) };
        if let Err(error) = changes.copy_paused().await {
            let resumed = self.resume(ResumeRequest { id: request.id, ..Default::default() }).await;
            if let Err(error) = resumed
                && vm.cause_of_death().is_none()
            {
                tracing::error!(container = container.id, error = %Chain(&error), "failed to resume the container");
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Thaws all processes of a container.
    pub(crate) async fn resume(&self, request: ResumeRequest) -> Result<(), SandboxError> {
        let (container, vm) = (self.container(&request.id)?, self.live_vm()?);
        container.request(Request::Resume, vm.guest.task.resume(vm.guest.context(), &request)).await?;
        Ok(())
    }

    /// A container's resource usage as the guest's kernel reports it.
    pub(crate) async fn stats(&self, request: StatsRequest) -> Result<StatsResponse, SandboxError> {
        let vm = self.vm_of(&request.id)?;
        Ok(guest_reply::stats(vm.guest.task.stats(vm.guest.context(), &request).await?)?)
    }

    /// A container's processes. The init process and execs have the PID that all other calls return for them. Their
    /// children have no such PID, but that in the guest.
    pub(crate) async fn pids(&self, request: PidsRequest) -> Result<PidsResponse, SandboxError> {
        let container = self.container(&request.id)?;
        let vm = self.live_vm()?;
        let claimed = vm.guest.task.pids(vm.guest.context(), &request).await?;
        Ok(guest_reply::processes(&claimed, |guest_pid| container.running_as(guest_pid))?)
    }

    /// Rejects checkpoints.
    pub(crate) fn checkpoint(&self, id: &str) -> Result<(), SandboxError> {
        self.container(id)?;
        Err(SandboxError::Unsupported(format!("checkpoint {id}: io.containerd.husk.v1 does not support checkpoints")))
    }

    /// The VM, if the container exists.
    pub(super) fn vm_of(&self, id: &str) -> Result<Arc<Vm>, SandboxError> {
        self.container(id)?;
        self.live_vm()
    }

    /// The VM, if the process exists: a process that died with its VM does not.
    fn vm_of_process(&self, id: &str, exec_id: &str) -> Result<Arc<Vm>, SandboxError> {
        self.process(id, exec_id)?;
        self.live_vm().map_err(|error| match error {
            SandboxError::VmDead { .. } => not_found("process", exec_id),
            other => other,
        })
    }
}

/// Ends the VM unless the guest reports in time that a killed container has exited.
async fn enforce_kill(vm: Arc<Vm>, id: String, init: Arc<Process>) {
    let missing = format!("container {id}: the guest reported no exit after SIGKILL");
    vm.enforce(&missing, init.exit_reported()).await;
}
