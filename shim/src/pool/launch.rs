//! Starts shims that wait: by a process in between, so that they belong neither to the process that wants them nor to
//! its cgroup.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use super::request::PoolRequest;
use crate::config::names::PLACED_ENV;
use crate::host::background;

/// The action of the process that starts shims that wait.
pub const FILL: &str = "fill-pool";
/// The action of a shim that waits.
pub const WAIT: &str = "wait-in-pool";
/// The environment variable with the kind of VM that is to wait, JSON. Without it, the configuration decides.
const REQUEST: &str = "HUSK_POOL_REQUEST";

/// The kind of VM that this process is to boot or have booted.
///
/// # Errors
/// The environment variable is not JSON.
pub(crate) fn requested() -> io::Result<PoolRequest> {
    match std::env::var(REQUEST) {
        Ok(text) => Ok(serde_json::from_str(&text)?),
        Err(std::env::VarError::NotPresent) => Ok(PoolRequest::default()),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Fills the pool with VMs of this kind, and returns when their shims have been started. They boot in the background.
/// `program` is the shim's; the process joins `cgroups` by their open `cgroup.procs` files. Blocks.
///
/// # Errors
/// The program cannot be run.
pub fn fill(program: &Path, request: &PoolRequest, cgroups: Vec<File>) -> io::Result<ExitStatus> {
    let mut command = command(program, FILL, request)?;
    background::join(&mut command, cgroups).stderr(Stdio::inherit()).status()
}

/// Starts a shim that waits, in a session of its own.
///
/// # Errors
/// The program cannot be run.
pub(crate) fn wait(program: &Path, request: &PoolRequest) -> io::Result<()> {
    background::start(command(program, WAIT, request)?)
}

fn command(program: &Path, action: &str, request: &PoolRequest) -> io::Result<Command> {
    let mut command = background::command(program, action, REQUEST, request)?;
    command.env_remove(PLACED_ENV);
    Ok(command)
}
