//! One sandbox: its VM and its containers. What containerd asks of a task is looked up and relayed here; how containers come and go is in
//! [`create`] and [`end`], and what is heard of them meanwhile in [`events`].

pub mod container;
mod control;
mod create;
mod end;
mod error;
mod events;
mod hooks;
pub mod status;
mod without_guest;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use containerd_shim_protos::api::{ExecProcessRequest, StartRequest, StateRequest, StateResponse, Status};
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::config::extras::Extras;
use crate::console::GuestLogs;
use crate::containerd::publisher::Publisher;
use crate::guest::client::GuestError;
use crate::rootfs::share::Share;
use crate::sandbox::container::Container;
use crate::sandbox::container::process::{Exit, Process};
use crate::state::journal::Journal;
use crate::state::life::VmState;
use crate::stdio::Stdio;
use crate::vm::{BootError, Vm};

pub use error::Error;
use error::not_found;

/// How long containerd may take to ask for the end after everything has ended.
const DISMISSAL: Duration = Duration::from_secs(10);
/// What stands in a guest's request for a stream that is carried over vsock.
const STREAM: &str = "stream";

/// Where the VM is in its life, as far as containers are concerned.
enum Machine {
    /// Not asked for yet.
    None,
    /// Being booted by the first container; those that come meanwhile wait for it.
    Booting(watch::Receiver<Option<Result<Arc<Vm>, Arc<BootError>>>>),
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
    /// What the VM was booted with, or is being booted with.
    extras: Extras,
    share: Option<Share>,
    containers: HashMap<String, Slot>,
}

/// The sandbox of one shim.
pub struct Sandbox {
    id: String,
    namespace: String,
    journal: Journal,
    publisher: Publisher,
    guest_logs: GuestLogs,
    inner: Mutex<Inner>,
    /// True when everything has been cleaned up.
    ended: watch::Sender<bool>,
    /// True when containerd has asked for the end.
    dismissed: watch::Sender<bool>,
}

impl Sandbox {
    /// An empty sandbox.
    pub fn new(id: &str, namespace: &str, journal: Journal, publisher: Publisher) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            guest_logs: GuestLogs::new(journal.dir()),
            journal,
            publisher,
            inner: Mutex::new(Inner {
                machine: Machine::None,
                extras: Extras::default(),
                share: None,
                containers: HashMap::new(),
            }),
            ended: watch::channel(false).0,
            dismissed: watch::channel(false).0,
        })
    }

    /// Waits until everything has been cleaned up.
    pub async fn ended(&self) {
        // The sender is in self, so it cannot be gone.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Waits until everything has been cleaned up and containerd has asked for the end, which it does after each deletion. Not as soon as
    /// everything is cleaned up: it may not have taken the answer to the deletion yet, and whoever finds a connection closed (containerd's
    /// TTRPC client) may not look for an answer that came before.
    pub async fn dismissed(&self) {
        self.ended().await;
        let mut dismissed = self.dismissed.subscribe();
        if tokio::time::timeout(DISMISSAL, dismissed.wait_for(|dismissed| *dismissed)).await.is_err() {
            tracing::warn!(waited_ms = DISMISSAL.as_millis() as u64, "containerd has not asked for the end");
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
            let attached = async {
                process.attach_outputs(&vm.guest, id, &self.namespace).await?;
                process.attach_input(&vm.guest, id).inspect_err(|_| process.detach())
            };
            attached.await.inspect_err(|_| process.give_start_back())?;
        }
        let request = StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        match vm.guest.task.start(vm.guest.context(), &request).await {
            Ok(response) => {
                process.set_pid(response.pid);
                if exec_id.is_empty() {
                    self.run_poststart_hooks(&vm, &container).await?;
                }
                Ok(response.pid)
            }
            Err(error) => {
                if attaches {
                    process.detach();
                    self.settle_failed_start(&vm, &container, &process).await;
                    process.give_start_back();
                }
                let error = Error::from(error);
                tracing::warn!(container = container.id, exec = exec_id, %error, "start failed");
                Err(error)
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
        state.bundle = container.subject.bundle.display().to_string();
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

    /// A call that was lost on its way to the guest: when the VM has died, that is why, and may only be noticed a moment later.
    pub async fn explain(&self, error: Error) -> Error {
        let lost =
            matches!(&error, Error::Guest(GuestError::Call(call)) if !matches!(call, ttrpc::Error::RpcStatus(_)));
        let vm = match &self.lock().machine {
            Machine::Up(vm) if lost => vm.clone(),
            _ => return error,
        };
        vm.died_under_call().await.map_or(error, |cause| Error::Dead { cause })
    }

    fn live_vm(&self) -> Result<Arc<Vm>, Error> {
        match &self.lock().machine {
            Machine::Up(vm) => alive(vm),
            Machine::Stopping => Err(Error::Stopping),
            Machine::None | Machine::Booting(_) => Err(Error::Dead { cause: "it is not up yet".to_owned() }),
        }
    }

    /// The VM is in another state now. What cannot be noted of it ends nothing that works.
    fn vm_enters(&self, to: VmState, cause: &str) {
        if let Err(error) = self.journal.vm_enters(to, cause) {
            tracing::error!(%to, cause, %error, "the VM's state is not noted");
        }
    }

    fn vm_died(&self, cause: &str) {
        if let Err(error) = self.journal.vm_died(cause) {
            tracing::error!(cause, %error, "the VM's death is not noted");
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
