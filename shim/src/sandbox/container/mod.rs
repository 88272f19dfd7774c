//! One container: its processes, and the order in which their events are published to containerd.
//!
//! Most events are published at once. An exit is published after the process's output has been delivered, the exit of
//! the init process after the exits of its execs, and the deletion last. These publications run in tasks of their own,
//! so a stalled reader delays only its process's exit and the exit of the init process. There is at most one such task
//! per process, and one for the deletion.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::topics;
use husk_protos::lock::lock;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageField, MessageFull};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use ttrpc::Code;

use crate::containerd::publisher::Publisher;
use crate::host::hooks::{Hook, Subject};
use crate::rootfs::plan::RootChoice;
use crate::rootfs::spec::Sibling;
use crate::state::status::ProcessStatus;
use crate::stdio::Stdio;

pub(crate) mod changes;
pub(crate) mod guest_event;
pub(crate) mod guest_reply;
pub(crate) mod order;
pub(crate) mod process;
mod publish;
#[cfg(test)]
mod tests;

use changes::Changes;
use guest_event::TaskChange;
use order::{IllegalEvent, Request, Requested};
use process::{EXIT_RECORDED, Exit, Process};

/// Exit status of a process that dies with its VM: as if killed by SIGKILL.
const KILLED: u32 = 137;

/// A container's root filesystem.
pub(super) struct Root {
    /// How the guest gets it.
    pub(super) choice: RootChoice,
    /// What the guest copies to the host, if it writes elsewhere.
    pub(super) changes: Option<Arc<Changes>>,
}

/// A container that exists in the guest, or existed until the VM died.
pub(crate) struct Container {
    pub(super) id: String,
    /// The description that its host hooks receive, which includes the bundle.
    pub(super) subject: Subject,
    /// Whether it uses the VM's network namespace, and not one of its own in the guest.
    pub(super) in_vms_network: bool,
    /// Whether nothing of it is left in the guest when its init process has exited.
    ends_with_init: AtomicBool,
    /// The hooks that follow its start.
    pub(super) poststart: Vec<Hook>,
    pub(super) root: Root,
    /// containerd's request.
    request: CreateTaskRequest,
    publisher: Publisher,
    /// By exec id; the init process's is empty.
    processes: Mutex<HashMap<String, Arc<Process>>>,
    /// Publications that wait: the exits of execs; then the exit of the init process, which waits for them; then the
    /// deletion, which waits for that.
    pending: Mutex<JoinSet<()>>,
    requested: Mutex<Requested>,
    deleting: AtomicBool,
    deleted: Arc<watch::Sender<bool>>,
}

impl Container {
    /// A container with its init process.
    pub(super) fn new(
        request: CreateTaskRequest,
        subject: Subject,
        in_vms_network: bool,
        ends_with_init: bool,
        poststart: Vec<Hook>,
        root: Root,
        publisher: Publisher,
    ) -> Arc<Self> {
        let init = Arc::new(Process::new("", Stdio::from(&request), subject.pid));
        Arc::new(Self {
            id: request.id.clone(),
            subject,
            in_vms_network,
            ends_with_init: AtomicBool::new(ends_with_init),
            poststart,
            root,
            request,
            publisher,
            processes: Mutex::new(HashMap::from([(String::new(), init)])),
            pending: Mutex::default(),
            requested: Mutex::new(Requested::new(Instant::now())),
            deleting: AtomicBool::new(false),
            deleted: Arc::new(watch::channel(false).0),
        })
    }

