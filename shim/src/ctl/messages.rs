//! Parameters, notifications and results of the methods, as the shim and `husk` exchange them. (The status itself is in
//! `state::status`.)
//!
//! The shim rejects unknown parameters. Readers of notifications and results ignore unknown fields, because the shim
//! may be older. A notification of an unknown kind is an error.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::state::recent;
use crate::state::recent::EventKind;
use crate::state::status::Name;

/// The parameters of a method that has none.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct NoParams {}

/// Parameters of `compute.vm.events.tail`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EventsParams {
    /// The number of the last event that the client has; 0 for none.
    pub after: u64,
    /// Send future events too.
    pub follow: bool,
}

/// An event of a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Starts at 1 and grows by one. `None` for a state change that was read from disk.
    #[serde(default)]
    pub number: Option<u64>,
    /// When, milliseconds since the epoch.
    #[serde(default)]
    pub at_ms: Option<u64>,
    /// The event's subject.
    pub kind: Name<EventKind>,
    /// A description.
    #[serde(default)]
    pub what: String,
    /// The particulars.
    #[serde(default)]
    pub fields: Map<String, Value>,
}

impl From<recent::Event> for Event {
    fn from(event: recent::Event) -> Self {
        let fields = match event.fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        Self {
            number: Some(event.number),
            at_ms: Some(event.at_ms),
            kind: Name::Known(event.kind),
            what: event.what,
            fields,
        }
    }
}

/// A notification of `compute.vm.events.tail`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventsPart {
    /// Events in order.
    pub events: Vec<Event>,
    /// How many events before the first are not kept any more.
    pub forgotten: u64,
}

/// The result of `compute.vm.events.tail`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventsEnd {
    /// The number of the last event.
    pub last: u64,
    /// The sandbox has ended.
    pub ended: bool,
}

/// A log of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// The serial console.
    Console,
    /// The init's log.
    Init,
}

impl LogSource {
    /// Both, in the order in which they are printed.
    pub const ALL: [Self; 2] = [Self::Console, Self::Init];

    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Init => "init",
        }
    }
}

/// Parameters of `compute.vm.logs`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogsParams {
    /// Only this log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<LogSource>,
    /// Only the last lines of each log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lines: Option<usize>,
    /// Send future lines too.
    pub follow: bool,
}

/// A notification of `compute.vm.logs`: lines, or a gap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogsPart {
    /// The log.
    pub source: LogSource,
    /// Lines as the guest wrote them, control characters included. Absent from the JSON of a gap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<String>,
    /// Bytes that were lost because the client read too slowly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<u64>,
}

/// The result of `compute.vm.logs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogsEnd {
    /// The sandbox has ended.
    pub ended: bool,
}

/// Bytes of input that a client of `compute.vm.exec` may send before the guest takes them.
pub const EXEC_INPUT_AHEAD: usize = 256 * 1024;

/// Parameters of `compute.vm.exec`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecParams {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// The environment, NAME=VALUE.
    #[serde(default)]
    pub env: Vec<String>,
    /// The working directory; empty for /.
    #[serde(default)]
    pub cwd: String,
    /// Give the process a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// The terminal's lines.
    #[serde(default)]
    pub rows: u16,
    /// The terminal's columns.
    #[serde(default)]
    pub columns: u16,
    /// Give the process a stdin.
    #[serde(default)]
    pub stdin: bool,
}

/// Parameters of the client's notification `exec.input`: data, or the end of the input.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExecInputParams {
    /// Base64.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub data: String,
    /// The input ends.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub end: bool,
}

/// Parameters of the client's notification `exec.resize`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecResizeParams {
    /// The terminal's lines.
    pub rows: u16,
    /// The terminal's columns.
    pub columns: u16,
}

/// Parameters of the client's notification `exec.signal`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSignalParams {
    /// The signal's number. The process group receives it.
    pub signal: u32,
}

/// A notification of `compute.vm.exec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ExecPart {
    /// The guest has taken input.
    Taken {
        /// Bytes.
        taken: usize,
    },
    /// The process has written output.
    Output {
        /// Where to.
        stream: ExecStream,
        /// Base64.
        data: String,
    },
}

/// An output stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecStream {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The result of `compute.vm.exec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecEnd {
    /// The process's exit status, or 128 plus the number of the signal that killed it.
    pub exit_code: u8,
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;
    use serde_json::json;

    use super::*;

    /// Reads `json` as a `T`, which is the same JSON when it is written again.
    fn same<T: Serialize + DeserializeOwned>(json: Value) {
        let message: T = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(message).unwrap(), json);
    }

    #[test]
    fn messages_have_the_json_of_earlier_versions() {
        let event =
            json!({"number": 3, "at_ms": 7, "kind": "vm", "what": "the VM's state", "fields": {"to": "Failed"}});
        same::<EventsPart>(json!({"events": [event], "forgotten": 2}));
        same::<Event>(json!({"number": null, "at_ms": 7, "kind": "weather", "what": "rain", "fields": {}}));
        same::<EventsEnd>(json!({"last": 9, "ended": true}));
        same::<LogsPart>(json!({"source": "console", "lines": ["a\u{1b}"]}));
        same::<LogsPart>(json!({"source": "init", "missed": 4096}));
        same::<LogsEnd>(json!({"ended": false}));
        same::<LogsParams>(json!({"follow": true}));
        same::<LogsParams>(json!({"follow": false, "source": "init", "lines": 3}));
        same::<ExecInputParams>(json!({"data": "AA=="}));
        same::<ExecInputParams>(json!({"end": true}));
        same::<ExecPart>(json!({"taken": 7}));
        same::<ExecPart>(json!({"stream": "stderr", "data": "AA=="}));
        same::<ExecEnd>(json!({"exit_code": 137}));
        same::<ExecParams>(json!({"args": ["sh"], "env": [], "cwd": "/", "terminal": true, "rows": 24, "columns": 80,
            "stdin": true}));
    }
}
