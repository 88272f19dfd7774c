//! Starts the builder: by a process in between, so that it belongs neither to the shim that requests images nor to its
//! sandbox's cgroup.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use super::store::Store;
use crate::config::names::PLACED_ENV;
use crate::host::child;

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
    let mut command = command(program, ORDER, store)?;
    // SAFETY: `join` only writes to open files, which is async-signal-safe.
    unsafe { command.pre_exec(move || child::join(&cgroups)) };
    command.status()
}

/// Starts the builder in a session of its own, and leaves it to the init process.
///
/// # Errors
/// The environment has no store, or the program cannot be run.
pub fn start() -> io::Result<()> {
    let mut command = command(&std::env::current_exe()?, BUILD, &store()?)?;
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        })
    };
    command.spawn().map(drop)
}

fn command(program: &Path, action: &str, store: &Store) -> io::Result<Command> {
    let mut command = Command::new(program);
    command.arg(action).env(STORE, serde_json::to_string(store)?).env_remove(PLACED_ENV).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command)
}
