//! Limits how often something happens: a burst, and a rate in the long run. Pure.

use tokio::time::Instant;

/// The answer of a [`Bucket`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admitted {
    /// Too many happen.
    No,
    /// One more may happen.
    Yes {
        /// How many were not admitted since the last one that was.
        held_back: u64,
    },
}

/// A token bucket.
#[derive(Debug)]
pub(crate) struct Bucket {
    burst: f64,
    per_second: f64,
    room: f64,
    since: Instant,
    held_back: u64,
}

impl Bucket {
    /// Admits `burst` at once and `per_second` in the long run.
    pub(crate) fn new(burst: f64, per_second: f64, now: Instant) -> Self {
        Self { burst, per_second, room: burst, since: now, held_back: 0 }
    }

    /// Whether one more may happen now.
    pub(crate) fn admit(&mut self, now: Instant) -> Admitted {
        self.room = self.room_at(now);
        self.since = now;
        if self.room < 1.0 {
            self.held_back += 1;
            return Admitted::No;
        }
        self.room -= 1.0;
        Admitted::Yes { held_back: std::mem::take(&mut self.held_back) }
    }

    /// How many were not admitted since the last one that was.
    pub(crate) fn held_back(&self) -> u64 {
        self.held_back
    }

    /// Whether the bucket is as good as a new one.
    pub(crate) fn is_full(&self, now: Instant) -> bool {
        self.held_back == 0 && self.room_at(now) >= self.burst
    }

    fn room_at(&self, now: Instant) -> f64 {
        let gained = now.saturating_duration_since(self.since).as_secs_f64() * self.per_second;
        (self.room + gained).min(self.burst)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_is_limited_to_a_burst_and_a_rate() {
        let now = Instant::now();
        let mut bucket = Bucket::new(256.0, 16.0, now);
        assert!(bucket.is_full(now));
        let admitted = |bucket: &mut Bucket, now| matches!(bucket.admit(now), Admitted::Yes { .. });
        assert_eq!((0..1000).filter(|_| admitted(&mut bucket, now)).count(), 256);
        assert_eq!(bucket.held_back(), 744);
        assert_eq!(bucket.admit(now + Duration::from_secs(1)), Admitted::Yes { held_back: 744 });
        assert!(!bucket.is_full(now + Duration::from_secs(16)) && bucket.is_full(now + Duration::from_secs(17)));
        let later = now + Duration::from_secs(3600);
        assert_eq!((0..1000).filter(|_| admitted(&mut bucket, later)).count(), 256);
    }
}
