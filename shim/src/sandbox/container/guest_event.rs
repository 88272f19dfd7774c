//! Parses and validates the guest's events. Pure.
//!
//! containerd's clients decode whatever type a message names and act on whatever id it contains. The shim therefore
//! forwards none of the guest's bytes: it decodes an event as the message that the topic implies, extracts the values
//! that it needs, and builds its own message from them.

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::topics;
use husk_protos::events::Event;
use protobuf::Message;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::host::text::clean;

/// Largest event in bytes. The largest event of an honest guest, TaskCreate, has a few hundred.
const MAX_SIZE: usize = 4096;
/// The last second of the year 9999, the end of a Timestamp's range (protobuf's timestamp.proto). Later times break
/// clients: Go's JSON encoder rejects them.
const MAX_SECOND: i64 = 253_402_300_799;
/// How much earlier and later than now an event may claim to have happened, in seconds. Events arrive at once, but the
/// shim, or its host, may have been stopped for a while. The guest's clock follows the host's.
const PLAUSIBLE: (i64, i64) = (3600, 60);
/// Highest exit status, and the one that containerd uses where it is not known.
const MAX_STATUS: u32 = 255;

/// A valid event of the guest.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GuestEvent {
    /// The container's id.
    pub(crate) container: String,
    /// When, by the guest's clock; `None` if the guest's timestamp is invalid.
    pub(crate) at: Option<Timestamp>,
    pub(crate) change: TaskChange,
}

/// A change of a container. It contains only values that the shim does not know better itself. An empty exec id stands
/// for the init process; an invalid timestamp is `None`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum TaskChange {
    /// The init process exists and waits for its start.
    Created {
        pid: u32,
    },
    /// The init process runs.
    Started {
        pid: u32,
    },
    /// The kernel killed a process because the container's memory was exhausted.
    OutOfMemory,
    ExecAdded {
        exec: String,
    },
    ExecStarted {
        exec: String,
        pid: u32,
    },
    Paused,
    Resumed,
    Exited {
        exec: String,
        pid: u32,
        status: u32,
        at: Option<Timestamp>,
        /// Bytes of its stdout and stderr that precede the exit. The guest may claim any number.
        output: [u64; 2],
    },
    /// The container was deleted; PID, status and time are those of its init process.
    Deleted {
        pid: u32,
        status: u32,
        at: Option<Timestamp>,
    },
}

impl TaskChange {
    /// The exec that changed; empty for the init process and for the container.
    pub(crate) fn exec(&self) -> &str {
        match self {
            Self::ExecAdded { exec } | Self::ExecStarted { exec, .. } | Self::Exited { exec, .. } => exec,
            _ => "",
        }
    }
}

/// Why an event is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidEvent {
    #[error("an event of {0} bytes, more than {MAX_SIZE}")]
    TooLarge(u64),
    #[error("unknown topic {0:?}")]
    UnknownTopic(String),
    #[error("decode {message}: {problem}")]
    Undecodable {
        /// The message that the topic implies.
        message: &'static str,
        problem: String,
    },
    /// The sandbox has no such process, or no longer.
    #[error("unknown process {exec:?} of container {container:?}")]
    UnknownProcess {
        container: String,
        /// Empty for the init process.
        exec: String,
    },
}

