//! Creates a container: its files in the share, its bundle and its process in the guest. The first container boots the
//! VM.

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest};
use husk_protos::bundle::{DiskRoot, PutBundleRequest, RemoveBundleRequest};
use husk_protos::chain::Chain;

use crate::guest::client::GuestError;
use crate::prepare;
use crate::prepare::{Attachments, Prepared, Siblings};
use crate::sandbox::container::{Container, Root};
use crate::sandbox::error::SandboxError;
use crate::sandbox::holder::{join_cgroup, watch_holder};
use crate::sandbox::hooks;
use crate::sandbox::registry::{ContainerSlot, Sandbox, VmSlot};
use crate::sandbox::roots::new_overlay;
use crate::sandbox::start::STREAM;
use crate::state::{Owner, check_identifier};
use crate::stdio::Stdio;
use crate::vm::Vm;

impl Sandbox {
    /// Creates a container, and the VM if it is the first. Returns the PID of its holder. If it fails, everything is
    /// undone.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, SandboxError> {
        let id = request.id.clone();
        check_identifier("container id", &id)?;
        self.reserve(&id)?;
        let created = self.create_reserved(request).await;
        if let Err(error) = &created {
            tracing::warn!(container = id, error = %Chain(error), "create failed");
            self.run_poststop_hooks(&id).await;
            self.remove_container(&id).await;
        }
        created
    }

    /// Reserves a container's id.
    fn reserve(&self, id: &str) -> Result<(), SandboxError> {
        let mut slots = self.lock();
        if matches!(slots.vm, VmSlot::Stopping) || slots.ends {
            return Err(SandboxError::Stopping);
        }
        if slots.containers.contains_key(id) {
            return Err(SandboxError::AlreadyExists { what: "task", id: id.to_owned() });
        }
        Self::check_ready(&slots)?;
        slots.containers.insert(id.to_owned(), ContainerSlot::Creating);
        slots.first.get_or_insert_with(|| id.to_owned());
        Ok(())
    }

    async fn create_reserved(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, SandboxError> {
        let id = request.id.clone();
        let stdio = Stdio::from(&request);
        stdio.check()?;
        if !request.checkpoint.is_empty() {
            return Err(SandboxError::Unsupported(format!(
                "checkpoint {:?}: restoring is not supported",
                request.checkpoint
            )));
        }
        let mut prepared = self.prepare(&request)?;
        self.note_refill(&prepared);
        let facts = serde_json::json!({"bundle": request.bundle});
        self.journal.with(|state| state.set_container(&id, facts))?;
        if self.lock().managed.is_some() {
            prepared.rewritten.share_dev_shm();
        }
        self.add_files(&id, &mut prepared)?;
        let share = self.share()?;
        let network = self.network_namespace(&prepared).await?;
        let cgroup = self.host_cgroup(&prepared).await?;
        self.restrict_cpuset(&id, prepared.rewritten.host_resources.clone()).await?;
        self.demand(&id, prepared.rewritten.demand);
        self.limit_cgroup(&id).await?;
        let holder = self.start_holder(Owner::Container(id.clone()), &id, network.clone()).await?;
        let subject = hooks::subject(&request, &prepared, holder.process().pid);
        let attachments = Attachments { network, cgroup: cgroup.clone(), ..Attachments::new(share.path().to_owned()) };
        // The hooks see the holder in its cgroup.
        let hooked = async {
            join_cgroup(cgroup.clone(), holder.process()).await?;
            self.run_create_hooks(&prepared.rewritten.hooks, &subject).await?;
            self.enter_cgroup(cgroup).await
        };
        // Mount the root filesystem while the VM boots: it propagates to virtiofsd. Folders of the host follow. The disk for
        // changes needs no VM either.
        let (mounted, overlay) = (self.mount(&share, &id, &prepared), new_overlay(&prepared.root));
        let (vm, mounted, hooked, overlay) =
            tokio::join!(self.ensure_vm(&prepared, attachments), mounted, hooked, overlay);
        let vm = vm?;
        self.pin_vcpus().await?;
        self.limit_cgroup(&id).await?;
        if !prepared.is_pods_sandbox() {
            self.add_oom_score(&id, prepared.oom_score_adj(), &vm)?;
        }
        let mut places = mounted?;
        self.lease_volumes(&id, &prepared.rewritten.binds).await;
        hooked?;
        let below = std::mem::take(&mut places.below);
        let in_guest = prepared.root.in_guest(&id, &places.root);
        let share_root = std::mem::replace(&mut places.root, in_guest);
        prepared.rewritten.place(places);
        self.complete_share(&vm, &share, &id).await?;
        let attached = self.attach_root(&vm, &id, &prepared.root, &share_root, overlay?).await?;
        self.attach_disks(&vm, &id, &mut prepared).await?;
        // The hooks may have added links after the boot has looked for some.
        vm.settle_network().await?;

        let [stdin, stdout, stderr] = stdio.in_guest(STREAM);
        let guest_request = CreateTaskRequest {
            id: id.clone(),
            bundle: self.put_bundle(&vm, &id, &prepared, below, attached.root).await?,
            terminal: request.terminal,
            stdin,
            stdout,
            stderr,
            ..Default::default()
        };
        let poststart = prepared.rewritten.hooks.poststart.clone();
        let in_vms_network = prepared.rewritten.in_vms_network();
        let ends_with_init = prepared.rewritten.ends_with_init();
        let publisher = self.publisher.clone();
        let root = Root { choice: attached.choice, changes: attached.changes };
        let container = Container::new(request, subject, in_vms_network, ends_with_init, poststart, root, publisher);
        // Register the container before the guest creates it: its first events may arrive before the response.
        self.lock().containers.insert(id, ContainerSlot::Ready(container.clone()));
        let pid = self.create_in_guest(&vm, &guest_request, prepared.rewritten.read_only).await?;
        watch_holder(&vm, &container, holder);
        Ok(pid)
    }

    /// Prepares the spec for the guest.
    fn prepare(&self, request: &CreateTaskRequest) -> Result<Prepared, SandboxError> {
        let of_container = |pid| self.containers().iter().find(|container| container.subject.pid == pid)?.as_sibling();
        let find = |pid| self.own_namespaces(pid).or_else(|| of_container(pid));
        let (first, booted_with, booting_with) = {
            let slots = self.lock();
            let first = slots.first.as_ref() == Some(&request.id);
            let vm = || slots.booted_with.clone();
            (first, matches!(slots.vm, VmSlot::Up(_)).then(vm), matches!(slots.vm, VmSlot::Booting(_)).then(vm))
        };
        let siblings =
            Siblings { first, find: &find, booted_with: booted_with.as_ref(), booting_with: booting_with.as_ref() };
        let prepared = prepare::prepare(request, self.name(), siblings)?;
        for part in &prepared.ignored {
            tracing::warn!(container = request.id, part, "ignored part of the spec");
        }
        for option in &prepared.ignored_options {
            tracing::info!(container = request.id, option, "ignored option of the runtime");
        }
        for note in &prepared.rewritten.notes {
            tracing::info!(container = request.id, note, "spec changed for the guest");
        }
        Ok(prepared)
    }

    /// Sends a container's spec to the guest and returns the path of the bundle there. `below` is what the guest mounts
    /// before.
    async fn put_bundle(
        &self,
        vm: &Vm,
        id: &str,
        prepared: &Prepared,
        below: Vec<PathBuf>,
        disk_root: Option<DiskRoot>,
    ) -> Result<String, SandboxError> {
        let spec = serde_json::to_vec(&prepared.rewritten.spec)
            .map_err(|error| SandboxError::Internal(format!("encode the guest's spec: {error}")))?;
        let (sockets, relay_port) = self.sockets.add(id, &prepared.rewritten.sockets, &vm.guest)?;
        let mounts_below = below.into_iter().map(|path| path.into_os_string().into_vec()).collect();
        let request = PutBundleRequest {
            id: id.to_owned(),
            spec,
            sockets,
            relay_port,
            mounts_below,
            disk_root: disk_root.into(),
            ..Default::default()
        };
        Ok(vm.guest.bundle.put(vm.guest.context(), &request).await?.path)
    }

    /// Opens the streams of the init process and creates the task in the guest. If it fails, the task and its bundle
    /// are removed from the guest.
    async fn create_in_guest(
        &self,
        vm: &Arc<Vm>,
        request: &CreateTaskRequest,
        read_only: bool,
    ) -> Result<u32, SandboxError> {
        let id = &request.id;
        let init = self.process(id, "")?.1;
        let created = async {
            init.attach_outputs(&vm.guest, id, &self.namespace).await?;
            let response = vm.guest.task.create(vm.guest.context(), request).await?;
            self.protect_root(vm, id, read_only).await?;
            init.attach_input(&vm.guest, id)?;
            Ok::<_, SandboxError>(response)
        };
        match created.await {
            Ok(response) => {
                init.set_guest_pid(response.pid);
                let pid = init.pid();
                tracing::info!(container = id, pid, guest_pid = response.pid, "container created");
                Ok(pid)
            }
            Err(error) => {
                init.discard();
                remove_from_guest(vm, id).await;
                Err(vm.cause_of_death().map_or(error, |cause| SandboxError::VmDead { cause }))
            }
        }
    }
}

/// Removes the bundle and the task of a container whose creation failed.
async fn remove_from_guest(vm: &Vm, id: &str) {
    let request = RemoveBundleRequest { id: id.to_owned(), ..Default::default() };
    if let Err(error) = vm.guest.bundle.remove(vm.guest.context(), &request).await.map_err(GuestError::from) {
        tracing::warn!(container = id, error = %Chain(&error), "failed to remove the bundle from the guest");
    }
    // A guest that answered too late may have created the task after all.
    let request = DeleteRequest { id: id.to_owned(), ..Default::default() };
    if let Err(error) = vm.guest.task.delete(vm.guest.context(), &request).await.map_err(GuestError::from) {
        tracing::debug!(container = id, error = %Chain(&error), "no task to delete in the guest");
    }
}
