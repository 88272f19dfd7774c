//! What the guest tells of a container, as far as it is believed. Pure.
//!
//! containerd's clients decode whatever type they are told, and act on whatever id stands in it. So nothing of the guest's bytes goes on: an
//! event is read as the message that its topic says it is, what is needed is taken out, and the shim makes its own message of that.

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::topics;
use husk_protos::events::Event;
use protobuf::Message;
use protobuf::well_known_types::timestamp::Timestamp;

/// Most bytes of an event. The largest that an honest guest sends, a TaskCreate, has some hundred.
const LARGEST: usize = 4096;
/// Seconds of the last moment of the year 9999, where a Timestamp's range ends (protobuf's timestamp.proto). What is outside of it breaks
/// clients: Go's JSON refuses such a year.
const LAST_SECOND: i64 = 253_402_300_799;

/// What has happened to a container.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// Its id.
    pub container: String,
    /// When, by the guest's clock; none if that makes no sense.
    pub at: Option<Timestamp>,
    /// What.
    pub news: News,
}

/// What can happen. An empty exec id stands for the init. Only what the shim does not know better itself is in it.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    /// The init is there, and waits for its start.
    Created {
        /// Its pid.
        pid: u32,
    },
    /// The init runs.
    Started {
        /// Its pid.
        pid: u32,
    },
    /// Something was killed for want of memory.
    OutOfMemory,
    /// An exec is known.
    ExecAdded {
        /// Its id.
        exec: String,
    },
    /// An exec runs.
    ExecStarted {
        /// Its id.
        exec: String,
        /// Its pid.
        pid: u32,
    },
    /// All processes stand still.
    Paused,
    /// They go on.
    Resumed,
    /// A process has ended.
    Exited {
        /// Its id.
        exec: String,
        /// Its pid.
        pid: u32,
        /// How.
        status: u32,
        /// When; none if that makes no sense.
        at: Option<Timestamp>,
    },
    /// The container is no more.
    Deleted {
        /// The init's pid.
        pid: u32,
        /// How the init ended.
        status: u32,
        /// When; none if that makes no sense.
        at: Option<Timestamp>,
    },
}

impl News {
    /// The exec that it is about; empty for the init and for the container.
    pub fn exec(&self) -> &str {
        match self {
            Self::ExecAdded { exec } | Self::ExecStarted { exec, .. } | Self::Exited { exec, .. } => exec,
            _ => "",
        }
    }
}

/// Why an event is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not even its topic is worth being looked at.
    #[error("it has {0} bytes")]
    TooLarge(u64),
    /// No topic of a task's event.
    #[error("its topic is {0:?}")]
    Topic(String),
    /// It cannot be decoded as what its topic says it is.
    #[error("it is no {topic}: {problem}")]
    Garbled {
        /// The topic.
        topic: &'static str,
        /// The decoder's words.
        problem: String,
    },
    /// It is about a process that is none of the sandbox's, or no longer.
    #[error("process {exec:?} of container {container:?} is not known")]
    Unknown {
        /// The container.
        container: String,
        /// The exec; empty for the init.
        exec: String,
    },
}

