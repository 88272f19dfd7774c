//! Programs that go on when their caller exits: started by a process in between, so that they belong neither to the
//! process that wants them nor to its cgroup.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use super::child;

/// A program without streams, in the root directory, with a request as JSON in the environment variable `name`.
///
/// # Errors
/// The request cannot be encoded.
pub(crate) fn command(program: &Path, action: &str, name: &str, request: &impl Serialize) -> io::Result<Command> {
    let mut command = Command::new(program);
    command.arg(action).env(name, serde_json::to_string(request)?).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command)
}

/// Has the program join `cgroups` by their open `cgroup.procs` files.
pub(crate) fn join(command: &mut Command, cgroups: Vec<File>) -> &mut Command {
    // SAFETY: `join` only writes to open files, which is async-signal-safe.
    unsafe { command.pre_exec(move || child::join(&cgroups)) }
}

/// Starts the program in a session of its own. The caller exits, and leaves it to the init process.
///
/// # Errors
/// The program cannot be run.
pub(crate) fn start(mut command: Command) -> io::Result<()> {
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        })
    };
    command.spawn().map(drop)
}
