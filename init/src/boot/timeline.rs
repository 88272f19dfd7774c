//! When each step of the boot was reached, by the clock that starts with the kernel.

use husk_protos::system::{BootStep, Milestone};
use nix::time::{ClockId, clock_gettime};

/// Milestones in the order in which they were reached.
#[derive(Debug, Default, Clone)]
pub struct Timeline(Vec<Milestone>);

impl Timeline {
    /// Adds a milestone that is reached now.
    pub fn mark(&mut self, step: BootStep) {
        self.0.push(Milestone { step: step.into(), boottime_ns: boottime_ns(), ..Default::default() });
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