/// Reads an event of the guest's. `knows` says whether there is such a container with such an exec, or with its init for an empty id.
///
/// # Errors
/// Why it is not believed.
pub fn read(event: &Event, knows: impl Fn(&str, &str) -> bool) -> Result<Told, Refused> {
    let size = event.compute_size();
    if size > LARGEST as u64 {
        return Err(Refused::TooLarge(size));
    }
    let bytes = event.event.value.as_slice();
    let (container, news) = match event.topic.as_str() {
        topics::TASK_CREATE_EVENT_TOPIC => {
            let event: TaskCreate = parse(bytes)?;
            (event.container_id, News::Created { pid: event.pid })
        }
        topics::TASK_START_EVENT_TOPIC => {
            let event: TaskStart = parse(bytes)?;
            (event.container_id, News::Started { pid: event.pid })
        }
        topics::TASK_OOM_EVENT_TOPIC => (parse::<TaskOOM>(bytes)?.container_id, News::OutOfMemory),
        topics::TASK_EXEC_ADDED_EVENT_TOPIC => {
            let event: TaskExecAdded = parse(bytes)?;
            (event.container_id, News::ExecAdded { exec: event.exec_id })
        }
        topics::TASK_EXEC_STARTED_EVENT_TOPIC => {
            let event: TaskExecStarted = parse(bytes)?;
            (event.container_id, News::ExecStarted { exec: event.exec_id, pid: event.pid })
        }
        topics::TASK_PAUSED_EVENT_TOPIC => (parse::<TaskPaused>(bytes)?.container_id, News::Paused),
        topics::TASK_RESUMED_EVENT_TOPIC => (parse::<TaskResumed>(bytes)?.container_id, News::Resumed),
        topics::TASK_EXIT_EVENT_TOPIC => {
            let TaskExit { container_id, id, pid, exit_status: status, exited_at, .. } = parse(bytes)?;
            // The init goes by its container's id here.
            let exec = if id == container_id { String::new() } else { id };
            (container_id, News::Exited { exec, pid, status, at: moment(exited_at.as_ref()) })
        }
        topics::TASK_DELETE_EVENT_TOPIC => {
            let TaskDelete { container_id, pid, exit_status: status, exited_at, .. } = parse(bytes)?;
            (container_id, News::Deleted { pid, status, at: moment(exited_at.as_ref()) })
        }
        other => return Err(Refused::Topic(other.to_owned())),
    };
    let exec = news.exec();
    // An exec without an id would pass for the init.
    let nameless = exec.is_empty() && matches!(news, News::ExecAdded { .. } | News::ExecStarted { .. });
    if nameless || !knows(&container, exec) {
        return Err(Refused::Unknown { exec: exec.to_owned(), container });
    }
    Ok(Told { container, at: moment(event.timestamp.as_ref()), news })
}

fn parse<M: Message>(bytes: &[u8]) -> Result<M, Refused> {
    M::parse_from_bytes(bytes).map_err(|error| Refused::Garbled { topic: M::NAME, problem: error.to_string() })
}

