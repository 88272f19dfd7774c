//! A sandbox's containers in the share: what is mounted for them, who may write, and what the guest forgets after them.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use husk_protos::bundle::ReleaseRequest;
use husk_protos::chain::Chain;
use ttrpc::context::with_duration;

use crate::guest::client::GuestError;
use crate::prepare::Prepared;
use crate::rootfs::plan::{RootPlan, create_folders};
use crate::rootfs::share::{Released, Server, Share, ShareError, ShareRoot};
use crate::rootfs::spec::Places;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::sandbox::thread::blocking;
use crate::state::{Owner, Step};
use crate::vm::Vm;

impl Sandbox {
    /// The sandbox's share, created when it is first needed.
    pub(super) fn share(&self) -> Result<Share, SandboxError> {
        let mut slots = self.lock();
        if let Some(share) = &slots.share {
            return Ok(share.clone());
        }
        let mut record = |steps| self.journal.record(&Owner::Sandbox, steps);
        let share = Share::create(self.journal.dir(), &mut record)?;
        slots.share = Some(share.clone());
        Ok(share)
    }

    /// Adds a container's root filesystem and bind mounts to the share, on a separate thread because mount(2) may block.
    /// Creates the folders that the mounts of the root require.
    pub(super) async fn mount(&self, share: &Share, id: &str, prepared: &Prepared) -> Result<Places, SandboxError> {
        let (share, journal) = (share.clone(), self.journal.clone());
        let (id, root, rewritten) = (id.to_owned(), prepared.root.plan.clone(), prepared.rewritten.clone());
        blocking("mount", move || {
            let mut record = |owner: &Owner, steps: Vec<Step>| journal.record(owner, steps);
            let root = match &root {
                RootPlan::Host(root) => {
                    create_folders(&root.folders)?;
                    ShareRoot::Stacked { mounts: &root.mounts, rootfs: &rewritten.rootfs }
                }
                RootPlan::Guest(_) => ShareRoot::OnDisks,
            };
            Ok::<_, SandboxError>(share.add_container(&mut record, &id, root, &rewritten.binds)?)
        })
        .await
    }

    /// Completes a container's part of the share, which virtiofsd serves by now: mounts the host's folders and files,
    /// lets the VM write where the container may write, and watches what its programs watch.
    pub(super) async fn complete_share(&self, vm: &Arc<Vm>, share: &Share, id: &str) -> Result<(), SandboxError> {
        let (share, server, watches, id) = (share.clone(), vm.clone(), self.watches.clone(), id.to_owned());
        let completed = blocking("complete the share", move || {
            share.attach(server_of(&server), &id)?;
            share.settle(server_of(&server))?;
            watches.add(&server, share.watched(server_of(&server), &id)?);
            Ok::<_, ShareError>(())
        });
        completed.await.map_err(|error| death_or(vm, error))
    }

    /// Makes the host keep the VM from writing to a container's root filesystem, if its spec says so. Until then the guest
    /// creates mount points there.
    pub(super) async fn protect_root(&self, vm: &Arc<Vm>, id: &str, read_only: bool) -> Result<(), SandboxError> {
        let share = self.lock().share.clone();
        let (Some(share), true) = (share, read_only) else { return Ok(()) };
        let (server, id) = (vm.clone(), id.to_owned());
        let protect = move || share.protect_root(server_of(&server), &id);
        blocking("protect a root filesystem", protect).await
    }

    /// Lets the VM write to the sources that a container may write to, and to no others.
    async fn settle_share(&self, vm: &Arc<Vm>, share: &Share) -> Result<(), SandboxError> {
        let (share, server) = (share.clone(), vm.clone());
        let settled = blocking("change the share", move || share.settle(server_of(&server)));
        settled.await.map_err(|error| death_or(vm, error))
    }

    /// Ends a container's use of the share: the guest unmounts what nobody uses any more, then the host does. If the
    /// guest does not answer, the host unmounts it all the same.
    pub(super) async fn release_share(&self, id: &str) {
        let Some(share) = self.lock().share.clone() else { return };
        let (journal, container, of_share) = (self.journal.clone(), id.to_owned(), share.clone());
        let released = blocking("release a part of the share", move || {
            Ok::<_, SandboxError>(
                of_share.release(&mut |owner: &Owner, steps: Vec<Step>| journal.record(owner, steps), &container),
            )
        });
        let Released { entries, volumes } = match released.await {
            Ok(released) => released,
            Err(error) => return tracing::error!(container = id, error = %Chain(&error), "failed to leave the share"),
        };
        self.watches.remove(&entries);
        if let Ok(vm) = self.live_vm()
            && !entries.is_empty()
        {
            let request = ReleaseRequest { entries, ..Default::default() };
            // Part of Delete, which the guest may not delay.
            let context = with_duration(vm.kill_timeout());
            let answered = vm.guest.bundle.release(context, &request).await.map_err(GuestError::from);
            if let Err(error) = answered
                && vm.cause_of_death().is_none()
            {
                tracing::warn!(container = id, error = %Chain(&error), "the guest keeps files of a deleted container");
            }
            if let Err(error) = self.settle_share(&vm, &share).await {
                tracing::error!(container = id, error = %Chain(&error), "failed to change the share");
            }
        }
        for owner in volumes {
            if let Err(error) = self.journal.undo(owner).await {
                tracing::error!(container = id, error = %Chain(&error), "failed to remove a source from the share");
            }
        }
    }
}

/// virtiofsd, which has made the share its root.
fn server_of(vm: &Vm) -> Server<'static, impl FnOnce() -> io::Result<File>> {
    Server { open: || vm.share_namespace(), root: Path::new("/") }
}

/// The VM's death, if that is why a call for it has failed.
fn death_or(vm: &Vm, error: SandboxError) -> SandboxError {
    vm.cause_of_death().map_or(error, |cause| SandboxError::VmDead { cause })
}
