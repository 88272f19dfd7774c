//! The limits of the sandbox's cgroup on the host: what its containers ask for together, and what the VM takes besides.

use husk_protos::chain::Chain;
use husk_protos::lock::lock;

use crate::config::names::PLACED_ENV;
use crate::host::cgroup::home;
use crate::prepare::overhead;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::sandbox::thread::blocking;
use crate::vm::cgroup::HostCgroup;

impl Sandbox {
    /// Limits the sandbox's cgroup to what its containers ask for now. Call it whenever that changes, and when the VM has
    /// booted: before, its CPU time is not limited.
    pub(super) async fn limit_cgroup(&self, id: &str) -> Result<(), SandboxError> {
        // Locked meanwhile: changes apply in their order.
        let cgroup = self.cgroup.lock().await;
        let (Some(host), Some(memory)) = (cgroup.clone(), *lock(&self.host_memory)) else { return Ok(()) };
        let mut wanted = overhead::limits(lock(&self.demands).values().copied(), memory);
        if self.live_vm().is_err() {
            wanted.milli_cpus = None;
        }
        if *lock(&self.host_limits) == wanted {
            return Ok(());
        }
        let missing =
            blocking("limit the sandbox's cgroup", move || Ok::<_, SandboxError>(host.limit(&wanted)?)).await?;
        *lock(&self.host_limits) = wanted;
        for field in missing {
            tracing::warn!(
                container = id,
                "{field}: only the guest applies it, because the sandbox's cgroup on the host has no such controller, was \
                 not created by husk, or is below a cgroup with a lower limit"
            );
        }
        Ok(())
    }

    /// Limits the sandbox's cgroup again, after a container has gone or a change of its limits has failed.
    pub(super) async fn limit_cgroup_again(&self, id: &str) {
        if let Err(error) = self.limit_cgroup(id).await {
            tracing::warn!(container = id, error = %Chain(&error), "failed to change the limits of the sandbox's cgroup");
        }
    }

    /// Moves the shim to the sandbox's cgroup, unless it is there or the runtime's options name another.
    pub(super) async fn enter_cgroup(&self, cgroup: Option<HostCgroup>) -> Result<(), SandboxError> {
        let Some(cgroup) = cgroup else { return Ok(()) };
        if std::env::var_os(PLACED_ENV).is_some() || std::mem::replace(&mut *lock(&self.in_cgroup), true) {
            return Ok(());
        }
        let what = "move the shim to the sandbox's cgroup";
        blocking(what, move || cgroup.enter().map_err(|error| SandboxError::Internal(format!("{what}: {error}")))).await
    }

    /// Moves the shim back: the sandbox's cgroup is about to be removed.
    pub(super) async fn leave_cgroup(&self) {
        let left = blocking("move the shim out of the sandbox's cgroup", || {
            home::come_back().map_err(|error| SandboxError::Internal(error.to_string()))
        });
        if let Err(error) = left.await {
            tracing::error!(error = %Chain(&error), "failed to move the shim out of the sandbox's cgroup");
        }
    }
}
