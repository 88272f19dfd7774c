//! How fast the host's time stamp counter runs. A guest under TCG reads that counter as its own, and being told its frequency spares it
//! measuring against an emulated timer, which takes a quarter of a second and may hang.

use std::sync::LazyLock;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Between the two readings. Reading both clocks takes well under a microsecond, so the error is below 100 ppm at worst and the VM's
/// start is usually further away than that.
const LEAST: Duration = Duration::from_millis(10);

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

/// The frequency in kHz; none where the counter does not run evenly, or too little time has passed since [`begin`].
pub fn khz() -> Option<u64> {
    let first = FIRST.as_ref()?;
    let now = read()?;
    frequency(now.ticks.checked_sub(first.ticks)?, now.at.checked_sub(first.at)?)
}

fn frequency(ticks: u64, within: Duration) -> Option<u64> {
    if within < LEAST {
        return None;
    }
    u64::try_from(u128::from(ticks) * 1_000_000 / within.as_nanos()).ok().filter(|khz| *khz > 0)
}

#[cfg(target_arch = "x86_64")]
fn read() -> Option<Reading> {
    // Not adjusted by NTP: neither is what the guest makes of it.
    let at = clock_gettime(ClockId::CLOCK_MONOTONIC_RAW).ok()?;
    // SAFETY: the instruction reads a counter, and is there on every x86-64.
    let ticks = unsafe { core::arch::x86_64::_rdtsc() };
    Some(Reading { ticks, at: Duration::from(at) })
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
            (24_000_000, ms(9), None),
            (0, ms(10), None),
        ];
        for (ticks, within, expected) in table {
            assert_eq!(frequency(ticks, within), expected);
        }
    }
}