/// Parses an event of the guest that arrives at `now`. `exists` reports whether a container has a process with this
/// exec id; an empty id stands for the init process.
pub(crate) fn parse(
    event: &Event,
    now: &Timestamp,
    exists: impl Fn(&str, &str) -> bool,
) -> Result<GuestEvent, InvalidEvent> {
    let time = |at: Option<&Timestamp>| plausible_time(at, now);
    let size = event.compute_size();
    if size > MAX_SIZE as u64 {
        return Err(InvalidEvent::TooLarge(size));
    }
    let bytes = event.event.value.as_slice();
    let (container, change) = match event.topic.as_str() {
        topics::TASK_CREATE_EVENT_TOPIC => {
            let event: TaskCreate = decode(bytes)?;
            (event.container_id, TaskChange::Created { pid: event.pid })
        }
        topics::TASK_START_EVENT_TOPIC => {
            let event: TaskStart = decode(bytes)?;
            (event.container_id, TaskChange::Started { pid: event.pid })
        }
        topics::TASK_OOM_EVENT_TOPIC => (decode::<TaskOOM>(bytes)?.container_id, TaskChange::OutOfMemory),
        topics::TASK_EXEC_ADDED_EVENT_TOPIC => {
            let event: TaskExecAdded = decode(bytes)?;
            (event.container_id, TaskChange::ExecAdded { exec: event.exec_id })
        }
        topics::TASK_EXEC_STARTED_EVENT_TOPIC => {
            let event: TaskExecStarted = decode(bytes)?;
            (event.container_id, TaskChange::ExecStarted { exec: event.exec_id, pid: event.pid })
        }
        topics::TASK_PAUSED_EVENT_TOPIC => (decode::<TaskPaused>(bytes)?.container_id, TaskChange::Paused),
        topics::TASK_RESUMED_EVENT_TOPIC => (decode::<TaskResumed>(bytes)?.container_id, TaskChange::Resumed),
        topics::TASK_EXIT_EVENT_TOPIC => {
            let TaskExit { container_id, id, pid, exit_status: status, exited_at, .. } = decode(bytes)?;
            // In this event the init process has the container's id.
            let exec = if id == container_id { String::new() } else { id };
            let (status, output) = (valid_status(status), [event.stdout_bytes, event.stderr_bytes]);
            (container_id, TaskChange::Exited { exec, pid, status, at: time(exited_at.as_ref()), output })
        }
        topics::TASK_DELETE_EVENT_TOPIC => {
            let TaskDelete { container_id, pid, exit_status: status, exited_at, .. } = decode(bytes)?;
            // The exit may be long ago.
            let at = valid_time(exited_at.as_ref(), now);
            (container_id, TaskChange::Deleted { pid, status: valid_status(status), at })
        }
        other => return Err(InvalidEvent::UnknownTopic(clean(other))),
    };
    let exec = change.exec();
    // An exec with an empty id would be taken for the init process.
    let nameless = exec.is_empty() && matches!(change, TaskChange::ExecAdded { .. } | TaskChange::ExecStarted { .. });
    if nameless || !exists(&container, exec) {
        return Err(InvalidEvent::UnknownProcess { exec: clean(exec), container: clean(&container) });
    }
    Ok(GuestEvent { container, at: time(event.timestamp.as_ref()), change })
}

fn decode<M: Message>(bytes: &[u8]) -> Result<M, InvalidEvent> {
    M::parse_from_bytes(bytes)
        .map_err(|error| InvalidEvent::Undecodable { message: M::NAME, problem: error.to_string() })
}

/// A time of the past, without unknown fields that a hostile guest may have added.
pub(crate) fn valid_time(at: Option<&Timestamp>, now: &Timestamp) -> Option<Timestamp> {
    let at = at?;
    let latest = now.seconds.saturating_add(PLAUSIBLE.1).min(MAX_SECOND);
    let valid = (0..=latest).contains(&at.seconds) && (0..1_000_000_000).contains(&at.nanos);
    valid.then(|| Timestamp { seconds: at.seconds, nanos: at.nanos, ..Default::default() })
}

/// A time at which what is reported now may have happened.
fn plausible_time(at: Option<&Timestamp>, now: &Timestamp) -> Option<Timestamp> {
    valid_time(at, now).filter(|at| at.seconds >= now.seconds.saturating_sub(PLAUSIBLE.0))
}

