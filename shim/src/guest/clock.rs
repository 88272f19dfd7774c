//! Keeps the guest's clock equal to the host's.
//!
//! The guest starts with a time that was read before its VM started, and its clock may stop while the host or QEMU is
//! suspended. So the shim sets it when the guest has connected, and corrects it whenever a heartbeat shows a difference:
//! small ones gradually, so that time never runs backwards, large ones at once.
//!
//! The error of a measurement is at most half of the call's duration, so the shim repeats it and uses the fastest call.
//! A guest that lies about its time affects only its own clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use husk_protos::chain::Chain;
use husk_protos::system::ClockAdjustment;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use ttrpc::context::{Context, with_duration};

use super::client::{Guest, GuestError};

/// Calls of one measurement.
const ROUNDS: usize = 8;
/// A measurement that is this accurate ends early.
const ACCURATE: Duration = Duration::from_millis(1);
/// A smaller difference is left alone.
const TOLERANCE: Duration = Duration::from_millis(5);
/// How long a heartbeat may take on a loaded host. A guest whose clock is this much late is measured.
const LATENCY: Duration = Duration::from_millis(20);
/// A larger difference is corrected at once. The kernel corrects 0.5 ms per second gradually (adjtime(3)).
const STEP: Duration = Duration::from_millis(200);

/// Least time between two log lines about failed corrections, which a guest could cause all the time.
const COMPLAINT: Duration = Duration::from_secs(60);

/// What has to be added to the guest's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Offset {
    ns: i64,
    /// The largest error of `ns`.
    error: Duration,
}

/// How a clock is corrected.
#[derive(Debug, PartialEq, Eq)]
enum Correction {
    None,
    Gradual,
    Step,
}

/// Sets the clock of a guest whose containers have not started. With a `seed`, the guest's random numbers depend on it
/// from then on.
///
/// # Errors
///
/// When the guest does not answer.
pub(crate) async fn set(guest: &Guest, seed: Option<&[u8]>) -> Result<(), GuestError> {
    let offset = measure(guest).await?;
    let seed = seed.map(<[u8]>::to_vec).unwrap_or_default();
    let request = ClockAdjustment { by_ns: offset.ns, seed, ..Default::default() };
    guest.system.adjust_clock(guest.context(), &request).await?;
    tracing::debug!(by_us = offset.ns / 1000, error_us = offset.error.as_micros() as u64, "set the guest's clock");
    Ok(())
}

/// Corrects the clock whenever `differs` is notified, at most twice per `interval`: a guest can send any number of
/// heartbeats.
pub(crate) async fn keep(guest: &Guest, differs: &Notify, interval: Duration) {
    let mut complained = None;
    loop {
        differs.notified().await;
        if let Err(error) = correct(guest).await
            && is_due(&mut complained, Instant::now())
        {
            tracing::warn!(error = %Chain(&error), "failed to correct the guest's clock");
        }
        sleep(interval / 2).await;
    }
}

/// Whether the log gets another line about a failure; if so, the time is noted.
fn is_due(complained: &mut Option<Instant>, now: Instant) -> bool {
    let due = complained.is_none_or(|last| now.saturating_duration_since(last) >= COMPLAINT);
    if due {
        *complained = Some(now);
    }
    due
}

async fn correct(guest: &Guest) -> Result<(), GuestError> {
    let offset = measure(guest).await?;
    let correction = correction(offset);
    if correction != Correction::None {
        adjust(guest, guest.context(), offset.ns, correction == Correction::Gradual).await?;
        let (by_ms, at_once) = (offset.ns / 1_000_000, correction == Correction::Step);
        tracing::info!(by_ms, at_once, "corrected the guest's clock");
    }
    Ok(())
}

fn correction(offset: Offset) -> Correction {
    match Duration::from_nanos(offset.ns.unsigned_abs()) {
        difference if difference <= TOLERANCE.max(offset.error) => Correction::None,
        difference if difference < STEP => Correction::Gradual,
        _ => Correction::Step,
    }
}

/// Whether the time in a heartbeat that has just arrived shows that the guest's clock differs. A heartbeat takes some
/// time, so the guest's clock may seem late, but not early.
pub(super) fn differs(realtime_ns: u64) -> bool {
    differs_from(now_ns(), realtime_ns)
}

