//! Where the guest's console is served: the result of `compute.vm.console.endpoint`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The console of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The unix socket.
    pub path: PathBuf,
    /// The file that keeps the console's output.
    pub log: PathBuf,
    /// The machine behind the console.
    pub machine: Line,
    /// How much earlier output a new client receives, bytes.
    pub replay_bytes: usize,
}

/// The machine's end of the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// No machine has been started yet.
    Unused,
    /// The machine is connected.
    Up,
    /// The machine has ended.
    Ended,
}
