//! What an operator does with a VM in debug mode: commands in it, and its end on purpose.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::artifacts::built;
use crate::command::{self, Output};
use crate::containerd::Containerd;

/// What makes `ctr run` create a sandbox that may be looked into.
pub const IN_DEBUG_MODE: [&str; 2] = ["--annotation", "io.husk.debug=true"];
/// For one command, on a machine that emulates its guests and has other work.
const DEADLINE: Duration = Duration::from_secs(90);

/// `husk` with these arguments, in the daemon's namespaces.
pub fn husk(containerd: &Containerd, args: &[&str]) -> Result<Command> {
    let mut command = containerd.enter(built("husk")?);
    command.args(args);
    Ok(command)
}

/// Runs a command in the VM of this sandbox, without a terminal, to its end.
pub fn run_in_vm(containerd: &Containerd, id: &str, args: &[&str], stdin: Option<Vec<u8>>) -> Result<Output> {
    let words: Vec<&str> = ["exec", id, "--"].iter().chain(args).copied().collect();
    command::run(husk(containerd, &words)?, stdin, DEADLINE)
}

/// Has the guest's kernel panic. What the command ended with: it cannot end well.
pub fn panic_kernel(containerd: &Containerd, id: &str) -> Result<Output> {
    run_in_vm(containerd, id, &["sh", "-c", "echo c > /proc/sysrq-trigger"], None)
}
