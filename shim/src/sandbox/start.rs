//! Starts processes: a container's init process, and execs in a container.

use std::sync::Arc;

use containerd_shim_protos::api::{ExecProcessRequest, StartRequest, StateRequest, Status};
use husk_protos::chain::Chain;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::guest::client::GuestError;
use crate::rootfs::spec::parse::parse_exec;
use crate::sandbox::container::Container;
use crate::sandbox::container::guest_reply;
use crate::sandbox::container::process::Process;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::state::check_identifier;
use crate::stdio::Stdio;
use crate::vm::Vm;

/// The value of a stream's field in a request to the guest, for a stream that the shim carries over vsock.
pub(super) const STREAM: &str = "stream";
/// The capability to mount file systems, as specs name it.
const CAP_SYS_ADMIN: &[u8] = b"CAP_SYS_ADMIN";

impl Sandbox {
    /// Starts a container's init process or an exec, and returns the PID of the container's holder.
    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> Result<u32, SandboxError> {
        let init = self.process(id, "")?.1;
        if !exec_id.is_empty() && init.exit().is_some() {
            return Err(SandboxError::InitExited { task: id.to_owned() });
        }
        let (container, process) = self.process(id, exec_id)?;
        let vm = self.live_vm()?;
        if exec_id.is_empty() {
            // What CNI and hooks have configured since Create has to be there before the first instruction.
            vm.settle_network().await?;
        }
        // The streams belong to the first start. The guest rejects a second one.
        let attaches = !exec_id.is_empty() && process.claim_start();
        if attaches {
            let attached = async {
                process.attach_outputs(&vm.guest, id, &self.namespace).await?;
                process.attach_input(&vm.guest, id).inspect_err(|_| process.detach())
            };
            attached.await.inspect_err(|_| process.release_start())?;
        }
        let request = StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        match vm.guest.task.start(vm.guest.context(), &request).await {
            Ok(response) => {
                process.set_guest_pid(response.pid);
                if exec_id.is_empty() {
                    self.run_poststart_hooks(&vm, &container).await?;
                    self.refill_pool();
                    self.make_layers();
                    tokio::spawn(async move { vm.set_memory_target().await });
                }
                Ok(process.pid())
            }
            Err(error) => {
                if attaches {
                    process.detach();
                    record_failed_start(&vm, &container, &process).await;
                    process.release_start();
                }
                let error = SandboxError::from(error);
                tracing::warn!(container = container.id, exec = exec_id, error = %Chain(&error), "start failed");
                Err(error)
            }
        }
    }

    /// Adds an exec to a container.
    pub(crate) async fn exec(&self, request: ExecProcessRequest) -> Result<(), SandboxError> {
        check_identifier("exec id", &request.exec_id)?;
        let stdio = Stdio::from(&request);
        stdio.check()?;
        let [stdin, stdout, stderr] = stdio.in_guest(STREAM);
        let container = self.container(&request.id)?;
        let vm = self.live_vm()?;
        if !container.add(Arc::new(Process::new(&request.exec_id, stdio, container.subject.pid))) {
            return Err(SandboxError::AlreadyExists { what: "process", id: request.exec_id });
        }
        let mut guest_request = ExecProcessRequest { stdin, stdout, stderr, ..request.clone() };
        leave_out_unknown(&mut guest_request);
        if has_mount_capability(&guest_request) {
            container.may_mount();
        }
        if let Err(error) = vm.guest.task.exec(vm.guest.context(), &guest_request).await {
            if let Some(process) = container.remove(&request.exec_id) {
                process.discard();
            }
            return Err(error.into());
        }
        Ok(())
    }
}

/// Whether the process of a request has the capability to mount, or names it anywhere.
fn has_mount_capability(request: &ExecProcessRequest) -> bool {
    let named = |value: &[u8]| value.windows(CAP_SYS_ADMIN.len()).any(|part| part == CAP_SYS_ADMIN);
    request.spec.as_ref().is_some_and(|spec| named(&spec.value))
}

/// Leaves out the capabilities that the guest does not know. The guest ignores unknown fields, and reports a process
/// that is not valid.
fn leave_out_unknown(request: &mut ExecProcessRequest) {
    let Some(spec) = request.spec.as_mut() else { return };
    if let Ok(Some((process, ignored))) = parse_exec(&spec.value) {
        for part in ignored {
            tracing::warn!(container = request.id, exec = request.exec_id, part, "ignored part of the process");
        }
        spec.value = process;
    }
}

/// Records the exit of an exec that failed to start, for callers that wait for it, unless the guest allows another
/// start.
async fn record_failed_start(vm: &Vm, container: &Container, process: &Process) {
    let request = StateRequest { id: container.id.clone(), exec_id: process.exec_id.clone(), ..Default::default() };
    match vm.guest.task.state(vm.guest.context(), &request).await {
        Ok(state) if state.status == Status::STOPPED.into() => {
            let exited_at = state.exited_at.as_ref();
            process.record_exit(guest_reply::exit(state.exit_status, exited_at, &Timestamp::now()));
        }
        Ok(_) => {}
        // If the VM died, every process's exit is recorded anyway.
        Err(error) => tracing::warn!(
            container = container.id,
            exec = process.exec_id,
            error = %Chain(&GuestError::from(error)),
            "failed to query the state of an exec that did not start"
        ),
    }
}