fn differs_from(now_ns: u64, realtime_ns: u64) -> bool {
    let late = i128::from(now_ns) - i128::from(realtime_ns);
    late > LATENCY.as_nanos() as i128 || -late > TOLERANCE.as_nanos() as i128
}

/// Measures the difference, with at most [`ROUNDS`] calls that together take no longer than one may.
async fn measure(guest: &Guest) -> Result<Offset, GuestError> {
    let deadline = Instant::now() + guest.call_timeout();
    let mut best: Option<Offset> = None;
    for _ in 0..ROUNDS {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let before = now_ns();
        let guests = adjust(guest, with_duration(left), 0, false).await?;
        // The host's clock may have been set back meanwhile.
        let Some(offset) = offset(before, guests, now_ns()) else { continue };
        if best.is_none_or(|best| offset.error < best.error) {
            best = Some(offset);
        }
        if offset.error <= ACCURATE {
            break;
        }
    }
    Ok(best.unwrap_or(Offset { ns: 0, error: Duration::MAX }))
}

/// The offset of a guest whose clock showed `guest` between `before` and `after` of the host's.
fn offset(before: u64, guest: u64, after: u64) -> Option<Offset> {
    let half = after.checked_sub(before)? / 2;
    let ns = i128::from(before) + i128::from(half) - i128::from(guest);
    let ns = i64::try_from(ns).unwrap_or(if ns < 0 { i64::MIN } else { i64::MAX });
    Some(Offset { ns, error: Duration::from_nanos(half + 1) })
}

/// Adds to the guest's time, and returns the result.
async fn adjust(guest: &Guest, context: Context, by_ns: i64, gradually: bool) -> Result<u64, GuestError> {
    let request = ClockAdjustment { by_ns, gradually, ..Default::default() };
    Ok(guest.system.adjust_clock(context, &request).await?.realtime_ns)
}

/// The host's time. Zero before 1970, which no guest would accept anyway.
fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn an_offset_is_measured_from_the_middle_of_a_call() {
        let base = 1_700_000_000_000 * MS;
        let expected = |ns, error_ns| Some(Offset { ns, error: Duration::from_nanos(error_ns) });
        assert_eq!(offset(base, base + MS, base + 2 * MS), expected(0, MS + 1));
        assert_eq!(offset(base, base - 500 * MS, base + 2 * MS), expected(501_000_000, MS + 1));
        assert_eq!(offset(base, base + 500 * MS, base), expected(-500_000_000, 1));
        assert_eq!(offset(base, base, base - 1), None);
        // A hostile guest.
        assert_eq!(offset(base, u64::MAX, base), expected(i64::MIN, 1));
        assert_eq!(offset(base, 0, base), expected(base as i64, 1));
    }

    #[test]
    fn small_differences_are_corrected_gradually_and_large_ones_at_once() {
        for (ms, error_ms, expected) in [
            (0, 1, Correction::None),
            (-5, 1, Correction::None),
            (6, 1, Correction::Gradual),
            (60, 80, Correction::None),
            (-199, 80, Correction::Gradual),
            (200, 80, Correction::Step),
            (-3_600_000, 1, Correction::Step),
        ] {
            let offset = Offset { ns: ms * MS as i64, error: Duration::from_millis(error_ms) };
            assert_eq!(correction(offset), expected, "{offset:?}");
        }
        let unknown = Offset { ns: i64::MIN, error: Duration::MAX };
        assert_eq!(correction(unknown), Correction::None);
    }

    #[test]
    fn failures_are_logged_once_a_minute() {
        let (mut complained, start) = (None, Instant::now());
        let due = [0, 1, 59, 60, 61, 119, 120].map(|s| is_due(&mut complained, start + Duration::from_secs(s)));
        assert_eq!(due, [true, false, false, true, false, false, true]);
    }

    #[test]
    fn a_heartbeat_shows_a_clock_that_is_early_or_much_too_late() {
        let now = 1_700_000_000_000 * MS;
        for (realtime, expected) in [
            (now, false),
            (now - 19 * MS, false),
            (now - 21 * MS, true),
            (now + 4 * MS, false),
            (now + 6 * MS, true),
            (0, true),
        ] {
            assert_eq!(differs_from(now, realtime), expected, "{realtime}");
        }
    }
}
