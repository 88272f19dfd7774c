//! One container as the shim keeps it: its processes, and the ordered path of its events from the guest to containerd.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExit, TaskIO};
use containerd_shim_protos::topics;
use husk_protos::events::Event;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageDyn, MessageField};
use tokio::sync::{mpsc, watch};

use crate::events::Publisher;
use crate::io::Stdio;
pub mod process;

use process::{Exit, Process};

/// Events of one container that wait for its output to be delivered.
const QUEUE: usize = 64;
/// How long the exit of a process that is gone may take to be recorded: until its output is delivered, or nobody takes it.
pub const EXIT_RECORDED: std::time::Duration = std::time::Duration::from_secs(10);
/// Exit status of what dies with its VM: as if by SIGKILL.
const KILLED: u32 = 137;

/// What happens to a container, in order.
enum Happening {
    /// Told by the guest.
    Guest(Event),
    /// The VM is gone.
    Died(Timestamp),
    /// Deleted while its VM was gone: the guest cannot tell.
    Deleted(Box<TaskDelete>, Timestamp),
}

/// A container that the guest has, or had before its VM died.
pub struct Container {
    /// containerd's id of it.
    pub id: String,
    /// The bundle on the host.
    pub bundle: PathBuf,
    processes: Mutex<HashMap<String, Arc<Process>>>,
    happenings: mpsc::Sender<Happening>,
    deleted: watch::Receiver<bool>,
}

