//! One sandbox: its VM and its containers. What containerd asks of a task is looked up and relayed here; what the guest reports
//! is routed to the container that it is about.

mod control;
mod error;
mod without_guest;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, StartRequest, StateRequest, StateResponse,
    Status,
};
use husk_protos::bundle::{PutBundleRequest, RemoveBundleRequest};
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::container::process::{Exit, Process};
use crate::container::{Container, EXIT_RECORDED, container_of};
use crate::events::Publisher;
use crate::guest;
use crate::io::Stdio;
use crate::journal::Journal;
use crate::prepare::{self, Prepared};
use crate::rootfs::share::Share;
use crate::state::Owner;
use crate::vm::boot::{self, Vm};

pub use error::Error;
use error::not_found;

/// How long containerd may take to accept the last events before the shim ends without.
const FLUSH: Duration = Duration::from_secs(2);
/// How long the guest's report of a deletion may take to arrive after its answer.
const DELETE_EVENT: Duration = Duration::from_secs(1);
/// What stands in a guest's request for a stream that is carried over vsock.
const STREAM: &str = "stream";

/// Where the VM is in its life, as far as containers are concerned.
enum Machine {
    /// Not asked for yet.
    None,
    /// Being booted by the first container; those that come meanwhile wait for it.
    Booting(watch::Receiver<Option<Result<Arc<Vm>, Arc<boot::Error>>>>),
    /// Up, or dead without anybody having stopped it.
    Up(Arc<Vm>),
    /// Being ended, or ended.
    Stopping,
}

enum Slot {
    /// The id is taken, the container is not there yet.
    Creating,
    Ready(Arc<Container>),
}

struct Inner {
    machine: Machine,
    share: Option<Share>,
    containers: HashMap<String, Slot>,
}

/// The sandbox of one shim.
pub struct Sandbox {
    id: String,
    namespace: String,
    journal: Journal,
    publisher: Publisher,
    inner: Mutex<Inner>,
    /// True when everything has been cleaned up and the shim may exit.
    ended: watch::Sender<bool>,
}

