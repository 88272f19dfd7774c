//! A sandbox that containerd's Sandbox API manages. It exists without a container: StartSandbox boots its VM, and the VM
//! runs until StopSandbox, whatever becomes of its containers.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use husk_protos::sandbox_update::UpdateSandboxRequest;
use husk_protos::system::Sysctls;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::host::child::Child;
use crate::host::process::ProcessId;
use crate::host::usage::{self, Usage};
use crate::prepare::{self, Attachments};
use crate::rootfs::spec::Sibling;
use crate::rootfs::spec::resources::HostResources;
use crate::sandbox::error::SandboxError;
use crate::sandbox::holder::join_cgroup;
use crate::sandbox::managed::{Managed, SandboxExit, SandboxState, StartCall, Started, Starting};
use crate::sandbox::registry::{Sandbox, Slots, VmSlot};
use crate::sandbox::thread::blocking;
use crate::state::Owner;
use crate::vm::Vm;

/// Exit status of a sandbox that was stopped on request.
const STOPPED: u32 = 0;
/// Exit status of a sandbox whose VM died: that of SIGKILL.
const KILLED: u32 = 137;

impl Sandbox {
    /// CreateSandbox: checks everything, and creates nothing yet.
    pub(crate) fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<(), SandboxError> {
        self.check_id(&request.sandbox_id)?;
        let (request, prepared) = prepare::prepare_sandbox(request, &self.namespace)?;
        let spec = serde_json::to_vec(&request.spec)
            .map_err(|error| SandboxError::Internal(format!("encode the sandbox's spec: {error}")))?;
        // As a pod's sandbox container: `delete` of another container must not end the sandbox.
        let facts = serde_json::json!({"bundle": request.bundle});
        self.journal.with(|state| state.set_container(&self.id, facts))?;
        let mut slots = self.lock();
        if matches!(slots.vm, VmSlot::Stopping) {
            return Err(SandboxError::Stopping);
        }
        if slots.managed.is_some() || !slots.containers.is_empty() {
            return Err(SandboxError::AlreadyExists { what: "sandbox", id: self.id.clone() });
        }
        // The VM's network namespace belongs to the sandbox, not to its first container.
        slots.first = Some(self.id.clone());
        slots.managed = Some(Managed {
            prepared: Arc::new(prepared),
            spec,
            files: request.files.into(),
            sysctls: request.sysctls,
            start: watch::channel(StartCall::Missing).0,
            started: None,
            exit: watch::channel(None).0,
        });
        Ok(())
    }

    /// StartSandbox: boots the VM, and returns the sandbox's spec too, as JSON. After a failure, only the sandbox's
    /// shutdown is possible.
    pub(crate) async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<(Started, Vec<u8>), SandboxError> {
        self.check_id(id)?;
        let managed = {
            let mut slots = self.lock();
            if matches!(slots.vm, VmSlot::Stopping) {
                return Err(SandboxError::Stopping);
            }
            let managed = of(&mut slots, id)?;
            if *managed.start.borrow() != StartCall::Missing || managed.exit.borrow().is_some() {
                return Err(SandboxError::AlreadyExists { what: "started sandbox", id: id.to_owned() });
            }
            managed.start.send_replace(StartCall::Running);
            managed.clone()
        };
        let _starting = Starting(managed.start.clone());
        let prepared = &managed.prepared;
        self.write_pod_files(&managed.files)?;
        let share = self.share()?;
        let network = self.network_namespace(prepared).await?;
        let cgroup = self.host_cgroup(prepared).await?;
        let holder = self.start_holder(Owner::Sandbox, id, network.clone()).await?;
        join_cgroup(cgroup.clone(), holder.process()).await?;
        self.enter_cgroup(cgroup.clone()).await?;
        let attachments = Attachments { network, cgroup, ..Attachments::new(share.path().to_owned()) };
        let vm = self.ensure_vm(prepared, attachments).await?;
        vm.settle_network().await?;
        let guest_pid = vm.hello.sandbox_pid;
        if guest_pid == 0 {
            return Err(SandboxError::Internal("the guest has not created the sandbox's namespaces".to_owned()));
        }
        if !managed.sysctls.is_empty() {
            // After the network: a sysctl may belong to a link.
            let sysctls = Sysctls { values: managed.sysctls.clone(), ..Default::default() };
            vm.guest.system.set_sysctls(vm.guest.context(), &sysctls).await?;
        }
        let started = Started { pid: holder.process().pid, guest_pid, at: Timestamp::now() };
        let spec = managed.spec.clone();
        of(&mut self.lock(), id)?.started = Some(started.clone());
        tracing::info!(pid = started.pid, "sandbox started");
        tokio::spawn(watch_sandbox(vm, holder, managed));
        Ok((started, spec))
    }

