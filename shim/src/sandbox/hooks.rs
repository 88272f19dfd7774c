//! When a container's hooks of the host are run. What runs one is in `crate::host::hooks`.

use containerd_shim_protos::api::{CreateTaskRequest, KillRequest};

use crate::host::hooks;
use crate::host::hooks::{ContainerStatus, Hook, Hooks, Subject};
use crate::prepare::Prepared;
use crate::sandbox::container::Container;
use crate::sandbox::{Error, Sandbox};
use crate::state::{Owner, Step};
use crate::vm::boot::Vm;

/// What a container's hooks are told of it.
pub(super) fn subject(request: &CreateTaskRequest, prepared: &Prepared) -> Subject {
    let annotations = prepared.rewritten.spec.annotations().clone().unwrap_or_default();
    Subject {
        id: request.id.clone(),
        bundle: request.bundle.clone().into(),
        annotations: annotations.into_iter().collect(),
    }
}

async fn run(hooks: Vec<Hook>, subject: Subject, status: ContainerStatus) -> Result<(), Error> {
    let ran = tokio::task::spawn_blocking(move || hooks::run(&hooks, &subject, status)).await;
    ran.map_err(|error| Error::Task(format!("hooks: {error}")))?.map_err(Error::Hook)
}

impl Sandbox {
    /// Runs the hooks that come before a container. From here on its `poststop` hooks are due, whatever becomes of it.
    pub(super) async fn run_create_hooks(&self, hooks: &Hooks, subject: &Subject) -> Result<(), Error> {
        if hooks.is_empty() {
            return Ok(());
        }
        let step = Step::Hooks { container: subject.clone(), poststop: hooks.poststop.clone() };
        self.journal.record(&Owner::Container(subject.id.clone()), [step])?;
        run(hooks.create.clone(), subject.clone(), ContainerStatus::Creating).await
    }

    /// Runs the hooks that come after the start of a container's process, which is killed if one of them fails.
    pub(super) async fn run_poststart_hooks(&self, vm: &Vm, container: &Container) -> Result<(), Error> {
        if container.poststart.is_empty() {
            return Ok(());
        }
        let ran = run(container.poststart.clone(), container.subject.clone(), ContainerStatus::Running).await;
        if ran.is_err() {
            let kill = KillRequest { id: container.id.clone(), signal: libc::SIGKILL as u32, ..Default::default() };
            if let Err(error) = vm.guest.task.kill(vm.guest.context(), &kill).await {
                tracing::warn!(container = container.id, %error, "a container whose hook failed is not killed");
            }
        }
        ran
    }

    /// Runs the hooks that come after a container, if it has any and they have not been run. Before containerd is told that it is gone: its
    /// client puts away what they use then.
    pub(super) async fn run_poststop_hooks(&self, id: &str) {
        if let Err(error) = self.journal.run_poststop_hooks(id).await {
            tracing::error!(container = id, %error, "that the poststop hooks have run is not written down");
        }
    }
}
