//! Boots the sandbox's VM for its first container. Containers that arrive during the boot wait for it.

use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::events::Event;
use tokio::sync::watch;

use crate::extras::disk;
use crate::extras::disk::DiskError;
use crate::extras::files::OpenedFile;
use crate::forward::address;
use crate::guest::client::Metering;
use crate::network::Claim;
use crate::prepare;
use crate::prepare::{Attachments, PrepareError, Prepared};
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Booting, Sandbox, Slots, VmSlot, alive};
use crate::state::life::VmState;
use crate::state::{Boot, facts};
use crate::vm::{BootError, Vm};
use crate::vmm::Disk;

impl Sandbox {
    /// Returns the VM; boots it if necessary.
    pub(super) async fn ensure_vm(
        self: &Arc<Self>,
        prepared: &Prepared,
        attachments: Attachments,
    ) -> Result<Arc<Vm>, SandboxError> {
        let mut booting = {
            let mut slots = self.lock();
            if let VmSlot::Up(_) | VmSlot::Booting(_) = slots.vm {
                // Check again: another container may have started the VM while this one was prepared.
                let mut problems: Vec<String> =
                    prepared.beyond(&slots.booted_with).iter().map(ToString::to_string).collect();
                problems.extend(other_network(prepared.network.as_ref(), slots.network.as_ref()));
                if !problems.is_empty() {
                    return Err(PrepareError(problems).into());
                }
            }
            match &slots.vm {
                VmSlot::Up(vm) => return alive(vm),
                VmSlot::Stopping => return Err(SandboxError::Stopping),
                VmSlot::Booting(booting) => booting.clone(),
                VmSlot::Empty => self.start_boot(&mut slots, prepared, attachments),
            }
        };
        let ended_early = || SandboxError::Internal("the boot ended without a result".to_owned());
        let booted = booting.wait_for(Option::is_some).await.map_err(|_| ended_early())?.clone();
        Ok(booted.ok_or_else(ended_early)??)
    }

    /// Starts the boot in a task of its own: it continues if the container that requested it is gone.
    fn start_boot(self: &Arc<Self>, slots: &mut Slots, prepared: &Prepared, attachments: Attachments) -> Booting {
        slots.booted_with = prepared.booting_with();
        slots.network = attachments.network.clone();
        let (done, booting) = watch::channel(None);
        slots.vm = VmSlot::Booting(booting.clone());
        let (sandbox, prepared) = (self.clone(), prepared.clone());
        tokio::spawn(async move {
            let booted = tokio::select! {
                booted = sandbox.boot(&prepared, attachments) => booted,
                limit = sandbox.given_up(prepared.kill_timeout()) => {
                    let error = BootError::GivenUp { limit };
                    sandbox.set_vm_state(VmState::StartFailed, &error.cause());
                    Err(error)
                }
            };
            let booted = booted.map_err(Arc::new);
            let mut slots = sandbox.lock();
            // If the sandbox is being torn down, the slot is `Stopping` and the teardown waits for `done`. After a
            // failed boot the next container may retry.
            if matches!(slots.vm, VmSlot::Booting(_)) {
                slots.vm = booted.as_ref().map_or(VmSlot::Empty, |vm| VmSlot::Up(vm.clone()));
            }
            done.send_replace(Some(booted));
        });
        booting
    }

    /// Resolves when a boot has lasted for `limit` after a shutdown was requested.
    async fn given_up(&self, limit: Duration) -> Duration {
        // Cannot fail: self holds the sender.
        let _ = self.shutdown_requested.subscribe().wait_for(|requested| *requested).await;
        tokio::time::sleep(limit).await;
        limit
    }

    async fn boot(self: &Arc<Self>, prepared: &Prepared, attachments: Attachments) -> Result<Arc<Vm>, BootError> {
        let started = std::time::Instant::now();
        if let Some(vm) = self.adopt_spare(prepared, &attachments).await {
            return Ok(vm);
        }
        let mut reached = Boot::begin();
        let booted = self.boot_with_extras(prepared, attachments, &mut reached).await;
        let (vm, events) = match booted {
            Ok(booted) => booted,
            Err(error) => {
                self.record_boot(reached, None);
                self.set_vm_state(VmState::StartFailed, &error.cause());
                return Err(error);
            }
        };
        tracing::info!(
            ms = started.elapsed().as_millis() as u64,
            kernel = facts::printable(&vm.hello.kernel),
            init = facts::printable(&vm.hello.version),
            "VM ready"
        );
        self.record_boot(reached, Some(&vm));
        self.set_vm_state(VmState::Running, "the guest has answered");
        tokio::spawn(self.clone().forward_events(vm.clone(), events, 0));
        Ok(vm)
    }