    /// UpdateSandbox: checks that the VM is, or can become, large enough for the pod's new limits, and applies what concerns
    /// the host. The VM grows when the limits of its containers do.
    pub(crate) async fn update_sandbox(&self, request: &UpdateSandboxRequest) -> Result<(), SandboxError> {
        self.check_id(&request.sandbox_id)?;
        let managed = {
            let mut slots = self.lock();
            let managed = of(&mut slots, &request.sandbox_id)?.clone();
            Self::check_ready(&slots)?;
            managed
        };
        self.live_vm()?;
        let size = self.size().ok_or_else(|| SandboxError::Internal("the VM's size is not known".to_owned()))?;
        let host = prepare::update_of_sandbox(request, &managed.spec, size)?;
        if host != HostResources::default() {
            self.restrict_cpuset(&self.id, host).await?;
        }
        Ok(())
    }

    /// StopSandbox: ends all containers and the VM within `timeout`, if one is given, and records the exit. The sandbox
    /// stays known until its shutdown. Succeeds for a sandbox that has ended.
    pub(crate) async fn stop_sandbox(&self, id: &str, timeout: Option<Duration>) -> Result<(), SandboxError> {
        self.check_id(id)?;
        let (managed, vm) = {
            let mut slots = self.lock();
            let managed = of(&mut slots, id)?.clone();
            match &slots.vm {
                VmSlot::Up(vm) => (managed, Some(vm.clone())),
                VmSlot::Booting(_) => {
                    return Err(SandboxError::NotReady(format!("sandbox {id:?} is starting: shut it down instead")));
                }
                VmSlot::Empty | VmSlot::Stopping => (managed, None),
            }
        };
        // Recorded first: the VM's death counts as requested.
        managed.record_exit(STOPPED);
        let Some(vm) = vm.filter(|vm| !vm.stopping()) else { return Ok(()) };
        let stop = self.stop(&vm, "StopSandbox", vm.stop(self.delivered()));
        match timeout {
            None => stop.await,
            Some(limit) => {
                if tokio::time::timeout(limit, stop).await.is_err() {
                    vm.fail(format!("StopSandbox: the guest did not stop within {} s", limit.as_secs()));
                }
            }
        }
        vm.died().await;
        // The kubelet kills what is left in a stopped pod's cgroup, and the shim still has to serve its shutdown.
        self.leave_cgroup().await;
        Ok(())
    }

    /// WaitSandbox: waits until the sandbox has ended.
    pub(crate) async fn wait_sandbox(&self, id: &str) -> Result<SandboxExit, SandboxError> {
        self.check_id(id)?;
        let mut exit = of(&mut self.lock(), id)?.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
        ended.ok_or(SandboxError::Stopping)
    }

