//! The guest's wall clock.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use super::error::{BootError, NameStep};
use crate::clock::boottime_ns;

/// 2020-01-01. An earlier time means that nothing has set the clock; certificates and exit times would be wrong.
const PLAUSIBLE_SECONDS: u64 = 1_577_836_800;

/// Sets the clock from the host's time when the guest started. Without that time, keeps what the kernel read from an
/// RTC.
pub(super) fn set(epoch_ns: Option<u64>) -> Result<(), BootError> {
    if let Some(start) = epoch_ns {
        let now = start.saturating_add(boottime_ns());
        let now = TimeSpec::new((now / 1_000_000_000) as i64, (now % 1_000_000_000) as i64);
        return clock_settime(ClockId::CLOCK_REALTIME, now).step(|| "set the wall clock".into());
    }
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if seconds < PLAUSIBLE_SECONDS {
        tracing::warn!(
            seconds,
            "the wall clock is not set: the guest has no RTC and the kernel command line no husk.epoch_ns"
        );
    }
    Ok(())
}
