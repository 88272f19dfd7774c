//! One container as the shim keeps it: its processes, and the order in which containerd hears of them.
//!
//! What the guest tells goes on at once, but for exits: one is told when the output of its process has been delivered, the init's after those of
//! its execs, and the deletion last of all. Nobody who reports an exit waits for that, so a reader who does not read holds up one process's exit
//! and the init's, and nothing else; what waits is bounded by the number of processes.

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
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageDyn, MessageField, MessageFull};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::containerd::publisher::Publisher;
use crate::host::hooks::{Hook, Subject};
use crate::stdio::Stdio;

pub mod guest_event;
pub mod process;
#[cfg(test)]
mod tests;

use guest_event::News;
use process::{Exit, Process};

/// How long the exit of a process that is gone may take to be recorded: until its output is delivered, or nobody takes it.
pub const EXIT_RECORDED: Duration = Duration::from_secs(10);
const _: () = assert!(process::DELIVERY.as_secs() < EXIT_RECORDED.as_secs());
/// Exit status of what dies with its VM: as if by SIGKILL.
const KILLED: u32 = 137;

/// A container that the guest has, or had before its VM died.
pub struct Container {
    /// containerd's id of it.
    pub id: String,
    /// What its hooks of the host are told of it, the bundle among it.
    pub subject: Subject,
    /// Those that come after its start.
    pub poststart: Vec<Hook>,
    /// As containerd asked for it.
    request: CreateTaskRequest,
    publisher: Publisher,
    processes: Mutex<HashMap<String, Arc<Process>>>,
    /// What is still to be told after those who report it have gone on: the exits of execs; or that of the init, which waits for them; or the
    /// deletion, which waits for that.
    pending: Mutex<JoinSet<()>>,
    deleting: AtomicBool,
    deleted: Arc<watch::Sender<bool>>,
}

impl Container {
    /// A container with its init process; events go to `publisher`.
    pub fn new(request: CreateTaskRequest, subject: Subject, poststart: Vec<Hook>, publisher: Publisher) -> Arc<Self> {
        let init = Arc::new(Process::new("", Stdio::from(&request)));
        Arc::new(Self {
            id: request.id.clone(),
            subject,
            poststart,
            request,
            publisher,
            processes: Mutex::new(HashMap::from([(String::new(), init)])),
            pending: Mutex::default(),
            deleting: AtomicBool::new(false),
            deleted: Arc::new(watch::channel(false).0),
        })
    }

