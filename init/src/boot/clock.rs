//! The guest's wall clock.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use super::timeline::boottime_ns;
use super::{Error, Step};

/// 2020-01-01: a clock before it was never set. Certificates and exit times would be nonsense.
const PLAUSIBLE_SECONDS: u64 = 1_577_836_800;

/// Sets the clock from the host's time at the guest's start, if the host gave it; else keeps what the kernel found in an RTC.
pub fn set(epoch_ns: Option<u64>) -> Result<(), Error> {
    if let Some(start) = epoch_ns {
        let now = start.saturating_add(boottime_ns());
        let now = TimeSpec::new((now / 1_000_000_000) as i64, (now % 1_000_000_000) as i64);
        return clock_settime(ClockId::CLOCK_REALTIME, now).step(|| "set the wall clock".into());
    }
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if seconds < PLAUSIBLE_SECONDS {
        tracing::warn!(
            seconds,
            "the wall clock was never set: no RTC, and no husk.epoch_ns on the kernel command line"
        );
    }
    Ok(())
}
