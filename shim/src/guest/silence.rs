//! How long a guest that sends no heartbeat lives. A guest that hangs is killed after [`MISSED`] heartbeats. One that
//! the host gives too little CPU time gets more: until it has had a window without starvation, or [`STARVED`] heartbeats
//! are missing.

use std::time::Duration;

use tokio::time::Instant;

/// This many missing heartbeats in a row mean the death of a guest that has CPU time.
pub(super) const MISSED: u32 = 3;
/// This many mean the death of every guest.
pub(super) const STARVED: u32 = 30;

/// When a heartbeat is late, and the length of a window in which the guest's CPU time is measured.
pub(super) fn window(interval: Duration) -> Duration {
    interval * 3 / 2
}

/// How often the machine's waits for a CPU are measured in a window.
pub(super) fn sample(interval: Duration) -> Duration {
    interval / 16
}

/// The silence of a guest whose heartbeat is late.
#[derive(Debug, Clone, Copy)]
pub(super) struct Silence {
    interval: Duration,
    /// The last heartbeat.
    last: Instant,
    /// When the current window began.
    pub(super) since: Instant,
    /// When it ends, and the guest is killed unless it has been starved in it.
    pub(super) until: Instant,
}

impl Silence {
    /// A silence that is noticed now.
    pub(super) fn begin(interval: Duration, last: Instant) -> Self {
        Self { interval, last, since: Instant::now(), until: last + interval * MISSED }
    }

    /// Begins another window, if `waited` of the ended one makes the guest starved and there is time left. `waited` is
    /// the time in which one of the machine's threads has waited for a CPU: a thread that hangs in the guest runs for the
    /// other half at least, unless the host is short of CPU time.
    pub(super) fn extend(&mut self, waited: Duration) -> bool {
        let (now, end) = (Instant::now(), self.last + self.interval * STARVED);
        if 2 * waited < now - self.since || now >= end {
            return false;
        }
        (self.since, self.until) = (now, end.min(now + window(self.interval)));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_starved_guest_gets_more_time_and_not_without_end() {
        let interval = Duration::from_secs(10);
        // Windows in which the guest is starved, and when it is killed.
        for (starved, killed) in [(0, 30), (1, 45), (2, 60), (1000, 300)] {
            let last = Instant::now();
            tokio::time::sleep(window(interval)).await;
            let mut silence = Silence::begin(interval, last);
            let mut windows = 0;
            loop {
                tokio::time::sleep_until(silence.until).await;
                let half = (silence.until - silence.since) / 2;
                let waited = if windows < starved { half } else { half - Duration::from_millis(1) };
                if !silence.extend(waited) {
                    break;
                }
                windows += 1;
            }
            assert_eq!(last.elapsed(), Duration::from_secs(killed), "{starved}");
        }
    }
}
