//! Extracts the values of a containerd event that an operator needs. Pure.

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::topics;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

/// The event's values as a JSON object.
pub(crate) fn fields(topic: &str, event: &Any) -> Value {
    let bytes = &event.value;
    let fields = match topic {
        topics::TASK_CREATE_EVENT_TOPIC => TaskCreate::parse_from_bytes(bytes)
            .map(|event| json!({"container": event.container_id, "pid": event.pid, "bundle": event.bundle})),
        topics::TASK_START_EVENT_TOPIC => {
            TaskStart::parse_from_bytes(bytes).map(|event| json!({"container": event.container_id, "pid": event.pid}))
        }
        topics::TASK_EXEC_ADDED_EVENT_TOPIC => TaskExecAdded::parse_from_bytes(bytes)
            .map(|event| json!({"container": event.container_id, "exec": event.exec_id})),
        topics::TASK_EXEC_STARTED_EVENT_TOPIC => TaskExecStarted::parse_from_bytes(bytes)
            .map(|event| json!({"container": event.container_id, "exec": event.exec_id, "pid": event.pid})),
        topics::TASK_EXIT_EVENT_TOPIC => TaskExit::parse_from_bytes(bytes).map(|event| {
            let mut fields =
                json!({"container": event.container_id, "pid": event.pid, "exit_status": event.exit_status});
            // The init process has the container's id.
            if event.id != event.container_id {
                fields["exec"] = json!(event.id);
            }
            fields
        }),
        topics::TASK_DELETE_EVENT_TOPIC => TaskDelete::parse_from_bytes(bytes)
            .map(|event| json!({"container": event.container_id, "pid": event.pid, "exit_status": event.exit_status})),
        topics::TASK_OOM_EVENT_TOPIC => {
            TaskOOM::parse_from_bytes(bytes).map(|event| json!({"container": event.container_id}))
        }
        topics::TASK_PAUSED_EVENT_TOPIC => {
            TaskPaused::parse_from_bytes(bytes).map(|event| json!({"container": event.container_id}))
        }
        topics::TASK_RESUMED_EVENT_TOPIC => {
            TaskResumed::parse_from_bytes(bytes).map(|event| json!({"container": event.container_id}))
        }
        _ => Ok(json!({})),
    };
    // Decoding cannot fail: the shim encoded the event itself.
    fields.unwrap_or_else(|error| json!({"unreadable": error.to_string()}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_name_the_container_and_the_process() {
        let any =
            |event: &dyn protobuf::MessageDyn| Any { value: event.write_to_bytes_dyn().unwrap(), ..Default::default() };
        let (container_id, exec_id, pid) = ("c".to_owned(), "e".to_owned(), 7);
        let exit = TaskExit {
            container_id: container_id.clone(),
            id: container_id.clone(),
            pid,
            exit_status: 137,
            ..Default::default()
        };
        let exec_exit = TaskExit { id: exec_id.clone(), ..exit.clone() };
        let start = TaskStart { container_id: container_id.clone(), pid, ..Default::default() };
        let oom = TaskOOM { container_id: container_id.clone(), ..Default::default() };
        let added = TaskExecAdded { container_id, exec_id, ..Default::default() };
        let table = [
            (topics::TASK_EXIT_EVENT_TOPIC, any(&exit), json!({"container": "c", "pid": 7, "exit_status": 137})),
            (
                topics::TASK_EXIT_EVENT_TOPIC,
                any(&exec_exit),
                json!({"container": "c", "exec": "e", "pid": 7, "exit_status": 137}),
            ),
            (topics::TASK_START_EVENT_TOPIC, any(&start), json!({"container": "c", "pid": 7})),
            (topics::TASK_OOM_EVENT_TOPIC, any(&oom), json!({"container": "c"})),
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, any(&added), json!({"container": "c", "exec": "e"})),
            ("/other", any(&oom), json!({})),
        ];
        for (topic, event, expected) in table {
            assert_eq!(fields(topic, &event), expected, "{topic}");
        }
    }
}
