//! When the guest reached each boot step, by the clock that starts with the kernel.

use husk_protos::system::{BootStep, Milestone};

use crate::clock::boottime_ns;

/// Boot milestones in order.
#[derive(Debug, Default, Clone)]
pub(crate) struct Timeline(Vec<Milestone>);

impl Timeline {
    /// Records that the guest has reached a step.
    pub(crate) fn mark(&mut self, step: BootStep) {
        self.0.push(Milestone { step: step.into(), boottime_ns: boottime_ns(), ..Default::default() });
    }

    pub(crate) fn milestones(&self) -> &[Milestone] {
        &self.0
    }
}