/// The status of a process's exit as a shell would see it.
pub(crate) fn valid_status(status: u32) -> u32 {
    status.min(MAX_STATUS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;

    const AT: i64 = 1_700_000_000;

    fn at(seconds: i64) -> MessageField<Timestamp> {
        MessageField::some(Timestamp { seconds, ..Default::default() })
    }

    fn event(topic: &str, value: Vec<u8>) -> Event {
        // The type URL is ignored: the topic determines the message.
        let any = Any { type_url: "evil.Type".into(), value, ..Default::default() };
        let (stdout_bytes, stderr_bytes) = (10, 20);
        let event = Event { stdout_bytes, stderr_bytes, topic: topic.into(), ..Default::default() };
        Event { timestamp: at(AT), event: MessageField::some(any), ..event }
    }

    fn encoded(message: &impl Message) -> Vec<u8> {
        message.write_to_bytes().unwrap()
    }

    /// Parses an event in a sandbox with one container `c`, which has one exec `e`.
    fn parse_here(event: &Event) -> Result<TaskChange, InvalidEvent> {
        let event =
            parse(event, &at(AT + 1).unwrap(), |container, exec| container == "c" && ["", "e"].contains(&exec))?;
        assert_eq!((event.container.as_str(), event.at), ("c", at(AT).into_option()));
        Ok(event.change)
    }

    #[test]
    fn an_event_is_the_message_that_its_topic_implies_or_is_rejected() {
        let unknown = |container: &str, exec: &str| {
            Err(InvalidEvent::UnknownProcess { container: container.to_owned(), exec: exec.to_owned() })
        };
        let (c, e) = (|| "c".to_owned(), || "e".to_owned());
        let create = |container_id: &str| {
            encoded(&TaskCreate {
                container_id: container_id.into(),
                bundle: "/etc".into(),
                pid: 7,
                ..Default::default()
            })
        };
        let exit = |id: &str, seconds: i64| {
            encoded(&TaskExit {
                container_id: c(),
                id: id.into(),
                pid: 7,
                exit_status: 3,
                exited_at: at(seconds),
                ..Default::default()
            })
        };
        let exited = |exec: &str, at: Option<Timestamp>| {
            Ok(TaskChange::Exited { exec: exec.into(), pid: 7, status: 3, at, output: [10, 20] })
        };
        let added = |exec_id: &str| {
            encoded(&TaskExecAdded { container_id: c(), exec_id: exec_id.into(), ..Default::default() })
        };
        let started = |exec_id: &str| {
            encoded(&TaskExecStarted { container_id: c(), exec_id: exec_id.into(), pid: 7, ..Default::default() })
        };
        let delete = encoded(&TaskDelete { container_id: c(), pid: 7, exit_status: 3, ..Default::default() });
        // Field 15, a string: no event has it.
        let with_unknown_field = |mut bytes: Vec<u8>| {
            bytes.extend([0x7a, 2, b'h', b'i']);
            bytes
        };
        let oom = encoded(&TaskOOM { container_id: c(), ..Default::default() });
        let table = [
            ("/tasks/create", create("c"), Ok(TaskChange::Created { pid: 7 })),
            ("/tasks/create", create("other"), unknown("other", "")),
            ("/tasks/create", create(""), unknown("", "")),
            (
                "/tasks/start",
                encoded(&TaskStart { container_id: c(), pid: 7, ..Default::default() }),
                Ok(TaskChange::Started { pid: 7 }),
            ),
            ("/tasks/oom", oom.clone(), Ok(TaskChange::OutOfMemory)),
            ("/tasks/oom", with_unknown_field(oom.clone()), Ok(TaskChange::OutOfMemory)),
            ("/tasks/paused", encoded(&TaskPaused { container_id: c(), ..Default::default() }), Ok(TaskChange::Paused)),
            (
                "/tasks/resumed",
                encoded(&TaskResumed { container_id: c(), ..Default::default() }),
                Ok(TaskChange::Resumed),
            ),
            ("/tasks/exec-added", added("e"), Ok(TaskChange::ExecAdded { exec: e() })),
            ("/tasks/exec-added", with_unknown_field(added("e")), Ok(TaskChange::ExecAdded { exec: e() })),
            ("/tasks/exec-added", added("x"), unknown("c", "x")),
            ("/tasks/exec-added", added(""), unknown("c", "")),
            ("/tasks/exec-started", started("e"), Ok(TaskChange::ExecStarted { exec: e(), pid: 7 })),
            ("/tasks/exec-started", started("x"), unknown("c", "x")),
            ("/tasks/exec-started", started(""), unknown("c", "")),
            ("/tasks/exit", exit("c", AT), exited("", at(AT).into_option())),
            ("/tasks/exit", exit("", AT), exited("", at(AT).into_option())),
            ("/tasks/exit", exit("e", AT), exited("e", at(AT).into_option())),
            ("/tasks/exit", exit("e", MAX_SECOND), exited("e", None)),
            ("/tasks/exit", exit("e", AT - 3600), exited("e", None)),
            ("/tasks/exit", exit("e", AT + 61), exited("e", at(AT + 61).into_option())),
            ("/tasks/exit", exit("e", AT + 62), exited("e", None)),
            ("/tasks/exit", exit("e", -1), exited("e", None)),
            ("/tasks/exit", exit("x", AT), unknown("c", "x")),
            ("/tasks/delete", delete.clone(), Ok(TaskChange::Deleted { pid: 7, status: 3, at: None })),
            ("/tasks/delete", with_unknown_field(delete), Ok(TaskChange::Deleted { pid: 7, status: 3, at: None })),
            ("/tasks/checkpointed", oom.clone(), Err(InvalidEvent::UnknownTopic("/tasks/checkpointed".into()))),
            ("", oom, Err(InvalidEvent::UnknownTopic(String::new()))),
        ];
        for (topic, value, expected) in table {
            assert_eq!(parse_here(&event(topic, value.clone())), expected, "{topic} {value:?}");
        }
    }

    #[test]
    fn undecodable_and_oversized_events_are_rejected() {
        for topic in [
            "/tasks/create",
            "/tasks/start",
            "/tasks/oom",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/paused",
            "/tasks/resumed",
            "/tasks/exit",
            "/tasks/delete",
        ] {
            // Field 1, a string of 200 bytes, all of which are missing.
            let rejected = parse_here(&event(topic, vec![0x0a, 200, 1])).unwrap_err();
            assert!(matches!(rejected, InvalidEvent::Undecodable { .. }), "{topic}: {rejected:?}");
        }
        let long = |length: usize| TaskOOM { container_id: "c".repeat(length), ..Default::default() };
        let rejected = parse_here(&event("/tasks/oom", encoded(&long(MAX_SIZE)))).unwrap_err();
        assert!(matches!(rejected, InvalidEvent::TooLarge(size) if size > MAX_SIZE as u64), "{rejected:?}");
        let rejected = parse_here(&event(&"/".repeat(MAX_SIZE), Vec::new())).unwrap_err();
        assert!(matches!(rejected, InvalidEvent::TooLarge(_)), "{rejected:?}");
        assert!(matches!(
            parse_here(&event("/tasks/oom", encoded(&long(MAX_SIZE / 2)))),
            Err(InvalidEvent::UnknownProcess { .. })
        ));
    }

    #[test]
    fn impossible_times_are_dropped_and_impossible_statuses_replaced() {
        let now = at(AT).unwrap();
        let parsed_time = |timestamp| {
            let oom = TaskOOM { container_id: "c".into(), ..Default::default() };
            parse(&Event { timestamp, ..event("/tasks/oom", encoded(&oom)) }, &now, |_, _| true).unwrap().at
        };
        assert_eq!(parsed_time(at(AT)), at(AT).into_option());
        assert_eq!(parsed_time(at(MAX_SECOND + 1)), None);
        assert_eq!(parsed_time(MessageField::none()), None);
        let nanos = Timestamp { seconds: AT, nanos: 1_000_000_000, ..Default::default() };
        assert_eq!(parsed_time(MessageField::some(nanos)), None);
        assert_eq!([0, 137, 255, 256, u32::MAX].map(valid_status), [0, 137, 255, 255, 255]);
        // A clock of the host beyond the range does not widen it.
        assert_eq!(valid_time(at(MAX_SECOND + 1).as_ref(), &at(i64::MAX).unwrap()), None);
    }
}