/// A moment without what a hostile guest may have put beside it, if it is one.
fn moment(at: Option<&Timestamp>) -> Option<Timestamp> {
    let at = at?;
    let is_one = (0..=LAST_SECOND).contains(&at.seconds) && (0..1_000_000_000).contains(&at.nanos);
    is_one.then(|| Timestamp { seconds: at.seconds, nanos: at.nanos, ..Default::default() })
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
        // The type is not looked at: the topic says what it is.
        let any = Any { type_url: "evil.Type".into(), value, ..Default::default() };
        Event { topic: topic.into(), timestamp: at(AT), event: MessageField::some(any), ..Default::default() }
    }

    fn encoded(message: &impl Message) -> Vec<u8> {
        message.write_to_bytes().unwrap()
    }

    /// There is one container, with one exec.
    fn read_here(event: &Event) -> Result<News, Refused> {
        let told = read(event, |container, exec| container == "c" && ["", "e"].contains(&exec))?;
        assert_eq!((told.container.as_str(), told.at), ("c", at(AT).into_option()));
        Ok(told.news)
    }

    #[test]
    fn an_event_is_what_its_topic_says_or_nothing() {
        let unknown = |container: &str, exec: &str| {
            Err(Refused::Unknown { container: container.to_owned(), exec: exec.to_owned() })
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
        let exited = |exec: &str, at: Option<Timestamp>| Ok(News::Exited { exec: exec.into(), pid: 7, status: 3, at });
        let added = |exec_id: &str| {
            encoded(&TaskExecAdded { container_id: c(), exec_id: exec_id.into(), ..Default::default() })
        };
        let started = |exec_id: &str| {
            encoded(&TaskExecStarted { container_id: c(), exec_id: exec_id.into(), pid: 7, ..Default::default() })
        };
        let delete = encoded(&TaskDelete { container_id: c(), pid: 7, exit_status: 3, ..Default::default() });
        // Field 15, a string, which no event has.
        let with_more = |mut bytes: Vec<u8>| {
            bytes.extend([0x7a, 2, b'h', b'i']);
            bytes
        };
        let oom = encoded(&TaskOOM { container_id: c(), ..Default::default() });
        let table = [
            ("/tasks/create", create("c"), Ok(News::Created { pid: 7 })),
            ("/tasks/create", create("other"), unknown("other", "")),
            ("/tasks/create", create(""), unknown("", "")),
            (
                "/tasks/start",
                encoded(&TaskStart { container_id: c(), pid: 7, ..Default::default() }),
                Ok(News::Started { pid: 7 }),
            ),
            ("/tasks/oom", oom.clone(), Ok(News::OutOfMemory)),
            ("/tasks/oom", with_more(oom.clone()), Ok(News::OutOfMemory)),
            ("/tasks/paused", encoded(&TaskPaused { container_id: c(), ..Default::default() }), Ok(News::Paused)),
            ("/tasks/resumed", encoded(&TaskResumed { container_id: c(), ..Default::default() }), Ok(News::Resumed)),
            ("/tasks/exec-added", added("e"), Ok(News::ExecAdded { exec: e() })),
            ("/tasks/exec-added", with_more(added("e")), Ok(News::ExecAdded { exec: e() })),
            ("/tasks/exec-added", added("x"), unknown("c", "x")),
            ("/tasks/exec-added", added(""), unknown("c", "")),
            ("/tasks/exec-started", started("e"), Ok(News::ExecStarted { exec: e(), pid: 7 })),
            ("/tasks/exec-started", started("x"), unknown("c", "x")),
            ("/tasks/exec-started", started(""), unknown("c", "")),
            ("/tasks/exit", exit("c", AT), exited("", at(AT).into_option())),
            ("/tasks/exit", exit("", AT), exited("", at(AT).into_option())),
            ("/tasks/exit", exit("e", AT), exited("e", at(AT).into_option())),
            ("/tasks/exit", exit("e", LAST_SECOND + 1), exited("e", None)),
            ("/tasks/exit", exit("e", -1), exited("e", None)),
            ("/tasks/exit", exit("x", AT), unknown("c", "x")),
            ("/tasks/delete", delete.clone(), Ok(News::Deleted { pid: 7, status: 3, at: None })),
            ("/tasks/delete", with_more(delete), Ok(News::Deleted { pid: 7, status: 3, at: None })),
            ("/tasks/checkpointed", oom.clone(), Err(Refused::Topic("/tasks/checkpointed".into()))),
            ("", oom, Err(Refused::Topic(String::new()))),
        ];
        for (topic, value, wanted) in table {
            assert_eq!(read_here(&event(topic, value.clone())), wanted, "{topic} {value:?}");
        }
    }

    #[test]
    fn what_cannot_be_decoded_or_is_too_large_is_refused() {
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
            // Field 1, a string of 200 bytes, of which there are none.
            let refused = read_here(&event(topic, vec![0x0a, 200, 1])).unwrap_err();
            assert!(matches!(refused, Refused::Garbled { .. }), "{topic}: {refused:?}");
        }
        let long = |length: usize| TaskOOM { container_id: "c".repeat(length), ..Default::default() };
        let refused = read_here(&event("/tasks/oom", encoded(&long(LARGEST)))).unwrap_err();
        assert!(matches!(refused, Refused::TooLarge(size) if size > LARGEST as u64), "{refused:?}");
        let refused = read_here(&event(&"/".repeat(LARGEST), Vec::new())).unwrap_err();
        assert!(matches!(refused, Refused::TooLarge(_)), "{refused:?}");
        assert!(matches!(read_here(&event("/tasks/oom", encoded(&long(LARGEST / 2)))), Err(Refused::Unknown { .. })));
    }

    #[test]
    fn a_moment_without_sense_is_none() {
        let told = |timestamp| {
            let oom = TaskOOM { container_id: "c".into(), ..Default::default() };
            read(&Event { timestamp, ..event("/tasks/oom", encoded(&oom)) }, |_, _| true).unwrap().at
        };
        assert_eq!(told(at(AT)), at(AT).into_option());
        assert_eq!(told(at(LAST_SECOND + 1)), None);
        assert_eq!(told(MessageField::none()), None);
        let nanos = Timestamp { seconds: AT, nanos: 1_000_000_000, ..Default::default() };
        assert_eq!(told(MessageField::some(nanos)), None);
    }
}