    /// SandboxStatus. Waits for the end of StartSandbox if it is running, which the boot's deadline bounds: a containerd that
    /// has restarted meanwhile asks once, and would never create a container in a sandbox that was not ready then.
    pub(crate) async fn sandbox_state(&self, id: &str) -> Result<SandboxState, SandboxError> {
        self.check_id(id)?;
        let mut start = of(&mut self.lock(), id)?.start.subscribe();
        start.wait_for(|call| *call != StartCall::Running).await.map_err(|_| SandboxError::Stopping)?;
        let mut slots = self.lock();
        let managed = of(&mut slots, id)?;
        Ok(SandboxState { started: managed.started.clone(), exit: managed.exit.borrow().clone() })
    }

    /// SandboxMetrics: what the sandbox uses on the host. The VM's processes and the shim, with everything that runs in
    /// the guest.
    pub(crate) async fn sandbox_usage(&self, id: &str) -> Result<Usage, SandboxError> {
        self.check_id(id)?;
        let vm = self.live_vm()?;
        let what = "measure the sandbox's processes";
        let failed = move |error: &dyn std::fmt::Display| SandboxError::Internal(format!("{what}: {error}"));
        let mut processes = vm.processes();
        processes.push(ProcessId::own().map_err(|error| failed(&error))?);
        blocking(what, move || usage::of(&processes).map_err(|error| failed(&error))).await
    }

    /// PingSandbox: whether the sandbox's VM, if it was started, is alive.
    pub(crate) fn ping_sandbox(&self, id: &str) -> Result<(), SandboxError> {
        self.check_id(id)?;
        if of(&mut self.lock(), id)?.started.is_some() { self.live_vm().map(drop) } else { Ok(()) }
    }

    /// ShutdownSandbox: ends everything. Nothing of the sandbox remains, and the shim exits.
    pub(crate) async fn shutdown_sandbox(self: &Arc<Self>, id: &str) -> Result<(), SandboxError> {
        self.check_id(id)?;
        self.shutdown(true).await
    }

    /// Whether the sandbox, if the Sandbox API manages it, accepts containers.
    pub(super) fn check_ready(slots: &Slots) -> Result<(), SandboxError> {
        match &slots.managed {
            Some(managed) if !managed.is_ready() => {
                let why = if managed.exit.borrow().is_some() { "has ended" } else { "has not been started" };
                Err(SandboxError::NotReady(format!("the sandbox {why}")))
            }
            _ => Ok(()),
        }
    }

    /// WaitSandbox returns in any case.
    pub(super) fn end_managed(&self) {
        if let Some(managed) = &self.lock().managed {
            managed.record_exit(KILLED);
        }
    }

    /// The sandbox itself, if `pid` is that of its holder.
    pub(super) fn own_namespaces(&self, pid: u32) -> Option<Sibling> {
        let slots = self.lock();
        let managed = slots.managed.as_ref().filter(|managed| managed.is_ready())?;
        let started = managed.started.as_ref().filter(|started| started.pid == pid)?;
        Some(Sibling { guest_pid: started.guest_pid, in_vms_network: true })
    }

    /// A call for another sandbox is a mistake of the client: this shim serves one.
    fn check_id(&self, id: &str) -> Result<(), SandboxError> {
        if id == self.id { Ok(()) } else { Err(SandboxError::NotFound { what: "sandbox", id: id.to_owned() }) }
    }
}

fn of<'a>(slots: &'a mut Slots, id: &str) -> Result<&'a mut Managed, SandboxError> {
    slots.managed.as_mut().ok_or_else(|| SandboxError::NotFound { what: "sandbox", id: id.to_owned() })
}

/// Ends the holder with the VM, and the VM with its holder, and records the sandbox's exit.
async fn watch_sandbox(vm: Arc<Vm>, holder: Child, managed: Managed) {
    tokio::select! {
        biased;
        _ = vm.died() => {}
        ended = holder.exited() => {
            tracing::warn!(pid = holder.process().pid, exit = %ended, "the sandbox's holder has ended: killing its VM");
            vm.fail(format!("the sandbox's holder {ended}"));
        }
    }
    vm.died().await;
    managed.record_exit(KILLED);
    holder.kill();
}
