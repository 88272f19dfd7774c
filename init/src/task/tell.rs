//! Events: what happened to a process, as containerd's messages.

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

/// A moment as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Default::default() }
}

impl Tasks {
    pub(super) fn tell_created(&self, container: &Container) {
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

    pub(super) fn tell_started(&self, process: &Process) {
        let (container_id, pid) = (process.container.clone(), process.state().pid() as u32);
        if process.exec.is_empty() {
            let event = TaskStart { container_id, pid, ..Default::default() };
            self.events.publish(topics::TASK_START_EVENT_TOPIC, &event);
        } else {
            let event = TaskExecStarted { container_id, exec_id: process.exec.clone(), pid, ..Default::default() };
            self.events.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        }
    }

    pub(super) fn tell_exec_added(&self, process: &Process) {
        let (container_id, exec_id) = (process.container.clone(), process.exec.clone());
        let event = TaskExecAdded { container_id, exec_id, ..Default::default() };
        self.events.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
    }

    pub(super) fn tell_exited(&self, process: &Process, exit: Exit) {
        let event = TaskExit {
            container_id: process.container.clone(),
            id: id(process),
            pid: process.state().pid() as u32,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }

    pub(super) fn tell_paused(&self, container: &Container) {
        let event = TaskPaused { container_id: container.id.clone(), ..Default::default() };
        self.events.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
    }

    pub(super) fn tell_resumed(&self, container: &Container) {
        let event = TaskResumed { container_id: container.id.clone(), ..Default::default() };
        self.events.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
    }

    /// Tells of what the kernel has killed for want of memory since this was last done: one event, however many they were.
    pub(super) fn tell_kills(&self, container: &Container) {
        match container.kills.new_ones() {
            Ok(0) => {}
            Ok(_) => {
                let event = TaskOOM { container_id: container.id.clone(), ..Default::default() };
                self.events.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
            }
            Err(error) => tracing::error!(container = container.id, %error, "read what memory's want has killed"),
        }
    }

    /// Waits for the end of a container's init, and tells of each such kill meanwhile. The last of them may come with the end: who tells that
    /// asks once more before.
    pub(super) async fn tell_kills_until<T>(&self, end: impl Future<Output = T>, container: &Container) -> T {
        let mut end = std::pin::pin!(end);
        loop {
            tokio::select! {
                end = &mut end => return end,
                changed = container.kills.changed() => match changed {
                    Ok(()) => self.tell_kills(container),
                    Err(error) => {
                        tracing::error!(container = container.id, %error, "watch a container's memory");
                        return end.await;
                    }
                },
            }
        }
    }

    pub(super) fn tell_deleted(&self, container: &Container, pid: i32, exit: Exit) {
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

/// containerd calls the init by its container's id.
fn id(process: &Process) -> String {
    if process.exec.is_empty() { process.container.clone() } else { process.exec.clone() }
}
