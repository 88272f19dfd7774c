//! A VM whose guest is ready: its health, its death, and stopping it.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_shim_protos::api::ShutdownRequest;
use husk_protos::lock::lock;
use husk_protos::system::Hello;
use tokio::sync::watch;
use ttrpc::context::with_duration;

use super::connections;
use super::follow::{FollowError, Following};
use super::memory_target::MemoryTarget;
use super::open_files::OpenFiles;
use super::processes::{CONSOLE_LINES, kill_share, last_words};
use super::share_health::ShareHealth;
use crate::console::{Attached, HelperLog};
use crate::guest::client::{Guest, GuestError};
use crate::guest::report::GuestHealth;
use crate::host::child::Child;
use crate::host::process::ProcessId;
use crate::state::links::NetworkStatus;
use crate::state::status::FilesStatus;
use crate::vmm::{Machine, PluggedDisk, VmmError};

/// How long the machine may take to exit when the guest does not answer, and after it was killed.
const EXIT: Duration = Duration::from_secs(3);
/// How long a guest that has stopped everything is kept while no output and no event of it arrives: on a busy host, either
/// may take a while. Only a stalled reader or a guest that lies makes a shutdown wait.
pub(crate) const DELIVERY: Duration = Duration::from_secs(2);
/// How much later than the loss of a call the VM's death may be noticed: the machine's exit and the console's last
/// output come first.
const DEATH_DELAY: Duration = Duration::from_secs(2);

/// A process of a VM survived its kill.
#[derive(Debug, thiserror::Error)]
#[error("a process of the VM is still running {} ms after it was killed", EXIT.as_millis())]
pub struct StillRunning;

/// A VM whose guest is ready, until it dies. Dropping it kills its processes.
pub struct Vm {
    /// The guest's services.
    pub guest: Arc<Guest>,
    /// The guest's hello.
    pub hello: Hello,
    /// The guest is in debug mode.
    pub debug: bool,
    pub(super) machine: Arc<dyn Machine>,
    pub(super) share: Arc<Child>,
    pub(super) share_workers: Vec<ProcessId>,
    pub(super) share_health: Arc<ShareHealth>,
    pub(super) open_files: OpenFiles,
    /// There may be something in the guest besides containers that has to end in order.
    pub(super) orderly: bool,
    /// Memory that the guest is to get by with.
    pub(super) memory_target: MemoryTarget,
    pub(super) console: Attached,
    /// The output of the machine's process and of virtiofsd.
    pub(super) logs: [HelperLog; 2],
    pub(super) health: Arc<GuestHealth>,
    /// The VM's connection to a network namespace, if it has one.
    pub(super) network: Mutex<Option<Arc<Following>>>,
    /// How long the guest may take to end a container.
    pub(super) kill_timeout: Duration,
    /// How long it may take to end everything.
    pub(super) shutdown_timeout: Duration,
    pub(super) stopping: AtomicBool,
    /// Why the VM has to be killed.
    pub(super) failure: watch::Sender<Option<String>>,
    /// Why the VM is dead.
    pub(super) dead: watch::Receiver<Option<String>>,
}

impl Vm {
    /// Gives the VM a disk, and returns its number. The guest has to look for it.
    ///
    /// # Errors
    /// The VM does not have the disk.
    pub(crate) async fn plug_disk(&self, disk: PluggedDisk) -> Result<u32, VmmError> {
        self.machine.plug_disk(disk).await
    }

    /// Takes a disk away from the VM.
    ///
    /// # Errors
    /// The machine may still have it.
    pub(crate) async fn unplug_disk(&self, number: u32) -> Result<(), VmmError> {
        self.machine.unplug_disk(number).await
    }

    /// Resolves when the VM is dead, with the cause. May be called any number of times.
    pub(crate) async fn died(&self) -> String {
        match self.dead.clone().wait_for(Option::is_some).await {
            Ok(cause) => cause.clone().unwrap_or_default(),
            Err(_) => "its watcher has ended".to_owned(),
        }
    }

    /// The cause of death after a call was lost. The loss may be noticed a moment before the death.
    pub(crate) async fn died_under_call(&self) -> Option<String> {
        tokio::time::timeout(DEATH_DELAY, self.died()).await.ok()
    }

    /// Kills the VM. `cause` becomes the cause of death, unless the VM is dying already.
    pub(crate) fn fail(&self, cause: String) {
        self.failure.send_replace(Some(cause));
    }

    /// Why the VM is dead, if it is.
    pub(crate) fn cause_of_death(&self) -> Option<String> {
        self.dead.borrow().clone()
    }

    /// Whether [`Vm::stop`] was called.
    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// The VM's processes on the host.
    pub(crate) fn processes(&self) -> Vec<ProcessId> {
        let mut all = vec![self.machine.process(), self.share.process()];
        all.extend(&self.share_workers);
        all
    }

    /// virtiofsd's mount namespace, whose root is the share.
    ///
    /// # Errors
    /// When virtiofsd has exited.
    pub(crate) fn share_namespace(&self) -> io::Result<File> {
        self.share.process().mount_namespace()
    }

