//! Workers: single-threaded processes that run libcontainer on behalf of PID 1.
//!
//! libcontainer clones with raw syscalls, changes the working directory and writes its caller's oom_score_adj, none of
//! which PID 1 can tolerate. So PID 1 starts a process (`/proc/self/exe`, distinguished by argv\[0\]) for each
//! operation. It serves one request and exits. Container processes become PID 1's children (`as_sibling`).
//!
//! [`client`] is PID 1's side, [`serve`] the worker's.

pub(crate) mod client;
pub(crate) mod console;
pub(crate) mod copy_back;
mod copy_up;
mod create;
mod devices;
mod exec;
mod executor;
mod guard;
mod hooks;
mod id_map;
mod identity;
mod libcontainer;
mod mounts;
mod namespaces;
pub(crate) mod serve;
mod spec;
mod stage;
pub(crate) mod start;
mod streams;
pub(crate) mod sysctls;
mod update;
pub(crate) mod user_namespace;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{CallError, FailureKind};

/// argv[0] of a worker.
pub(crate) const NAME: &str = "husk-worker";

/// Descriptor of a worker's end of the socket pair.
const CONTROL_FD: i32 = 3;

/// Descriptor of the gate in the worker of a process with a terminal; see [`console`].
const GATE_FD: i32 = 4;

/// Maximum size of a request or a reply in bytes. The socket (SOCK_SEQPACKET) keeps each message whole.
const MESSAGE_MAX: usize = 64 * 1024;

/// A request to a worker. The worker's standard streams are those of the process that it creates.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Create a container whose init waits for its start.
    Create {
        /// Container ID, as in all requests.
        id: String,
        bundle: PathBuf,
        /// Path of the socket that receives the terminal, if the init gets one.
        console: Option<PathBuf>,
    },
    /// Start the init, and run the spec's startContainer and poststart hooks.
    Start { id: String },
    /// Run another process in a container.
    Exec {
        id: String,
        /// File that contains the spec's `process` as JSON.
        process: PathBuf,
        /// Path of the socket that receives the terminal, if the process gets one.
        console: Option<PathBuf>,
    },
    /// Set the limits that stdin contains as JSON of the spec's `linux.resources`.
    Update { id: String },
    /// Remove a stopped container, and run the spec's poststop hooks.
    Delete { id: String },
    /// Apply the upper layer of an overlay to the filesystem below it.
    CopyBack { upper: copy_back::Folder, target: copy_back::Folder, images: Option<copy_back::Images> },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Created(Created),
    Executed(Executed),
    /// The container was started or deleted.
    Done,
    /// The container was updated. Names the limits that have no meaning in this guest, for the log.
    Updated(Vec<String>),
    /// The layer was applied, except what the report names.
    CopiedBack(copy_back::Report),
    /// The operation failed and left nothing behind.
    Failed(CallError),
}

impl Reply {
    /// The error for a reply that does not match its request.
    pub(crate) fn unexpected(self, operation: &str) -> CallError {
        CallError::new(FailureKind::Internal, format!("{operation}: unexpected reply of a worker: {self:?}"))
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Created {
    /// PID of the init in the guest's PID namespace.
    pub(crate) pid: i32,
    /// Whether the kernel kills all of the container's processes when its init exits.
    pub(crate) own_pid_namespace: bool,
    /// Whether the start runs hooks and therefore needs a worker.
    pub(crate) start_hooks: bool,
    /// Whether the deletion runs hooks and therefore needs a worker.
    pub(crate) poststop_hooks: bool,
    /// Parts of the spec that have no meaning in this guest and were ignored, for the log.
    pub(crate) ignored: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Executed {
    /// PID in the guest's PID namespace.
    pub(crate) pid: i32,
    /// See [`Created::ignored`].
    pub(crate) ignored: Vec<String>,
}
