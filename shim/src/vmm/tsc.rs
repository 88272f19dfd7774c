//! The frequency of the host's time stamp counter. A guest under TCG reads the host's counter. If the guest knows the
//! frequency, it need not measure the counter against an emulated timer, which takes a quarter of a second and may
//! hang.
//!
//! The flags are not read through `procfs`, which panics on a `/proc/cpuinfo` without processors.

use std::sync::LazyLock;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Minimum time between the two readings. A reading is off by some tens of nanoseconds, so the result is accurate to
/// about 10 ppm. Without the frequency, the guest takes fifty times as long.
const MIN_INTERVAL: Duration = Duration::from_millis(5);
/// The narrowest of this many readings counts: the process may be interrupted during any of them.
const ATTEMPTS: usize = 5;

/// NTP adjusts neither this clock nor the guest's view of the counter.
const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC_RAW;

struct Reading {
    ticks: u64,
    at: Duration,
}

/// The first reading, taken by the first call of [`begin`].
static FIRST: LazyLock<Option<Reading>> = LazyLock::new(|| if counter_is_constant() { read() } else { None });

/// Takes the first reading. The earlier, the more accurate [`khz`] is.
pub fn begin() {
    LazyLock::force(&FIRST);
}

/// The frequency in kHz; none if the counter's rate varies. Blocks until [`MIN_INTERVAL`] after [`begin`], which has
/// usually passed.
pub(crate) fn khz() -> Option<u64> {
    let first = FIRST.as_ref()?;
    let elapsed = Duration::from(clock_gettime(CLOCK).ok()?).checked_sub(first.at)?;
    std::thread::sleep(MIN_INTERVAL.saturating_sub(elapsed));
    let now = read()?;
    frequency(now.ticks.checked_sub(first.ticks)?, now.at.checked_sub(first.at)?)
}

fn frequency(ticks: u64, interval: Duration) -> Option<u64> {
    if interval < MIN_INTERVAL {
        return None;
    }
    u64::try_from(u128::from(ticks) * 1_000_000 / interval.as_nanos()).ok().filter(|khz| *khz > 0)
}

/// Reads the counter between two readings of the clock, and keeps the attempt whose clock readings are closest
/// together.
#[cfg(target_arch = "x86_64")]
fn read() -> Option<Reading> {
    let attempt = || {
        let before = Duration::from(clock_gettime(CLOCK).ok()?);
        // SAFETY: the instruction reads a counter, and exists on every x86-64.
        let ticks = unsafe { core::arch::x86_64::_rdtsc() };
        let width = Duration::from(clock_gettime(CLOCK).ok()?).checked_sub(before)?;
        Some((width, Reading { ticks, at: before + width / 2 }))
    };
    let attempts = (0..ATTEMPTS).filter_map(|_| attempt());
    attempts.min_by_key(|(width, _)| *width).map(|(_, reading)| reading)
}

#[cfg(not(target_arch = "x86_64"))]
fn read() -> Option<Reading> {
    None
}

/// Whether the counter runs at one rate, whatever the processor's frequency (proc_cpuinfo(5): constant_tsc).
fn counter_is_constant() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "constant_tsc"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_needs_an_interval_of_five_milliseconds() {
        let ms = Duration::from_millis;
        let table = [
            (24_000_000, ms(10), Some(2_400_000)),
            (2_500_000_000, ms(1000), Some(2_500_000)),
            (9_600_000, ms(4), None),
            (0, ms(10), None),
        ];
        for (ticks, interval, expected) in table {
            assert_eq!(frequency(ticks, interval), expected);
        }
    }
}