    /// What the guest has reported: its heartbeats and its supervisor's status.
    pub(crate) fn health(&self) -> &GuestHealth {
        &self.health
    }

    /// Returns when the guest has the network that the sandbox's namespace has now.
    pub(crate) async fn settle_network(&self) -> Result<(), Arc<FollowError>> {
        match self.following() {
            Some(network) => network.settle().await,
            None => Ok(()),
        }
    }

    /// What follows the VM's network namespace.
    pub(super) fn following(&self) -> Option<Arc<Following>> {
        lock(&self.network).clone()
    }

    /// Its network, within a few seconds.
    pub(crate) async fn network_status(&self) -> NetworkStatus {
        let guest = self.cause_of_death().is_none().then_some(&*self.guest);
        let connections = self.following().map(|network| network.status());
        connections::status(connections.as_ref(), guest).await
    }

    /// How many files virtiofsd has open, how many it may have, and why it does not serve them.
    pub(crate) fn files_status(&self) -> FilesStatus {
        FilesStatus { problem: self.share_problem(), ..self.open_files.status(&self.share_workers) }
    }

    /// Why virtiofsd does not serve the share now; `None` if it does, as far as is known.
    pub(crate) fn share_problem(&self) -> Option<String> {
        self.share_health.problem()
    }

    /// How long the guest may take for a call that ends something.
    pub(crate) fn kill_timeout(&self) -> Duration {
        self.kill_timeout
    }

    /// Sets how eagerly the host's OOM killer takes the VM's processes.
    ///
    /// # Errors
    /// See [`ProcessId::set_oom_score`].
    pub(crate) fn set_oom_score(&self, score: Option<i32>) -> io::Result<()> {
        self.processes().into_iter().try_for_each(|process| process.set_oom_score(score))
    }

    /// The console's last lines.
    pub(crate) fn console_tail(&self) -> String {
        self.console.tail(CONSOLE_LINES)
    }

    /// The last lines that the VM's processes on the host have printed. For a VM that is dead.
    pub(crate) async fn last_words(&self) -> String {
        last_words(&self.logs).await
    }

    /// Stops the VM: asks the guest to shut down, then kills the machine. Output and exits of the last processes may
    /// still be on their way when the guest has answered: `delivered` resolves, in finite time, when they have arrived or
    /// will not.
    ///
    /// # Errors
    ///
    /// When a process survives its kill.
    pub async fn stop(&self, delivered: impl Future<Output = ()>) -> Result<(), StillRunning> {
        self.stopping.store(true, Ordering::Relaxed);
        if self.cause_of_death().is_none() {
            self.shut_guest_down(delivered).await;
        }
        self.end().await
    }

    /// Whether the guest has to stop what runs in it besides containers: a supervisor agent, or an operator's programs.
    pub(crate) fn ends_in_order(&self) -> bool {
        self.orderly
    }

    /// Kills the VM, in which nothing runs that anybody needs, and waits for its end.
    ///
    /// # Errors
    ///
    /// When a process survives its kill.
    pub(crate) async fn discard(&self) -> Result<(), StillRunning> {
        self.stopping.store(true, Ordering::Relaxed);
        self.end().await
    }

    async fn end(&self) -> Result<(), StillRunning> {
        self.kill();
        // The kernel needs about as long for the taps as for the machine's memory.
        let disconnected = async {
            if let Some(network) = self.following() {
                // Returns even if a change of the namespace does not end.
                network.stop().await;
            }
        };
        let gone = async { tokio::join!(self.machine.exited(), self.share.exited()) };
        let (gone, ()) = tokio::join!(tokio::time::timeout(EXIT, gone), disconnected);
        gone.map(drop).map_err(|_| StillRunning)
    }

    fn kill(&self) {
        self.machine.kill();
        kill_share(&self.share, &self.share_workers);
    }

    /// Asks the guest to stop everything, and waits until it has, or until the machine has exited.
    async fn shut_guest_down(&self, delivered: impl Future<Output = ()>) {
        let request = ShutdownRequest { now: true, ..Default::default() };
        // The context's own deadline is a little later: its error would not be told from others.
        let context = with_duration(self.shutdown_timeout + EXIT);
        match tokio::time::timeout(self.shutdown_timeout, self.guest.task.shutdown(context, &request)).await {
            // The guest has stopped its processes and written its files back. Killing the machine is faster than the
            // rest of the shutdown.
            Ok(Ok(_)) => tokio::select! {
                () = delivered => {}
                _ = self.machine.exited() => {}
            },
            Err(_) => {
                tracing::warn!(
                    deadline_ms = self.shutdown_timeout.as_millis() as u64,
                    share = self.share_problem(),
                    "the guest did not shut down in time: killing the VM"
                );
            }
            Ok(Err(error)) => {
                let error = GuestError::from(error);
                tracing::debug!(%error, "the guest did not answer its shutdown");
                if tokio::time::timeout(EXIT, self.machine.exited()).await.is_err() {
                    tracing::warn!(deadline_ms = EXIT.as_millis() as u64, "the VM did not exit in time and is killed");
                }
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}
