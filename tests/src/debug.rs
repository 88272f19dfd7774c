//! What an operator does with a VM in debug mode: run commands in it, and crash it on purpose.

use std::time::Duration;

use anyhow::Result;

use crate::command::{self, Output};
use crate::containerd::Containerd;
use crate::operator;

/// Flags of `ctr run` that create a sandbox in debug mode.
pub const IN_DEBUG_MODE: [&str; 2] = ["--annotation", "io.husk.debug=true"];
/// Deadline for one command, on a loaded machine that emulates its guests.
const DEADLINE: Duration = Duration::from_secs(90);

/// Runs a command in the sandbox's VM, without a terminal, until it exits.
pub fn run_in_vm(containerd: &Containerd, id: &str, args: &[&str], stdin: Option<Vec<u8>>) -> Result<Output> {
    let arguments: Vec<&str> = ["exec", id, "--"].iter().chain(args).copied().collect();
    command::run(operator::command(containerd, &arguments)?, stdin, DEADLINE)
}

/// Makes the guest's kernel panic. Returns the command's output; it cannot succeed.
pub fn panic_kernel(containerd: &Containerd, id: &str) -> Result<Output> {
    run_in_vm(containerd, id, &["sh", "-c", "echo c > /proc/sysrq-trigger"], None)
}
