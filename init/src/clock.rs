//! The clock that starts with the kernel.

use nix::time::{ClockId, clock_gettime};

/// CLOCK_BOOTTIME, nanoseconds.
pub(crate) fn boottime_ns() -> u64 {
    // Cannot fail: every kernel that this init runs on has the clock (Linux 2.6.39).
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}