    /// Forwards the connections of programs inside the VM's network namespace.
    pub(super) async fn start_forwarding(&self, prepared: &Prepared, vm: &Vm) {
        // Only now is it certain that no other VM uses the namespace, whose connections this would take.
        if let Some(claim) = &prepared.network {
            let forwarding = address::start(claim, &self.id, &self.journal, &vm.guest).await;
            self.lock().forwarding = forwarding;
        }
    }

    /// Boots the VM with the disk for extras, and forwards the connections of programs inside its network namespace.
    async fn boot_with_extras(
        &self,
        prepared: &Prepared,
        attachments: Attachments,
        reached: &mut Boot,
    ) -> Result<(Arc<Vm>, Metering<Event>), BootError> {
        let extras = extras_disk(prepared.sources.clone()).await?;
        let (vmm, plan) = prepare::plan(prepared, Attachments { extras: extras.clone(), ..attachments });
        let (vm, events) = Vm::boot(&*vmm, &plan, &self.journal, &self.guest_logs, reached).await?;
        self.start_forwarding(prepared, &vm).await;
        // The guest has copied the disk's contents before its hello.
        if let Some(disk) = extras
            && let Err(error) = disk::give_back(&disk)
        {
            tracing::warn!(error = %Chain(&error), "failed to free the memory of the disk for extras");
        }
        Ok((vm, events))
    }

    /// Records the milestones of a boot and the guest's versions. The next change of state writes them.
    pub(super) fn record_boot(&self, reached: Boot, vm: Option<&Vm>) {
        let recorded = self.journal.with(|state| {
            state.set_boot(reached);
            if let (Some(vm), Some(mut machine)) = (vm, state.machine().cloned()) {
                machine.kernel = Some(facts::printable(&vm.hello.kernel));
                machine.init = Some(facts::printable(&vm.hello.version));
                state.set_machine(machine);
            }
            Ok(())
        });
        // Fails only after everything has been undone: then nobody will read the record.
        if let Err(error) = recorded {
            tracing::debug!(error = %Chain(&error), "failed to record the boot");
        }
    }
}

/// Writes the disk for extras, on a separate thread because reading the files may block.
async fn extras_disk(sources: Vec<OpenedFile>) -> Result<Option<Disk>, BootError> {
    let written = tokio::task::spawn_blocking(move || disk::write(&sources));
    Ok(written.await.map_err(|error| DiskError::Image(std::io::Error::other(error)))??)
}

/// Why a container with this network namespace cannot run in a VM that was booted with that one.
fn other_network(requested: Option<&Claim>, booted_with: Option<&Claim>) -> Option<String> {
    let requested = requested.filter(|claim| !booted_with.is_some_and(|booted| claim.is_same(booted)))?;
    let booted =
        booted_with.map_or_else(|| "no network namespace".to_owned(), |claim| claim.netns.display().to_string());
    Some(format!(
        "linux.namespaces: the network namespace {} is not the sandbox's: its VM was booted with {booted}",
        requested.netns.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_joins_the_sandboxs_namespace_by_any_path_and_no_other() {
        let claim = |path: &str, inode| Claim { netns: path.into(), device: 4, inode };
        let (pod, link, other) = (claim("/run/netns/x", 7), claim("/var/run/netns/x", 7), claim("/run/netns/x", 8));
        assert_eq!(other_network(None, None), None);
        assert_eq!(other_network(None, Some(&pod)), None);
        assert_eq!(other_network(Some(&link), Some(&pod)), None);
        for (requested, booted_with) in [(&other, Some(&pod)), (&pod, None)] {
            let problem = other_network(Some(requested), booted_with).unwrap();
            assert!(problem.contains("/run/netns/x is not the sandbox's"), "{problem}");
        }
    }
}
