//! When each step of the boot was reached, by the clock that starts with the kernel.

use husk_protos::system::Milestone;
use nix::time::{ClockId, clock_gettime};

/// Milestones in the order in which they happened. Their names, for who greps: `init` (first instruction of PID 1's main), `mounts`,
/// `cgroups`, `system` (network, limits, entropy), `extras` (written, if there are any), `listening` (all vsock ports), `ready` (about to say hello).
#[derive(Debug, Default, Clone)]
pub struct Timeline(Vec<Milestone>);

impl Timeline {
    /// Adds a milestone that is reached now.
    pub fn mark(&mut self, name: &str) {
        self.0.push(Milestone { name: name.into(), boottime_ns: boottime_ns(), ..Default::default() });
    }

    /// The milestones so far.
    pub fn milestones(&self) -> &[Milestone] {
        &self.0
    }
}

/// CLOCK_BOOTTIME in nanoseconds.
pub fn boottime_ns() -> u64 {
    // The clock exists on every kernel that this init boots on (2.6.39); there is no other way for the call to fail.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}
