//! What an operator does with a VM in debug mode: commands in it, and its end on purpose.

use std::time::Duration;

use anyhow::Result;

use crate::command::{self, Output};
use crate::containerd::Containerd;
use crate::operator;

/// What makes `ctr run` create a sandbox that may be looked into.
pub const IN_DEBUG_MODE: [&str; 2] = ["--annotation", "io.husk.debug=true"];
/// For one command, on a machine that emulates its guests and has other work.
const DEADLINE: Duration = Duration::from_secs(90);

/// Runs a command in the VM of this sandbox, without a terminal, to its end.
pub fn run_in_vm(containerd: &Containerd, id: &str, args: &[&str], stdin: Option<Vec<u8>>) -> Result<Output> {
    let words: Vec<&str> = ["exec", id, "--"].iter().chain(args).copied().collect();
    command::run(operator::command(containerd, &words)?, stdin, DEADLINE)
}

/// Has the guest's kernel panic. What the command ended with: it cannot end well.
pub fn panic_kernel(containerd: &Containerd, id: &str) -> Result<Output> {
    run_in_vm(containerd, id, &["sh", "-c", "echo c > /proc/sysrq-trigger"], None)
}