impl Container {
    /// A container with its init process; events go to `publisher`.
    pub fn start(request: CreateTaskRequest, publisher: Publisher) -> Arc<Self> {
        let init = Arc::new(Process::new("", Stdio::from(&request)));
        let (happenings, receiver) = mpsc::channel(QUEUE);
        let (deleted_sender, deleted) = watch::channel(false);
        let container = Arc::new(Self {
            id: request.id.clone(),
            bundle: PathBuf::from(&request.bundle),
            processes: Mutex::new(HashMap::from([(String::new(), init)])),
            happenings,
            deleted,
        });
        let relay = Relay { container: Arc::downgrade(&container), request, publisher, deleted: deleted_sender };
        tokio::spawn(relay.run(receiver));
        container
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

    /// The guest says that something happened; waits while too much is waiting.
    pub async fn guest_event(&self, event: Event) {
        self.happens(Happening::Guest(event)).await;
    }

    /// The VM is gone, and with it every process.
    pub async fn died(&self, at: Timestamp) {
        self.happens(Happening::Died(at)).await;
    }

    /// Deleted although there is no guest to tell of it.
    pub async fn deleted_without_guest(&self, event: TaskDelete, at: Timestamp) {
        self.happens(Happening::Deleted(Box::new(event), at)).await;
    }

    /// Waits until its TaskDelete has been given to the publisher.
    pub async fn delete_published(&self) {
        // An error says that the relay has ended: nothing more will be published.
        let _ = self.deleted.clone().wait_for(|deleted| *deleted).await;
    }

    async fn happens(&self, happening: Happening) {
        if self.happenings.send(happening).await.is_err() {
            tracing::error!(container = self.id, "event lost: the container's relay has ended");
        }
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.processes.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Which container an event is about; none if it is not of a kind that husk knows, or is not what its topic says.
pub fn container_of(event: &Event) -> Option<String> {
    // In each of containerd's task events the container's id is field 1; what follows it is that event's own.
    let known = [
        topics::TASK_CREATE_EVENT_TOPIC,
        topics::TASK_START_EVENT_TOPIC,
        topics::TASK_OOM_EVENT_TOPIC,
        topics::TASK_EXIT_EVENT_TOPIC,
        topics::TASK_DELETE_EVENT_TOPIC,
        topics::TASK_EXEC_ADDED_EVENT_TOPIC,
        topics::TASK_EXEC_STARTED_EVENT_TOPIC,
        topics::TASK_PAUSED_EVENT_TOPIC,
        topics::TASK_RESUMED_EVENT_TOPIC,
    ];
    if !known.contains(&event.topic.as_str()) {
        return None;
    }
    let id = containerd_shim_protos::events::task::TaskOOM::parse_from_bytes(&event.event.value).ok()?.container_id;
    (!id.is_empty()).then_some(id)
}

/// Carries one container's events to the publisher, in order, an exit only after the output.
struct Relay {
    container: std::sync::Weak<Container>,
    request: CreateTaskRequest,
    publisher: Publisher,
    deleted: watch::Sender<bool>,
}

impl Relay {
    async fn run(self, mut happenings: mpsc::Receiver<Happening>) {
        while let Some(happening) = happenings.recv().await {
            let Some(container) = self.container.upgrade() else { break };
            match happening {
                Happening::Guest(event) => self.guest_event(&container, event).await,
                Happening::Died(at) => self.died(&container, at).await,
                Happening::Deleted(event, at) => {
                    self.publish(topics::TASK_DELETE_EVENT_TOPIC, &*event, at).await;
                    self.deleted.send_replace(true);
                }
            }
        }
    }

    async fn guest_event(&self, container: &Container, event: Event) {
        let at = event.timestamp.clone().unwrap_or_default();
        let payload = event.event.clone().unwrap_or_default();
        match event.topic.as_str() {
            topics::TASK_CREATE_EVENT_TOPIC => self.created(payload, at).await,
            topics::TASK_EXIT_EVENT_TOPIC => self.exited(container, &payload, at).await,
            topics::TASK_DELETE_EVENT_TOPIC => {
                self.publisher.publish(&event.topic, payload.clone(), at).await;
                let of_init = TaskDelete::parse_from_bytes(&payload.value)
                    .is_ok_and(|event| event.id.is_empty() || event.id == container.id);
                if of_init {
                    self.deleted.send_replace(true);
                }
            }
            topic => self.publisher.publish(topic, payload, at).await,
        }
    }

    /// What containerd's clients know are the host's paths, not the guest's.
    async fn created(&self, payload: Any, at: Timestamp) {
        let pid = TaskCreate::parse_from_bytes(&payload.value).map(|event| event.pid).unwrap_or_default();
        let request = &self.request;
        let event = TaskCreate {
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
        };
        self.publish(topics::TASK_CREATE_EVENT_TOPIC, &event, at).await;
    }

    async fn exited(&self, container: &Container, payload: &Any, at: Timestamp) {
        let event = match TaskExit::parse_from_bytes(&payload.value) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(container = container.id, %error, "the guest sent a TaskExit that is none");
                return;
            }
        };
        let exec_id = if event.id == container.id { "" } else { event.id.as_str() };
        if let Some(process) = container.process(exec_id) {
            // The exit of a fast exec can be here before the answer to its start is.
            process.set_pid(event.pid);
            self.exit(container, &process, event.exit_status, event.exited_at.clone().unwrap_or(at)).await;
        } else {
            tracing::warn!(
                container = container.id,
                exec = exec_id,
                "the guest reports the exit of a process that it was not asked for"
            );
        }
    }

    async fn died(&self, container: &Container, at: Timestamp) {
        // The execs before the init, as if it had taken them along.
        let mut processes: Vec<_> = container.processes().values().cloned().collect();
        processes.sort_by_key(|process| process.exec_id.is_empty());
        for process in processes {
            if process.exit().is_none() && (process.pid() != 0 || process.exec_id.is_empty()) {
                self.exit(container, &process, KILLED, at.clone()).await;
            }
        }
    }

    async fn exit(&self, container: &Container, process: &Process, status: u32, at: Timestamp) {
        if !process.drained().await {
            tracing::warn!(
                container = container.id,
                exec = process.exec_id,
                "exit reported before its output was read: the reader does not read"
            );
        }
        if !process.record_exit(Exit { status, at: at.clone() }) {
            return;
        }
        let event = TaskExit {
            container_id: container.id.clone(),
            id: if process.exec_id.is_empty() { container.id.clone() } else { process.exec_id.clone() },
            pid: process.pid(),
            exit_status: status,
            exited_at: MessageField::some(at.clone()),
            ..Default::default()
        };
        self.publish(topics::TASK_EXIT_EVENT_TOPIC, &event, at).await;
    }

    async fn publish(&self, topic: &str, event: &impl protobuf::MessageFull, at: Timestamp) {
        match event.write_to_bytes() {
            Ok(value) => {
                let name = event.descriptor_dyn().full_name().to_owned();
                self.publisher.publish(topic, Any { type_url: name, value, ..Default::default() }, at).await;
            }
            Err(error) => tracing::error!(topic, %error, "event lost: it cannot be encoded"),
        }
    }
}
