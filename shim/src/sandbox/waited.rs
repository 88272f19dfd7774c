//! A VM from the pool: it has booted and waited without a sandbox, and becomes the sandbox's VM instead of a boot. If it
//! does not fit or does not work, the sandbox boots its own, and nobody notices more than the time.

use std::sync::Arc;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;

use crate::host::cgroup::home;
use crate::pool::launch;
use crate::prepare;
use crate::prepare::{Attachments, Prepared};
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Sandbox, VmSlot};
use crate::sandbox::spare::Spare;
use crate::sandbox::thread::blocking;
use crate::state::life::VmState;
use crate::vm::{BootError, BootPlan, Vm};

/// Why a VM from the pool is not used.
#[derive(Debug, thiserror::Error)]
enum Unfit {
    #[error("the sandbox needs another VM")]
    Other,
    #[error("it is dead: {0}")]
    Dead(String),
    #[error(transparent)]
    Adoption(#[from] BootError),
}

impl Sandbox {
    /// Makes the VM from the pool the sandbox's, if there is one that fits.
    pub(super) async fn adopt_spare(
        self: &Arc<Self>,
        prepared: &Prepared,
        attachments: &Attachments,
    ) -> Option<Arc<Vm>> {
        let spare = self.lock().spare.take()?;
        let started = std::time::Instant::now();
        let (network, cgroup) = (attachments.network.clone(), attachments.cgroup.clone());
        let attachments = Attachments { network, cgroup, ..Attachments::new(attachments.share.clone()) };
        let (_, plan) = prepare::plan(prepared, attachments);
        if let Err(unfit) = self.adopt(&spare, prepared, &plan).await {
            let cause = Chain(&unfit).to_string();
            tracing::warn!(cause, "the VM from the pool is not used: the sandbox boots another");
            self.lock().spare = Some(spare);
            self.discard_spare(&cause).await;
            return None;
        }
        let Spare { vm, events, last_event, boot, key: _ } = spare;
        self.start_forwarding(prepared, &vm).await;
        self.record_boot(boot, Some(&vm));
        self.set_vm_state(VmState::Running, "the VM has waited in the pool");
        let us = started.elapsed().as_micros() as u64;
        tracing::info!(us, "the sandbox has a VM from the pool");
        tokio::spawn(self.clone().forward_events(vm.clone(), events, last_event));
        Some(vm)
    }

    async fn adopt(&self, spare: &Spare, prepared: &Prepared, plan: &BootPlan) -> Result<(), Unfit> {
        if prepared.pool_key().as_ref() != Some(&spare.key) {
            return Err(Unfit::Other);
        }
        if let Some(cause) = spare.vm.cause_of_death() {
            return Err(Unfit::Dead(cause));
        }
        Ok(spare.vm.adopt(plan, &self.journal).await?)
    }

    /// Ends the VM from the pool, if the sandbox has one that it does not use.
    pub(super) async fn discard_spare(&self, cause: &str) {
        let Some(spare) = self.lock().spare.take() else { return };
        self.set_vm_state(VmState::StartFailed, cause);
        if let Err(error) = spare.vm.discard().await {
            tracing::error!(error = %Chain(&error), "failed to end the VM from the pool");
        }
    }

    /// Notes what the pool is to be filled with, for the time after the first container's start.
    pub(super) fn note_refill(&self, prepared: &Prepared) {
        if prepared.pool_size() > 0 && prepared.pool_key().is_some() && matches!(self.lock().vm, VmSlot::Empty) {
            *lock(&self.refill) = Some(prepared.boot.pool_request());
        }
    }

    /// Fills the pool in the background, after the sandbox's first container has started: a boot earlier would take the
    /// CPUs that the container needs.
    pub(super) fn refill_pool(&self) {
        let Some(request) = lock(&self.refill).take() else { return };
        let fill = move || {
            let program = std::env::current_exe()?;
            // In the cgroup in which the shim was started: the waiting VM does not belong to this sandbox.
            launch::fill(&program, &request, home::files()?)
        };
        tokio::spawn(async move {
            let what = "fill the pool";
            let filled =
                blocking(what, move || fill().map_err(|error| SandboxError::Internal(format!("{what}: {error}"))));
            match filled.await {
                Ok(status) if status.success() => {}
                Ok(status) => tracing::warn!(%status, "failed to fill the pool"),
                Err(error) => tracing::warn!(error = %Chain(&error), "failed to fill the pool"),
            }
        });
    }
}
