//! The re-executed, single-threaded side of the init: the only place where libcontainer runs.
//!
//! libcontainer clones with raw syscalls, changes the working directory and writes its caller's oom_score_adj: in PID 1 it would be
//! a hazard. So each operation gets a process of its own (`/proc/self/exe`, told apart by its argv[0]), which answers one request and ends.
//! Its container processes are PID 1's children (`as_sibling`).
//!
//! [`client`] is PID 1's side, [`serve`] the worker's.

pub mod client;
pub mod console;
mod create;
mod devices;
mod exec;
mod executor;
mod guard;
mod hooks;
mod identity;
pub mod serve;
mod spec;
pub mod start;
mod update;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// argv[0] of a worker.
pub const NAME: &str = "husk-worker";

/// Descriptor of a worker's end of the socket pair.
const CONTROL_FD: i32 = 3;

/// Where a worker finds the gate of a process that gets a terminal; see [`console`].
const GATE_FD: i32 = 4;

/// Most bytes of a request or a reply. One message each way, kept whole by the socket (SOCK_SEQPACKET).
const MESSAGE_MAX: usize = 64 * 1024;

/// What a worker is asked to do. Its standard streams are the process's.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Make a container from a bundle; its init waits for its start.
    Create {
        /// Container.
        id: String,
        /// Folder of its config.json.
        bundle: PathBuf,
        /// Socket that takes its terminal, if it is to have one.
        console: Option<PathBuf>,
    },
    /// Start the init, and run the spec's startContainer and poststart hooks.
    Start {
        /// Container.
        id: String,
    },
    /// Run another process in a started container.
    Exec {
        /// Container.
        id: String,
        /// File with the process as the spec's `process`, in JSON.
        process: PathBuf,
        /// Socket that takes its terminal, if it is to have one.
        console: Option<PathBuf>,
    },
    /// Give a container other limits: those that its standard input names as the spec's `linux.resources`, in JSON.
    Update {
        /// Container.
        id: String,
    },
    /// Remove a container that has ended, and run the spec's poststop hooks.
    Delete {
        /// Container.
        id: String,
    },
}

/// What a worker answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The container is there.
    Created(Created),
    /// The process runs.
    Executed(Executed),
    /// Started, updated, or deleted.
    Done,
    /// Nothing was made, or what was made is gone again.
    Failed(Error),
}

/// What PID 1 has to know of a new container.
#[derive(Debug, Serialize, Deserialize)]
pub struct Created {
    /// Of its init, in the guest's pid namespace.
    pub pid: i32,
    /// The kernel ends all of its processes with its init.
    pub own_pid_namespace: bool,
    /// Start has to go through a worker.
    pub start_hooks: bool,
    /// Delete has to go through a worker.
    pub poststop_hooks: bool,
    /// What of the spec has no meaning in this guest and was left out: to be logged.
    pub ignored: Vec<String>,
}

/// What PID 1 has to know of a new process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Executed {
    /// In the guest's pid namespace.
    pub pid: i32,
    /// As in [`Created`].
    pub ignored: Vec<String>,
}
