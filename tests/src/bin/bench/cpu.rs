//! The CPU time that calls take: that of the clients, of containerd and its shims, and of everything that these start.

use anyhow::Result;
use husk_tests::containerd::Containerd;
use husk_tests::process::{Process, descendants};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// The length of a clock tick in `/proc`, ms: USER_HZ is 100 (proc_pid_stat(5)).
pub(crate) const MS_PER_TICK: f64 = 10.0;

/// CPU time since some start, in milliseconds, to a clock tick of each process.
pub(crate) struct Cpu {
    daemon: i32,
    at_start: f64,
}

impl Cpu {
    /// Starts to count.
    pub(crate) fn start(containerd: &Containerd) -> Result<Self> {
        let daemon = containerd.pid();
        Ok(Self { daemon, at_start: now(daemon)? })
    }

    /// What was used since the start, in milliseconds.
    pub(crate) fn used(&self) -> Result<f64> {
        Ok(now(self.daemon)? - self.at_start)
    }
}

/// The time of this process's children that have ended, and that of the daemon's tree. A process that has ended counts as
/// long as its parent, or the one that inherits it, is in the tree.
fn now(daemon: i32) -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let clients = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    let tree = descendants(daemon).into_iter().chain(Process::read(daemon));
    let ticks: u64 = tree.map(|process| process.cpu_ticks()).sum();
    Ok(clients as f64 / 1000.0 + ticks as f64 * MS_PER_TICK)
}
