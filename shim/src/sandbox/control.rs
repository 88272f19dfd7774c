//! What is done with a container that is there: signals, pause, limits, and what it uses. Each call is relayed to the guest.
//!
//! What the guest answers goes on to containerd as messages of types that are set here: its clients decode whatever type they are told.

use std::sync::Arc;

use containerd_shim_protos::api::{
    KillRequest, PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, StatsRequest, StatsResponse,
    UpdateTaskRequest,
};
use husk_protos::{METRICS, PROCESS_DETAILS};

use crate::sandbox::error::not_found;
use crate::sandbox::{Error, Sandbox};
use crate::vm::Vm;

impl Sandbox {
    /// Sends a signal.
    pub async fn kill(&self, request: KillRequest) -> Result<(), Error> {
        let vm = self.vm_of_process(&request.id, &request.exec_id)?;
        vm.guest.task.kill(vm.guest.context(), &request).await?;
        Ok(())
    }

    /// Changes the size of a process's terminal.
    pub async fn resize_pty(&self, request: ResizePtyRequest) -> Result<(), Error> {
        let vm = self.vm_of_process(&request.id, &request.exec_id)?;
        vm.guest.task.resize_pty(vm.guest.context(), &request).await?;
        Ok(())
    }

    /// Stops all processes of a container where they are.
    pub async fn pause(&self, request: PauseRequest) -> Result<(), Error> {
        let vm = self.vm_of(&request.id)?;
        vm.guest.task.pause(vm.guest.context(), &request).await?;
        Ok(())
    }

    /// Lets them go on.
    pub async fn resume(&self, request: ResumeRequest) -> Result<(), Error> {
        let vm = self.vm_of(&request.id)?;
        vm.guest.task.resume(vm.guest.context(), &request).await?;
        Ok(())
    }

    /// Gives a container other limits, inside the VM, whose own size stays.
    pub async fn update(&self, request: UpdateTaskRequest) -> Result<(), Error> {
        let vm = self.vm_of(&request.id)?;
        vm.guest.task.update(vm.guest.context(), &request).await?;
        Ok(())
    }

    /// What a container uses, as the guest's kernel counts it.
    pub async fn stats(&self, request: StatsRequest) -> Result<StatsResponse, Error> {
        let vm = self.vm_of(&request.id)?;
        let mut response = vm.guest.task.stats(vm.guest.context(), &request).await?;
        response.stats.mut_or_insert_default().type_url = METRICS.to_owned();
        Ok(response)
    }

    /// The pids of a container's processes, in the guest.
    pub async fn pids(&self, request: PidsRequest) -> Result<PidsResponse, Error> {
        let vm = self.vm_of(&request.id)?;
        let mut response = vm.guest.task.pids(vm.guest.context(), &request).await?;
        for info in response.processes.iter_mut().filter_map(|process| process.info.as_mut()) {
            info.type_url = PROCESS_DETAILS.to_owned();
        }
        Ok(response)
    }

    /// Refuses to write a container down.
    pub fn checkpoint(&self, id: &str) -> Result<(), Error> {
        self.container(id)?;
        Err(Error::Unsupported(format!("checkpoint {id}: io.containerd.husk.v1 does not support checkpoints")))
    }

    /// The VM of a container that is there.
    fn vm_of(&self, id: &str) -> Result<Arc<Vm>, Error> {
        self.container(id)?;
        self.live_vm()
    }

    /// The VM of a process that is there: one that has died with its VM is not.
    fn vm_of_process(&self, id: &str, exec_id: &str) -> Result<Arc<Vm>, Error> {
        self.process(id, exec_id)?;
        self.live_vm().map_err(|error| match error {
            Error::Dead { .. } => not_found("process", exec_id),
            other => other,
        })
    }
}
