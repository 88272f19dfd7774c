//! The clock that starts with the kernel, and the wall clock, which the host corrects.

use std::io;

use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

const US_PER_S: i64 = 1_000_000;

/// CLOCK_BOOTTIME, nanoseconds.
pub(crate) fn boottime_ns() -> u64 {
    now_ns(ClockId::CLOCK_BOOTTIME)
}

/// CLOCK_REALTIME, nanoseconds.
pub(crate) fn realtime_ns() -> u64 {
    now_ns(ClockId::CLOCK_REALTIME)
}

fn now_ns(clock: ClockId) -> u64 {
    // Cannot fail: every kernel that this init runs on has both clocks (Linux 2.6.39).
    clock_gettime(clock).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Adds to the wall clock, at once or gradually (adjtimex(2)).
///
/// # Errors
/// Those of the kernel, which rejects times before 1970.
pub(crate) fn adjust(by_ns: i64, gradually: bool) -> io::Result<()> {
    // SAFETY: timex is plain data, for which all zeroes are valid.
    let mut request: libc::timex = unsafe { std::mem::zeroed() };
    // Not in nanoseconds: with ADJ_NANO, the kernel would switch to them for every program that calls adjtimex.
    let by_us = by_ns / 1000;
    if gradually {
        request.modes = libc::ADJ_OFFSET_SINGLESHOT;
        request.offset = by_us;
    } else {
        request.modes = libc::ADJ_SETOFFSET;
        request.time.tv_sec = by_us.div_euclid(US_PER_S);
        request.time.tv_usec = by_us.rem_euclid(US_PER_S);
    }
    // SAFETY: adjtimex reads and writes one timex, which outlives the call.
    Errno::result(unsafe { libc::adjtimex(&raw mut request) })?;
    Ok(())
}
