//! Publishes containerd's task events.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::topics;
use protobuf::well_known_types::timestamp::Timestamp;

use super::Tasks;
use super::container::Container;
use super::process::Process;
use crate::reaper::Exit;

pub(super) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Default::default() }
}

impl Tasks {
    pub(super) fn publish_create(&self, container: &Container) {
        let stdio = container.init.stdio.clone();
        let io = TaskIO {
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: container.terminal,
            ..Default::default()
        };
        let event = TaskCreate {
            container_id: container.id.clone(),
            bundle: container.bundle().to_string_lossy().into_owned(),
            io: Some(io).into(),
            pid: container.init.state().pid() as u32,
            ..Default::default()
        };
        self.events.publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
    }

    pub(super) fn publish_start(&self, process: &Process) {
        let (container_id, pid) = (process.container.clone(), process.state().pid() as u32);
        if process.exec.is_empty() {
            let event = TaskStart { container_id, pid, ..Default::default() };
            self.events.publish(topics::TASK_START_EVENT_TOPIC, &event);
        } else {
            let event = TaskExecStarted { container_id, exec_id: process.exec.clone(), pid, ..Default::default() };
            self.events.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        }
    }

    pub(super) fn publish_exec_added(&self, process: &Process) {
        let (container_id, exec_id) = (process.container.clone(), process.exec.clone());
        let event = TaskExecAdded { container_id, exec_id, ..Default::default() };
        self.events.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
    }

    pub(super) fn publish_exit(&self, process: &Process, exit: Exit) {
        let event = TaskExit {
            container_id: process.container.clone(),
            id: process_id(process),
            pid: process.state().pid() as u32,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish_with_output(topics::TASK_EXIT_EVENT_TOPIC, &event, process.streams.bytes_at_exit());
    }

    pub(super) fn publish_paused(&self, container: &Container) {
        let event = TaskPaused { container_id: container.id.clone(), ..Default::default() };
        self.events.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
    }

    pub(super) fn publish_resumed(&self, container: &Container) {
        let event = TaskResumed { container_id: container.id.clone(), ..Default::default() };
        self.events.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
    }

    /// Publishes one event for all OOM kills since the last call, if there were any.
    pub(super) fn publish_oom_kills(&self, container: &Container) {
        match container.oom_kills.new_ones() {
            Ok(0) => {}
            Ok(_) => {
                let event = TaskOOM { container_id: container.id.clone(), ..Default::default() };
                self.events.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
            }
            Err(error) => tracing::error!(container = container.id, %error, "failed to read the OOM kills"),
        }
    }

    /// Publishes OOM kills until `exit` completes. The last kill may coincide with the exit, so the caller checks once
    /// more before it publishes the exit.
    pub(super) async fn publish_oom_kills_until<T>(&self, exit: impl Future<Output = T>, container: &Container) -> T {
        let mut exit = std::pin::pin!(exit);
        loop {
            tokio::select! {
                exit = &mut exit => return exit,
                changed = container.oom_kills.changed() => match changed {
                    Ok(()) => self.publish_oom_kills(container),
                    Err(error) => {
                        tracing::error!(container = container.id, %error, "failed to watch the OOM kills");
                        return exit.await;
                    }
                },
            }
        }
    }

    pub(super) fn publish_delete(&self, container: &Container, pid: i32, exit: Exit) {
        let event = TaskDelete {
            container_id: container.id.clone(),
            pid: pid as u32,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
    }
}

/// containerd identifies the init by its container's ID.
fn process_id(process: &Process) -> String {
    if process.exec.is_empty() { process.container.clone() } else { process.exec.clone() }
}
