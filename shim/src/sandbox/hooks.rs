//! When a container's host hooks run. `crate::host::hooks` runs them.

use containerd_shim_protos::api::{CreateTaskRequest, KillRequest};
use husk_protos::chain::Chain;

use crate::guest::client::GuestError;
use crate::host::hooks;
use crate::host::hooks::{ContainerStatus, Hook, Hooks, Subject};
use crate::prepare::Prepared;
use crate::sandbox::container::Container;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::sandbox::thread::blocking;
use crate::state::{Owner, Step};
use crate::vm::Vm;

/// The description of a container that its hooks receive.
pub(super) fn subject(request: &CreateTaskRequest, prepared: &Prepared, holder: u32) -> Subject {
    let annotations = prepared.rewritten.spec.annotations().clone().unwrap_or_default();
    Subject {
        id: request.id.clone(),
        bundle: request.bundle.clone().into(),
        annotations: annotations.into_iter().collect(),
        pid: holder,
    }
}

async fn run(hooks: Vec<Hook>, subject: Subject, status: ContainerStatus) -> Result<(), SandboxError> {
    blocking("run hooks", move || hooks::run(&hooks, &subject, status)).await
}

impl Sandbox {
    /// Runs the hooks that precede a container's creation. After this call its `poststop` hooks must run, even if the
    /// container is never created.
    pub(super) async fn run_create_hooks(&self, hooks: &Hooks, subject: &Subject) -> Result<(), SandboxError> {
        if hooks.is_empty() {
            return Ok(());
        }
        let step = Step::Hooks { container: subject.clone(), poststop: hooks.poststop.clone() };
        self.journal.record(&Owner::Container(subject.id.clone()), [step])?;
        run(hooks.create.clone(), subject.clone(), ContainerStatus::Creating).await
    }

    /// Runs the hooks that follow the start of a container's init process. If a hook fails, the process is killed.
    pub(super) async fn run_poststart_hooks(&self, vm: &Vm, container: &Container) -> Result<(), SandboxError> {
        if container.poststart.is_empty() {
            return Ok(());
        }
        let ran = run(container.poststart.clone(), container.subject.clone(), ContainerStatus::Running).await;
        if ran.is_err() {
            let kill = KillRequest { id: container.id.clone(), signal: libc::SIGKILL as u32, ..Default::default() };
            if let Err(error) = vm.guest.task.kill(vm.guest.context(), &kill).await.map_err(GuestError::from) {
                tracing::warn!(
                    container = container.id,
                    error = %Chain(&error),
                    "failed to kill a container whose poststart hook failed"
                );
            }
        }
        ran
    }

    /// Runs a container's `poststop` hooks unless they have run already. Call it before responding to Delete:
    /// containerd's client then removes the resources that the hooks use.
    pub(super) async fn run_poststop_hooks(&self, id: &str) {
        if let Err(error) = self.journal.run_poststop_hooks(id).await {
            tracing::error!(container = id, error = %Chain(&error), "failed to record that the poststop hooks have run");
        }
    }
}
