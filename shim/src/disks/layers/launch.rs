//! Starts the builder: by a process in between, so that it belongs neither to the shim that requests images nor to its
//! sandbox's cgroup.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus};

use super::store::Store;
use crate::config::names::PLACED_ENV;
use crate::host::background;

/// The action of the process that starts the builder.
pub const ORDER: &str = "order-layers";
/// The action of the builder.
pub const BUILD: &str = "build-layers";
/// The environment variable with the store, JSON.
const STORE: &str = "HUSK_LAYER_STORE";

/// The store of this process.
pub(super) fn store() -> io::Result<Store> {
    let text = std::env::var(STORE).map_err(io::Error::other)?;
    Ok(serde_json::from_str(&text)?)
}

/// Starts a builder, and returns when it has been started. `program` is the shim's; the process joins `cgroups` by their
/// open `cgroup.procs` files. Blocks.
///
/// # Errors
/// The program cannot be run.
pub(crate) fn order(program: &Path, store: &Store, cgroups: Vec<File>) -> io::Result<ExitStatus> {
    background::join(&mut command(program, ORDER, store)?, cgroups).status()
}

/// Starts the builder in a session of its own, and leaves it to the init process.
///
/// # Errors
/// The environment has no store, or the program cannot be run.
pub fn start() -> io::Result<()> {
    background::start(command(&std::env::current_exe()?, BUILD, &store()?)?)
}

fn command(program: &Path, action: &str, store: &Store) -> io::Result<Command> {
    let mut command = background::command(program, action, STORE, store)?;
    command.env_remove(PLACED_ENV);
    Ok(command)
}