    /// The process with this exec id; the init process for an empty id.
    pub(super) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        self.processes().get(exec_id).cloned()
    }

    /// The process that runs with this PID in the guest. A PID of one that has exited may belong to another by now.
    pub(super) fn running_as(&self, guest_pid: u32) -> Option<Arc<Process>> {
        self.processes().values().find(|process| process.guest_pid() == guest_pid && process.exit().is_none()).cloned()
    }

    /// The container as one whose namespaces another container may join, if its init process runs: the guest PID of one
    /// that has exited may belong to another process by now.
    pub(super) fn as_sibling(&self) -> Option<Sibling> {
        let init = self.process("").filter(|init| init.exit().is_none() && init.guest_pid() != 0)?;
        Some(Sibling { guest_pid: init.guest_pid(), in_vms_network: self.in_vms_network })
    }

    /// Records that a process may mount file systems, which the guest unmounts after the exit.
    pub(super) fn may_mount(&self) {
        self.ends_with_init.store(false, Ordering::Relaxed);
    }

    /// Whether nothing of it is left in the guest, whatever the guest says.
    pub(super) fn is_over(&self) -> bool {
        let has_ended = |process: &Arc<Process>| process.exit().is_some() || process.guest_pid() == 0;
        let init_has_exited = self.process("").is_some_and(|init| init.exit().is_some());
        self.ends_with_init.load(Ordering::Relaxed) && init_has_exited && self.processes().values().all(has_ended)
    }

    /// Waits until the output of all processes has been delivered, or does not move for `patience`.
    pub(super) async fn drained_within(&self, patience: Duration) {
        let processes: Vec<_> = self.processes().values().cloned().collect();
        futures::future::join_all(processes.iter().map(|process| process.drained_within(patience))).await;
    }

    /// Finishes the output of all processes; see [`Process::finish_output`].
    pub(super) async fn finish_output(&self) {
        let processes: Vec<_> = self.processes().values().cloned().collect();
        futures::future::join_all(processes.iter().map(|process| async {
            // Until the exit is recorded, the output is still being delivered.
            if process.pid() != 0 && tokio::time::timeout(EXIT_RECORDED, process.exited()).await.is_err() {
                tracing::warn!(
                    container = self.id,
                    exec = process.exec_id,
                    "the output of a process is cut off: its exit is not known yet"
                );
            }
            process.finish_output().await;
        }))
        .await;
    }

    /// Waits until the changes of the root filesystem are on the host, if the guest writes them elsewhere. `EXIT_RECORDED`
    /// limits how long the exit may take to arrive, and the copy has a limit of its own.
    pub(super) async fn changes_finished(&self) {
        let Some((init, _)) = self.process("").zip(self.root.changes.as_ref()) else { return };
        if tokio::time::timeout(EXIT_RECORDED, init.exit_reported()).await.is_ok() {
            init.exited().await;
        }
    }

    /// The processes for an operator's status, the init process first.
    pub(super) fn process_statuses(&self) -> Vec<ProcessStatus> {
        let mut processes: Vec<_> = self.processes().values().cloned().collect();
        processes.sort_by(|a, b| a.exec_id.cmp(&b.exec_id));
        let status = |process: &Arc<Process>| ProcessStatus {
            exec: process.exec_id.clone(),
            pid: process.guest_pid(),
            exit_status: process.exit().map(|exit| exit.status),
        };
        processes.iter().map(status).collect()
    }

    /// Adds an exec; returns false if its id exists.
    pub(super) fn add(&self, process: Arc<Process>) -> bool {
        use std::collections::hash_map::Entry;
        match self.processes().entry(process.exec_id.clone()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(process);
                true
            }
        }
    }

    /// Removes an exec.
    pub(super) fn remove(&self, exec_id: &str) -> Option<Arc<Process>> {
        self.processes().remove(exec_id)
    }

    /// Makes a request of the guest whose success it reports with an event.
    pub(super) async fn request<T>(
        &self,
        request: Request,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> ttrpc::Result<T> {
        // First: the event may arrive before the response.
        lock(&self.requested).ask(request);
        let result = call.await;
        // After a deadline, the guest may still do it.
        if let Err(ttrpc::Error::RpcStatus(status)) = &result
            && status.code() != Code::DEADLINE_EXCEEDED
        {
            lock(&self.requested).rejected(request);
        }
        result
    }

    /// Checks whether a change that the guest reports is legal now, and records it.
    pub(super) fn admit(&self, change: &TaskChange) -> Result<(), IllegalEvent> {
        // A process that is gone has no state. `apply` reports it.
        let Some(process) = self.process(change.exec()) else { return Ok(()) };
        let (mut requested, mut stage) = (lock(&self.requested), process.stage());
        requested.admit(change, &mut stage, Instant::now())
    }

    /// Applies a change that the guest reports, and publishes it. Waits for nothing but space in the publisher's queue.
    pub(super) async fn apply(&self, change: TaskChange, at: Timestamp) {
        let container_id = self.id.clone();
        let Some(process) = self.process(change.exec()) else {
            tracing::debug!(container = self.id, exec = change.exec(), "dropped an event of a process that is gone");
            return;
        };
        // The event may arrive before the response to the call, for example for a fast exec.
        if let TaskChange::Created { pid }
        | TaskChange::Started { pid }
        | TaskChange::ExecStarted { pid, .. }
        | TaskChange::Exited { pid, .. } = change
        {
            process.set_guest_pid(pid);
        }
        let (pid, exec_id) = (process.pid(), process.exec_id.clone());
        match change {
            TaskChange::Created { .. } => self.publish(topics::TASK_CREATE_EVENT_TOPIC, &self.created(pid), at).await,
            TaskChange::Started { .. } => {
                if let Some(changes) = &self.root.changes {
                    changes.note_start();
                }
                let event = TaskStart { container_id, pid, ..Default::default() };
                self.publish(topics::TASK_START_EVENT_TOPIC, &event, at).await;
            }
            TaskChange::OutOfMemory => {
                // Do not wait for space in the queue: the guest can send any number of these events without a call, and
                // all other events of the VM would wait too.
                let event = TaskOOM { container_id, ..Default::default() };
                publish::offer(&self.publisher, topics::TASK_OOM_EVENT_TOPIC, &event, at);
            }
            TaskChange::ExecAdded { .. } => {
                let event = TaskExecAdded { container_id, exec_id, ..Default::default() };
                self.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event, at).await;
                process.set_announced();
            }
            TaskChange::ExecStarted { .. } => {
                let event = TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
                self.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event, at).await;
            }
            TaskChange::Paused => {
                let event = TaskPaused { container_id, ..Default::default() };
                self.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event, at).await;
            }
            TaskChange::Resumed => {
                let event = TaskResumed { container_id, ..Default::default() };
                self.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event, at).await;
            }
            TaskChange::Exited { status, at: exited_at, output, .. } => {
                process.expect_output(output);
                self.publish_exit(process, Exit { status, at: exited_at.unwrap_or(at) });
            }
            TaskChange::Deleted { status, at: exited_at, .. } => {
                self.publish_deletion(Exit { status, at: exited_at.unwrap_or_else(|| at.clone()) }, at);
            }
        }
    }

    /// Ends every process: the VM is dead.
    pub(super) fn vm_died(&self, at: Timestamp) {
        // Execs first, as if the exit of the init process had killed them.
        let mut processes: Vec<_> = self.processes().values().cloned().collect();
        processes.sort_by_key(|process| process.exec_id.is_empty());
        for process in processes {
            let exit = Exit { status: KILLED, at: at.clone() };
            if process.pid() == 0 && !process.exec_id.is_empty() {
                // The exec never ran, so no exit is published. Pending calls to Wait and Delete return at once.
                process.record_exit(exit);
            } else {
                self.publish_exit(process, exit);
            }
        }
    }

    /// Publishes the deletion in the place of a dead guest.
    pub(super) fn deleted_without_guest(&self, exit: Exit, at: Timestamp) {
        self.publish_deletion(exit, at);
    }

    /// Waits until the deletion has been passed to the publisher.
    pub(super) async fn delete_published(&self) {
        // Cannot fail: self holds the sender.
        let _ = self.deleted.subscribe().wait_for(|deleted| *deleted).await;
    }

    /// Waits until the exit of every process that has run is recorded.
    pub(super) async fn ended(&self) {
        let processes: Vec<_> = self.processes().values().filter(|process| process.pid() != 0).cloned().collect();
        futures::future::join_all(processes.iter().map(|process| process.exited())).await;
    }

    /// The event of the creation, with the paths on the host: containerd's clients do not know the guest's paths.
    fn created(&self, pid: u32) -> TaskCreate {
        let request = &self.request;
        TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..Default::default()
            }),
            checkpoint: request.checkpoint.clone(),
            pid,
            ..Default::default()
        }
    }

    /// Records and publishes a process's exit as soon as its output has been delivered or the reader is given up. Only
    /// the first report of an exit counts.
    fn publish_exit(&self, process: Arc<Process>, exit: Exit) {
        if !process.claim_exit() {
            return;
        }
        let mut pending = self.pending();
        // Remove the finished tasks.
        while pending.try_join_next().is_some() {}
        let is_init = process.exec_id.is_empty();
        // Complete: the guest reports the exits of execs before the exit of the init process.
        let mut execs = if is_init { std::mem::take(&mut *pending) } else { JoinSet::new() };
        let (container_id, publisher) = (self.id.clone(), self.publisher.clone());
        let changes = self.root.changes.clone().filter(|_| is_init);
        pending.spawn(async move {
            if !process.drained().await {
                tracing::warn!(
                    container = container_id,
                    exec = process.exec_id,
                    "exit published before all output was delivered: the reader is stalled or too slow"
                );
            }
            while execs.join_next().await.is_some() {}
            if let Some(changes) = changes {
                // Before a client looks at the snapshot, or deletes the container.
                changes.finish().await;
            }
            // As with runc, the PID is gone when a client learns of the exit.
            process.end_representation().await;
            if !process.record_exit(exit.clone()) {
                return;
            }
            let event = TaskExit {
                id: if is_init { container_id.clone() } else { process.exec_id.clone() },
                container_id,
                pid: process.pid(),
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at.clone()),
                ..Default::default()
            };
            publish::publish(&publisher, topics::TASK_EXIT_EVENT_TOPIC, &event, exit.at).await;
        });
    }

    /// Publishes the deletion once, after all exits. `exit` is used if no exit of the init process is recorded.
    fn publish_deletion(&self, exit: Exit, at: Timestamp) {
        let init = self.process("").filter(|_| !self.deleting.swap(true, Ordering::Relaxed));
        let Some(init) = init else { return };
        let mut pending = self.pending();
        let mut exits = std::mem::take(&mut *pending);
        let (container_id, publisher, deleted) = (self.id.clone(), self.publisher.clone(), self.deleted.clone());
        pending.spawn(async move {
            while exits.join_next().await.is_some() {}
            let exit = init.exit().unwrap_or(exit);
            let event = TaskDelete {
                container_id,
                pid: init.pid(),
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at),
                ..Default::default()
            };
            publish::publish(&publisher, topics::TASK_DELETE_EVENT_TOPIC, &event, at).await;
            deleted.send_replace(true);
        });
    }

    async fn publish(&self, topic: &str, event: &impl MessageFull, at: Timestamp) {
        publish::publish(&self.publisher, topic, event, at).await;
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        lock(&self.processes)
    }

    fn pending(&self) -> MutexGuard<'_, JoinSet<()>> {
        lock(&self.pending)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Let the publications finish. All of them do, because the wait for output is limited.
        self.pending().detach_all();
    }
}