    /// The process of that exec id; the init for an empty one.
    pub fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        self.processes().get(exec_id).cloned()
    }

    /// Ends the output of all its processes; see [`Process::finish_output`].
    pub async fn finish_output(&self) {
        let processes: Vec<_> = self.processes().values().cloned().collect();
        futures::future::join_all(processes.iter().map(|process| async {
            // Until the exit is recorded, its output is still being waited for.
            if process.pid() != 0 && tokio::time::timeout(EXIT_RECORDED, process.exited()).await.is_err() {
                tracing::warn!(container = self.id, exec = process.exec_id, "its output ends before its exit is known");
            }
            process.finish_output().await;
        }))
        .await;
    }

    /// Its processes as an operator sees them, the init first.
    pub fn processes_seen(&self) -> Vec<Value> {
        let mut processes: Vec<_> = self.processes().values().cloned().collect();
        processes.sort_by(|a, b| a.exec_id.cmp(&b.exec_id));
        let seen = |process: &Arc<Process>| {
            let exit = process.exit().map(|exit| exit.status);
            json!({"exec": process.exec_id, "pid": process.pid(), "exit_status": exit})
        };
        processes.iter().map(seen).collect()
    }

    /// Adds an exec; false if that id is taken.
    pub fn add(&self, process: Arc<Process>) -> bool {
        use std::collections::hash_map::Entry;
        match self.processes().entry(process.exec_id.clone()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(process);
                true
            }
        }
    }

    /// Takes an exec out.
    pub fn remove(&self, exec_id: &str) -> Option<Arc<Process>> {
        self.processes().remove(exec_id)
    }

    /// The guest says that something happened. Waits for nobody but the publisher.
    pub async fn told(&self, news: News, at: Timestamp) {
        let container_id = self.id.clone();
        let Some(process) = self.process(news.exec()) else {
            tracing::debug!(container = self.id, exec = news.exec(), "told of a process that is gone");
            return;
        };
        // The answer to a call may come after what is told of it, as with a fast exec.
        if let News::Created { pid }
        | News::Started { pid }
        | News::ExecStarted { pid, .. }
        | News::Exited { pid, .. } = news
        {
            process.set_pid(pid);
        }
        let (pid, exec_id) = (process.pid(), process.exec_id.clone());
        match news {
            News::Created { .. } => self.publish(topics::TASK_CREATE_EVENT_TOPIC, &self.created(pid), at).await,
            News::Started { .. } => {
                let event = TaskStart { container_id, pid, ..Default::default() };
                self.publish(topics::TASK_START_EVENT_TOPIC, &event, at).await;
            }
            News::OutOfMemory => {
                // Any number of these comes without a call of containerd's; waiting for it would hold up all that the VM tells.
                let topic = topics::TASK_OOM_EVENT_TOPIC;
                if let Some(event) = packed(topic, &TaskOOM { container_id, ..Default::default() }) {
                    self.publisher.offer(topic, event, at);
                }
            }
            News::ExecAdded { .. } => {
                let event = TaskExecAdded { container_id, exec_id, ..Default::default() };
                self.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event, at).await;
                process.announce();
            }
            News::ExecStarted { .. } => {
                let event = TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
                self.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event, at).await;
            }
            News::Paused => {
                let event = TaskPaused { container_id, ..Default::default() };
                self.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event, at).await;
            }
            News::Resumed => {
                let event = TaskResumed { container_id, ..Default::default() };
                self.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event, at).await;
            }
            News::Exited { status, at: exited_at, .. } => {
                self.end(process, Exit { status, at: exited_at.unwrap_or(at) });
            }
            News::Deleted { status, at: exited_at, .. } => {
                self.delete(Exit { status, at: exited_at.unwrap_or_else(|| at.clone()) }, at);
            }
        }
    }

    /// The VM is gone, and with it every process.
    pub fn died(&self, at: Timestamp) {
        // The execs before the init, as if it had taken them along.
        let mut processes: Vec<_> = self.processes().values().cloned().collect();
        processes.sort_by_key(|process| process.exec_id.is_empty());
        for process in processes {
            let exit = Exit { status: KILLED, at: at.clone() };
            if process.pid() == 0 && !process.exec_id.is_empty() {
                // It never ran, so nobody is told of an end; who waits for one, or deletes it, has it at once.
                process.record_exit(exit);
            } else {
                self.end(process, exit);
            }
        }
    }

    /// Deleted although there is no guest to tell of it.
    pub fn deleted_without_guest(&self, exit: Exit, at: Timestamp) {
        self.delete(exit, at);
    }

    /// Waits until its TaskDelete has been given to the publisher.
    pub async fn delete_published(&self) {
        // The sender is in self, so it cannot be gone.
        let _ = self.deleted.subscribe().wait_for(|deleted| *deleted).await;
    }

    /// Waits until every process that has run has ended and is recorded.
    pub async fn ended(&self) {
        let processes: Vec<_> = self.processes().values().filter(|process| process.pid() != 0).cloned().collect();
        futures::future::join_all(processes.iter().map(|process| process.exited())).await;
    }

    /// What containerd's clients know are the host's paths, not the guest's.
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

    /// A process has ended; the first report of it counts. It is recorded and told when its output has been delivered, or nobody takes it.
    fn end(&self, process: Arc<Process>, exit: Exit) {
        if !process.take_end() {
            return;
        }
        let mut pending = self.pending();
        // The ones that are done.
        while pending.try_join_next().is_some() {}
        let is_init = process.exec_id.is_empty();
        // The guest reports the execs' exits before the init's, so these are all.
        let mut execs = if is_init { std::mem::take(&mut *pending) } else { JoinSet::new() };
        let (container_id, publisher) = (self.id.clone(), self.publisher.clone());
        pending.spawn(async move {
            if !process.drained().await {
                tracing::warn!(
                    container = container_id,
                    exec = process.exec_id,
                    "exit reported before its output was read: the reader does not read, or is too slow"
                );
            }
            while execs.join_next().await.is_some() {}
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
            publish(&publisher, topics::TASK_EXIT_EVENT_TOPIC, &event, exit.at).await;
        });
    }

    /// It has been deleted, which is told once, after everything else. `exit` is the init's, unless that is recorded.
    fn delete(&self, exit: Exit, at: Timestamp) {
        let init = self.process("").filter(|_| !self.deleting.swap(true, Ordering::Relaxed));
        let Some(init) = init else { return };
        let mut pending = self.pending();
        let mut before = std::mem::take(&mut *pending);
        let (container_id, publisher, deleted) = (self.id.clone(), self.publisher.clone(), self.deleted.clone());
        pending.spawn(async move {
            while before.join_next().await.is_some() {}
            let exit = init.exit().unwrap_or(exit);
            let event = TaskDelete {
                container_id,
                pid: init.pid(),
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at),
                ..Default::default()
            };
            publish(&publisher, topics::TASK_DELETE_EVENT_TOPIC, &event, at).await;
            deleted.send_replace(true);
        });
    }

    async fn publish(&self, topic: &str, event: &impl MessageFull, at: Timestamp) {
        publish(&self.publisher, topic, event, at).await;
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.processes.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn pending(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.pending.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // What is still to be told is told: each of it ends by itself, because no output is waited for without end.
        self.pending().detach_all();
    }
}

async fn publish(publisher: &Publisher, topic: &str, event: &impl MessageFull, at: Timestamp) {
    if let Some(event) = packed(topic, event) {
        publisher.publish(topic, event, at).await;
    }
}

/// As containerd's clients decode it.
fn packed(topic: &str, event: &impl MessageFull) -> Option<Any> {
    let encoded = event.write_to_bytes();
    let value = encoded.inspect_err(|error| tracing::error!(topic, %error, "event lost: it cannot be encoded")).ok()?;
    Some(Any { type_url: event.descriptor_dyn().full_name().to_owned(), value, ..Default::default() })
}