impl Sandbox {
    /// An empty sandbox.
    pub fn new(id: &str, namespace: &str, journal: Journal, publisher: Publisher) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            journal,
            publisher,
            inner: Mutex::new(Inner { machine: Machine::None, share: None, containers: HashMap::new() }),
            ended: watch::channel(false).0,
        })
    }

    /// Waits until everything has been cleaned up.
    pub async fn ended(&self) {
        // The sender is in self, so it cannot be gone.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

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
        let prepared = prepare::prepare(&request, &self.id, &|pid| inits.contains(&pid))?;
        for note in &prepared.rewritten.notes {
            tracing::info!(container = id, note, "spec changed for the guest");
        }
        let note = serde_json::json!({"bundle": request.bundle});
        self.journal.with(|state| state.set_container(&id, note))?;
        let share = self.share()?;
        // The root filesystem is mounted while the VM boots: mounts made later propagate into the share.
        let (vm, mounted) = tokio::join!(self.vm(&prepared, &share), self.mount(&share, &request, &prepared));
        let vm = vm?;
        mounted?;

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
        let container = Container::start(request, self.publisher.clone());
        // In its place before the guest knows of it: its first events may be faster than the answer.
        self.lock().containers.insert(id.clone(), Slot::Ready(container.clone()));
        let init = self.process(&id, "")?.1;
        let created = async {
            init.attach(&vm.guest, &id, &self.namespace).await?;
            Ok::<_, Error>(vm.guest.task.create(vm.guest.context(), &guest_request).await?)
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
            match &inner.machine {
                Machine::Up(vm) => return alive(vm),
                Machine::Stopping => return Err(Error::Stopping),
                Machine::Booting(booting) => booting.clone(),
                Machine::None => {
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

    async fn boot(self: &Arc<Self>, prepared: &Prepared, share: PathBuf) -> Result<Arc<Vm>, boot::Error> {
        let (vmm, plan) = prepare::plan(prepared, share);
        let began = std::time::Instant::now();
        let vm = Vm::boot(&*vmm, &plan, &self.journal).await?;
        tracing::info!(
            ms = began.elapsed().as_millis() as u64,
            kernel = vm.hello.kernel,
            init = vm.hello.version,
            "VM ready"
        );
        let events = vm.guest.events(0).await?;
        tokio::spawn(self.clone().route_events(vm.clone(), events));
        Ok(vm)
    }

    /// Carries the guest's events to their containers until the VM is gone; then tells the containers.
    async fn route_events(self: Arc<Self>, vm: Arc<Vm>, mut events: guest::Metering<husk_protos::events::Event>) {
        loop {
            match events.recv().await {
                Ok(Some(event)) => self.route(event).await,
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(%error, "event stream ended");
                    break;
                }
            }
        }
        let cause = vm.died().await;
        if vm.stopping() {
            return;
        }
        tracing::error!(cause, console = vm.console_tail(), "the VM died");
        for container in self.containers() {
            container.died(now()).await;
        }
    }

    async fn route(&self, event: husk_protos::events::Event) {
        let Some(id) = container_of(&event) else {
            tracing::warn!(topic = event.topic, sequence = event.sequence, "the guest sent an event that is none");
            return;
        };
        match self.container(&id) {
            Ok(container) => container.guest_event(event).await,
            Err(_) => tracing::debug!(container = id, topic = event.topic, "event of a container that is gone"),
        }
    }

    /// Starts a container's init, or an exec.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let init = self.process(id, "")?.1;
        if !exec_id.is_empty() && init.exit().is_some() {
            return Err(Error::Ended { task: id.to_owned() });
        }
        let (container, process) = self.process(id, exec_id)?;
        let vm = self.live_vm()?;
        // Not by a second start, which the guest will refuse: the streams are the first one's.
        let attaches = !exec_id.is_empty() && process.take_start();
        if attaches {
            process.attach(&vm.guest, id, &self.namespace).await.inspect_err(|_| process.give_start_back())?;
        }
        let request = StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        match vm.guest.task.start(vm.guest.context(), &request).await {
            Ok(response) => {
                process.set_pid(response.pid);
                Ok(response.pid)
            }
            Err(error) => {
                if attaches {
                    process.detach();
                    self.settle_failed_start(&vm, &container, &process).await;
                    process.give_start_back();
                }
                tracing::warn!(container = container.id, exec = exec_id, %error, "start failed");
                Err(error.into())
            }
        }
    }

    /// An exec that could not be started has ended in the guest, unless it may be tried again: then so it has for those who wait here.
    async fn settle_failed_start(&self, vm: &Vm, container: &Container, process: &Process) {
        let request = StateRequest { id: container.id.clone(), exec_id: process.exec_id.clone(), ..Default::default() };
        match vm.guest.task.state(vm.guest.context(), &request).await {
            Ok(state) if state.status == Status::STOPPED.into() => {
                let at = state.exited_at.into_option().unwrap_or_else(now);
                process.record_exit(Exit { status: state.exit_status, at });
            }
            Ok(_) => {}
            // A VM that has died says so to everybody.
            Err(error) => tracing::warn!(container = container.id, exec = process.exec_id, %error, "no state"),
        }
    }

    /// Adds an exec to a container.
    pub async fn exec(&self, request: ExecProcessRequest) -> Result<(), Error> {
        crate::state::check_identifier("exec id", &request.exec_id)?;
        let stdio = Stdio::from(&request);
        stdio.check()?;
        let [stdin, stdout, stderr] = stdio.in_guest(STREAM);
        let container = self.container(&request.id)?;
        let vm = self.live_vm()?;
        if !container.add(Arc::new(Process::new(&request.exec_id, stdio))) {
            return Err(Error::AlreadyExists { what: "process", id: request.exec_id });
        }
        let guest_request = ExecProcessRequest { stdin, stdout, stderr, ..request.clone() };
        if let Err(error) = vm.guest.task.exec(vm.guest.context(), &guest_request).await {
            if let Some(process) = container.remove(&request.exec_id) {
                process.forget();
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Deletes an exec or a container that has ended; with the last container the VM goes.
    pub async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<DeleteResponse, Error> {
        let (container, process) = self.process(id, exec_id)?;
        let response = match self.live_vm() {
            Ok(vm) => self.delete_in_guest(&vm, &container, &process).await?,
            Err(Error::Dead { .. }) => without_guest::delete(&container, &process).await?,
            Err(error) => return Err(error),
        };
        if !exec_id.is_empty() {
            // Its exit may still be on its way from the guest, and nobody would publish it for a process that is not known.
            if response.pid != 0 && tokio::time::timeout(EXIT_RECORDED, process.exited()).await.is_err() {
                tracing::warn!(container = id, exec = exec_id, "the guest did not report the exit");
            }
            process.finish_output().await;
            container.remove(exec_id);
            process.forget();
            return Ok(response);
        }
        container.finish_output().await;
        if tokio::time::timeout(DELETE_EVENT, container.delete_published()).await.is_err() {
            tracing::warn!(container = id, "the guest did not report the deletion");
        }
        self.forget(id).await;
        tracing::info!(container = id, status = response.exit_status, "container deleted");
        Ok(response)
    }

    async fn delete_in_guest(
        &self,
        vm: &Vm,
        container: &Container,
        process: &Process,
    ) -> Result<DeleteResponse, Error> {
        let request =
            DeleteRequest { id: container.id.clone(), exec_id: process.exec_id.clone(), ..Default::default() };
        match vm.guest.task.delete(vm.guest.context(), &request).await {
            Ok(response) => Ok(response),
            // It died under the call: the exit is what it is then.
            Err(_) if vm.cause_of_death().is_some() => without_guest::delete(container, process).await,
            Err(error) => Err(error.into()),
        }
    }

    /// A container is gone, or never came to be: undoes what it made on the host. If it was the last, the VM ends first, so that nothing
    /// is unmounted from under it.
    async fn forget(self: &Arc<Self>, id: &str) {
        let last = {
            let mut inner = self.lock();
            inner.containers.remove(id);
            let last = inner.containers.is_empty();
            last.then(|| std::mem::replace(&mut inner.machine, Machine::Stopping))
        };
        match last {
            // In the background: containerd has other things to do with the answer to Delete, and asks for Shutdown after it.
            Some(machine) => drop(tokio::spawn(self.clone().tear_down(machine))),
            None => {
                if let Err(error) = self.journal.undo(Owner::Container(id.to_owned())).await {
                    tracing::error!(container = id, %error, "something is left of the container");
                }
            }
        }
    }

    /// Ends the VM and removes everything that the sandbox made. Whoever took the machine out of its place calls it, so it runs once.
    async fn tear_down(self: Arc<Self>, machine: Machine) {
        match machine {
            Machine::Up(vm) => vm.stop().await,
            Machine::Booting(mut booting) => {
                let booted = booting.wait_for(Option::is_some).await.ok().and_then(|booted| booted.clone());
                if let Some(Ok(vm)) = booted {
                    vm.stop().await;
                }
            }
            Machine::None | Machine::Stopping => {}
        }
        let containers = self.containers();
        for container in &containers {
            container.died(now()).await;
        }
        futures::future::join_all(containers.iter().map(|container| container.finish_output())).await;
        if let Err(error) = self.journal.undo_all().await {
            tracing::error!(%error, "something is left of the sandbox");
        }
        if !self.publisher.flush(FLUSH).await {
            tracing::warn!("containerd did not take the last events");
        }
        self.ended.send_replace(true);
    }

    /// Ends the sandbox. Without `now`, only if it has no container: containerd asks it of every shim after every deletion.
    pub async fn shutdown(self: &Arc<Self>, now: bool) -> Result<(), Error> {
        let machine = {
            let mut inner = self.lock();
            if !inner.containers.is_empty() && !now {
                return Ok(());
            }
            std::mem::replace(&mut inner.machine, Machine::Stopping)
        };
        if !matches!(machine, Machine::Stopping) {
            tokio::spawn(self.clone().tear_down(machine));
        }
        self.ended().await;
        Ok(())
    }

    /// What a process is doing.
    pub async fn state(&self, id: &str, exec_id: &str) -> Result<StateResponse, Error> {
        let (container, process) = self.process(id, exec_id)?;
        let mut state = match self.live_vm() {
            Ok(vm) => {
                let request = StateRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
                match vm.guest.task.state(vm.guest.context(), &request).await {
                    Ok(state) => state,
                    Err(_) if vm.cause_of_death().is_some() => without_guest::state(&process),
                    Err(error) => return Err(error.into()),
                }
            }
            Err(Error::Dead { .. }) => without_guest::state(&process),
            Err(error) => return Err(error),
        };
        // As runc's shim has it: an exec's id stands in the place of the container's, and nowhere else.
        state.id = if exec_id.is_empty() { id.to_owned() } else { exec_id.to_owned() };
        state.exec_id.clear();
        state.bundle = container.bundle.display().to_string();
        state.stdin = process.stdio.stdin.clone();
        state.stdout = process.stdio.stdout.clone();
        state.stderr = process.stdio.stderr.clone();
        state.terminal = process.stdio.terminal;
        Ok(state)
    }

    /// Waits until a process has ended and its output is delivered.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let (_, process) = self.process(id, exec_id)?;
        process.exited().await.ok_or_else(|| not_found("process", exec_id))
    }

    /// Ends a process's input.
    pub fn close_io(&self, id: &str, exec_id: &str, stdin: bool) -> Result<(), Error> {
        let (_, process) = self.process(id, exec_id)?;
        if stdin {
            process.close_stdin();
        }
        Ok(())
    }

    /// The pid of a container's init in the guest.
    pub fn pid(&self, id: &str) -> Result<u32, Error> {
        Ok(self.process(id, "")?.1.pid())
    }

    fn live_vm(&self) -> Result<Arc<Vm>, Error> {
        match &self.lock().machine {
            Machine::Up(vm) => alive(vm),
            Machine::Stopping => Err(Error::Stopping),
            Machine::None | Machine::Booting(_) => Err(Error::Dead { cause: "it is not up yet".to_owned() }),
        }
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>), Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id).ok_or_else(|| not_found("process", exec_id))?;
        Ok((container, process))
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.lock().containers.get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            Some(Slot::Creating) | None => Err(not_found("task", id)),
        }
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        let inner = self.lock();
        let ready = inner.containers.values().filter_map(|slot| match slot {
            Slot::Ready(container) => Some(container.clone()),
            Slot::Creating => None,
        });
        ready.collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn alive(vm: &Arc<Vm>) -> Result<Arc<Vm>, Error> {
    match vm.cause_of_death() {
        Some(cause) => Err(Error::Dead { cause }),
        None => Ok(vm.clone()),
    }
}

fn now() -> Timestamp {
    Timestamp::now()
}
