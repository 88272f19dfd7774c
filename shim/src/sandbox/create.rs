//! How a container comes to be: its files in the share, its VM if it is the first, its bundle and its process in the guest.

use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest};
use husk_protos::bundle::{PutBundleRequest, RemoveBundleRequest};
use husk_protos::events::Event;
use tokio::sync::watch;

use crate::extras::disk;
use crate::extras::disk::DiskError;
use crate::extras::files::OpenedFile;
use crate::guest::client::Metering;
use crate::prepare;
use crate::prepare::Prepared;
use crate::rootfs::share::Share;
use crate::sandbox::container::Container;
use crate::sandbox::{Error, Machine, STREAM, Sandbox, Slot, alive, hooks};
use crate::state::facts::HostMilestone;
use crate::state::life::VmState;
use crate::state::{Boot, Owner, facts};
use crate::stdio::Stdio;
use crate::vm::{BootError, Vm};
use crate::vmm::Disk;

impl Sandbox {
    /// Creates a container, and the VM if it is the first. Returns the pid of its init in the guest. On an error nothing is left of it.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, Error> {
        let id = request.id.clone();
        crate::state::check_identifier("container id", &id)?;
        {
            let mut inner = self.lock();
            if matches!(inner.machine, Machine::Stopping) {
                return Err(Error::Stopping);
            }
            if inner.containers.contains_key(&id) {
                return Err(Error::AlreadyExists { what: "task", id });
            }
            inner.containers.insert(id.clone(), Slot::Creating);
        }
        let created = self.create_in_slot(request).await;
        if let Err(error) = &created {
            tracing::warn!(container = id, %error, "create failed");
            self.run_poststop_hooks(&id).await;
            self.forget(&id).await;
        }
        created
    }

    async fn create_in_slot(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, Error> {
        let id = request.id.clone();
        let stdio = Stdio::from(&request);
        stdio.check()?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported(format!("checkpoint {:?}: restoring is not supported", request.checkpoint)));
        }
        // Of those that live: the pid of one that has ended may be another process's by now.
        let inits: Vec<u32> = self
            .containers()
            .iter()
            .filter_map(|container| container.process("").filter(|init| init.exit().is_none()))
            .map(|init| init.pid())
            .collect();
        let has = {
            let inner = self.lock();
            matches!(inner.machine, Machine::Up(_)).then(|| inner.extras.clone())
        };
        let prepared = prepare::prepare(&request, &self.id, &|pid| inits.contains(&pid), has.as_ref())?;
        for note in &prepared.rewritten.notes {
            tracing::info!(container = id, note, "spec changed for the guest");
        }
        let note = serde_json::json!({"bundle": request.bundle});
        self.journal.with(|state| state.set_container(&id, note))?;
        let share = self.share()?;
        let subject = hooks::subject(&request, &prepared);
        // The root filesystem is mounted while the VM boots: mounts made later propagate into the share.
        let (vm, mounted, hooked) = tokio::join!(
            self.vm(&prepared, &share),
            self.mount(&share, &request, &prepared),
            self.run_create_hooks(&prepared.rewritten.hooks, &subject)
        );
        let vm = vm?;
        mounted?;
        hooked?;

        let spec = serde_json::to_vec(&prepared.rewritten.spec)
            .map_err(|error| Error::Task(format!("encode the guest's spec: {error}")))?;
        let bundle = PutBundleRequest { id: id.clone(), spec, ..Default::default() };
        let bundle = vm.guest.bundle.put(vm.guest.context(), &bundle).await?;
        let [stdin, stdout, stderr] = stdio.in_guest(STREAM);
        let guest_request = CreateTaskRequest {
            id: id.clone(),
            bundle: bundle.path,
            terminal: request.terminal,
            stdin,
            stdout,
            stderr,
            ..Default::default()
        };
        let poststart = prepared.rewritten.hooks.poststart.clone();
        let container = Container::new(request, subject, poststart, self.publisher.clone());
        // In its place before the guest knows of it: its first events may be faster than the answer.
        self.lock().containers.insert(id.clone(), Slot::Ready(container.clone()));
        let init = self.process(&id, "")?.1;
        let created = async {
            init.attach_outputs(&vm.guest, &id, &self.namespace).await?;
            let response = vm.guest.task.create(vm.guest.context(), &guest_request).await?;
            init.attach_input(&vm.guest, &id)?;
            Ok::<_, Error>(response)
        };
        match created.await {
            Ok(response) => {
                init.set_pid(response.pid);
                tracing::info!(container = id, pid = response.pid, "container created");
                Ok(response.pid)
            }
            Err(error) => {
                init.forget();
                let request = RemoveBundleRequest { id: id.clone(), ..Default::default() };
                if let Err(error) = vm.guest.bundle.remove(vm.guest.context(), &request).await {
                    tracing::warn!(container = id, %error, "the guest keeps the bundle of a container that was not created");
                }
                // A guest that did not answer in time may have created it after all.
                let request = DeleteRequest { id: id.clone(), ..Default::default() };
                if let Err(error) = vm.guest.task.delete(vm.guest.context(), &request).await {
                    tracing::debug!(container = id, %error, "nothing to delete in the guest");
                }
                Err(vm.cause_of_death().map_or(error, |cause| Error::Dead { cause }))
            }
        }
    }

    /// The share of the sandbox, made by its first container.
    fn share(&self) -> Result<Share, Error> {
        let mut inner = self.lock();
        if let Some(share) = &inner.share {
            return Ok(share.clone());
        }
        let mut record = |steps| self.journal.record(&Owner::Sandbox, steps);
        let share = Share::create(self.journal.dir(), &mut record)?;
        inner.share = Some(share.clone());
        Ok(share)
    }

    /// Puts a container's root filesystem and bind mounts into the share. On a thread for it: a mount can take its time.
    async fn mount(&self, share: &Share, request: &CreateTaskRequest, prepared: &Prepared) -> Result<(), Error> {
        let (share, journal) = (share.clone(), self.journal.clone());
        let (id, mounts, rewritten) = (request.id.clone(), request.rootfs.clone(), prepared.rewritten.clone());
        let mounted = tokio::task::spawn_blocking(move || {
            let owner = Owner::Container(id.clone());
            let mut record = |steps| journal.record(&owner, steps);
            share.add_container(&mut record, &id, &mounts, &rewritten.rootfs, &rewritten.binds)
        });
        mounted.await.map_err(|error| Error::Task(format!("mount: {error}")))??;
        Ok(())
    }

    /// The VM, booted if it is not up.
    async fn vm(self: &Arc<Self>, prepared: &Prepared, share: &Share) -> Result<Arc<Vm>, Error> {
        let mut booting = {
            let mut inner = self.lock();
            if let Machine::Up(_) | Machine::Booting(_) = inner.machine {
                // Again: another container may have come first while this one was prepared.
                let beyond = prepared.extras.beyond(&inner.extras);
                if !beyond.is_empty() {
                    return Err(prepare::PrepareError(beyond.iter().map(ToString::to_string).collect()).into());
                }
            }
            match &inner.machine {
                Machine::Up(vm) => return alive(vm),
                Machine::Stopping => return Err(Error::Stopping),
                Machine::Booting(booting) => booting.clone(),
                Machine::None => {
                    inner.extras = prepared.extras.clone();
                    let (done, booting) = watch::channel(None);
                    inner.machine = Machine::Booting(booting.clone());
                    let (sandbox, prepared, share) = (self.clone(), prepared.clone(), share.path().to_owned());
                    tokio::spawn(async move {
                        let booted = sandbox.boot(&prepared, share).await.map_err(Arc::new);
                        let mut inner = sandbox.lock();
                        // Unless somebody is tearing down already, and waits for this boot to end. A failed boot may be tried again, by the
                        // next container.
                        if matches!(inner.machine, Machine::Booting(_)) {
                            inner.machine = booted.as_ref().map_or(Machine::None, |vm| Machine::Up(vm.clone()));
                        }
                        done.send_replace(Some(booted));
                    });
                    booting
                }
            }
        };
        let booted = booting
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Error::Task("the boot ended without a result".to_owned()))?
            .clone();
        match booted {
            Some(result) => Ok(result?),
            None => Err(Error::Task("the boot ended without a result".to_owned())),
        }
    }

    async fn boot(self: &Arc<Self>, prepared: &Prepared, share: PathBuf) -> Result<Arc<Vm>, BootError> {
        let began = std::time::Instant::now();
        let mut reached = Boot::begin();
        let booted = self.boot_and_listen(prepared, share, &mut reached).await;
        let (vm, events) = match booted {
            Ok(booted) => booted,
            Err(error) => {
                self.note_boot(reached, None);
                self.vm_enters(VmState::StartFailed, &error.cause());
                return Err(error);
            }
        };
        tracing::info!(
            ms = began.elapsed().as_millis() as u64,
            kernel = vm.hello.kernel,
            init = vm.hello.version,
            "VM ready"
        );
        self.note_boot(reached, Some(&vm));
        self.vm_enters(VmState::Running, "the guest has answered");
        tokio::spawn(self.clone().route_events(vm.clone(), events));
        Ok(vm)
    }

    /// Notes how far a boot came, and what the guest says that it is; written with the state that comes of it.
    fn note_boot(&self, reached: Boot, vm: Option<&Vm>) {
        let noted = self.journal.with(|state| {
            state.set_boot(reached);
            if let (Some(vm), Some(mut machine)) = (vm, state.machine().cloned()) {
                machine.kernel = Some(facts::printable(&vm.hello.kernel));
                machine.init = Some(facts::printable(&vm.hello.version));
                state.set_machine(machine);
            }
            Ok(())
        });
        // Of a sandbox of which everything has been undone nobody will ask.
        if let Err(error) = noted {
            tracing::debug!(%error, "the boot is not noted");
        }
    }

    /// A guest whose events cannot be heard has not come up.
    async fn boot_and_listen(
        &self,
        prepared: &Prepared,
        share: PathBuf,
        reached: &mut Boot,
    ) -> Result<(Arc<Vm>, Metering<Event>), BootError> {
        let extras = extras_disk(prepared.sources.clone()).await?;
        let (vmm, plan) = prepare::plan(prepared, share, extras.clone());
        let vm = Vm::boot(&*vmm, &plan, &self.journal, &self.guest_logs, reached).await?;
        // A guest that has said hello has taken what is on it.
        if let Some(disk) = extras
            && let Err(error) = disk::give_back(&disk)
        {
            tracing::warn!(%error, "the memory of the disk for extras is held as long as the VM lives");
        }
        let events = vm.guest.events(0).await?;
        reached.reached(HostMilestone::EventsSubscribed);
        Ok((vm, events))
    }
}

/// Writes the disk for extras. On a thread for it: it may take a while to read them.
async fn extras_disk(sources: Vec<OpenedFile>) -> Result<Option<Disk>, BootError> {
    let written = tokio::task::spawn_blocking(move || disk::write(&sources));
    Ok(written.await.map_err(|error| DiskError::Image(std::io::Error::other(error)))??)
}
