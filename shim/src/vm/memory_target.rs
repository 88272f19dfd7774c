//! What a balloon leaves a guest.

use std::sync::atomic::{AtomicBool, Ordering};

/// The memory that a guest is to get by with. It has all until its first container has started, which the guest's work for
/// the balloon would delay.
#[derive(Debug)]
pub(super) struct MemoryTarget {
    /// MiB, less than the guest has.
    mib: Option<u64>,
    /// Somebody has set it.
    set: AtomicBool,
}

impl MemoryTarget {
    /// The target of a guest that boots with `memory_mib` MiB.
    pub(super) fn new(configured: Option<u64>, memory_mib: u64) -> Self {
        Self { mib: configured.filter(|target| *target < memory_mib), set: AtomicBool::new(false) }
    }

    /// MiB.
    pub(super) fn mib(&self) -> Option<u64> {
        self.mib
    }

    /// The target, for the first caller, who sets it.
    pub(super) fn claim(&self) -> Option<u64> {
        self.mib.filter(|_| !self.set.swap(true, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_below_the_vms_memory_is_set_once() {
        for (configured, expected) in [(None, None), (Some(200), Some(200)), (Some(512), None), (Some(600), None)] {
            let target = MemoryTarget::new(configured, 512);
            assert_eq!((target.mib(), target.claim(), target.claim()), (expected, expected, None), "{configured:?}");
        }
    }
}
