//! How fast the host's time stamp counter runs. A guest under TCG reads that counter as its own, and being told its frequency spares it
//! measuring against an emulated timer, which takes a quarter of a second and may hang.

use std::sync::LazyLock;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Between the two readings at least. A reading is off by some tens of nanoseconds, so this is good to 10 ppm or so; not to know the
/// frequency costs the guest fifty times as long.
const LEAST: Duration = Duration::from_millis(5);
/// Of so many attempts at a reading the tightest counts: the process may be interrupted in any of them.
const ATTEMPTS: usize = 5;

/// Not adjusted by NTP: neither is what the guest makes of the counter.
const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC_RAW;

struct Reading {
    ticks: u64,
    at: Duration,
}

/// The first reading, made by the first call of [`begin`].
static FIRST: LazyLock<Option<Reading>> = LazyLock::new(|| if counter_is_constant() { read() } else { None });

/// Takes the first reading. The longer before [`khz`], the better.
pub fn begin() {
    LazyLock::force(&FIRST);
}

/// The frequency in kHz; none where the counter does not run evenly. Blocks until [`LEAST`] has passed since [`begin`], which it has unless
/// containerd is very fast.
pub fn khz() -> Option<u64> {
    let first = FIRST.as_ref()?;
    let passed = Duration::from(clock_gettime(CLOCK).ok()?).checked_sub(first.at)?;
    std::thread::sleep(LEAST.saturating_sub(passed));
    let now = read()?;
    frequency(now.ticks.checked_sub(first.ticks)?, now.at.checked_sub(first.at)?)
}

fn frequency(ticks: u64, within: Duration) -> Option<u64> {
    if within < LEAST {
        return None;
    }
    u64::try_from(u128::from(ticks) * 1_000_000 / within.as_nanos()).ok().filter(|khz| *khz > 0)
}

/// The counter between two looks at the clock that are as close together as they were in any of some attempts.
#[cfg(target_arch = "x86_64")]
fn read() -> Option<Reading> {
    let attempt = || {
        let before = Duration::from(clock_gettime(CLOCK).ok()?);
        // SAFETY: the instruction reads a counter, and is there on every x86-64.
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

/// Runs at one speed, whatever the processor's (proc_cpuinfo(5): constant_tsc).
fn counter_is_constant() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "constant_tsc"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies() {
        let ms = Duration::from_millis;
        let table = [
            (24_000_000, ms(10), Some(2_400_000)),
            (2_500_000_000, ms(1000), Some(2_500_000)),
            (9_600_000, ms(4), None),
            (0, ms(10), None),
        ];
        for (ticks, within, expected) in table {
            assert_eq!(frequency(ticks, within), expected);
        }
    }
}
