//! How far the copy of an output is, and whether the process's exit may be published.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

#[derive(Debug, Clone, Copy)]
struct State {
    /// Bytes passed on to the output's destination.
    delivered: u64,
    /// Of a raw stream whose process has exited: the bytes that precede the exit.
    expected: Option<u64>,
    /// All bytes that the process itself wrote have been delivered, or the copy has ended.
    complete: bool,
    last_moved: Instant,
}

impl State {
    fn is_complete(&self) -> bool {
        self.complete || self.expected.is_some_and(|expected| self.delivered >= expected)
    }
}

/// The progress of a copy. Clones are of the same copy.
#[derive(Debug, Clone)]
pub(super) struct Progress(watch::Sender<State>);

impl Progress {
    /// A copy that begins.
    pub(super) fn new() -> Self {
        let state = State { delivered: 0, expected: None, complete: false, last_moved: Instant::now() };
        Self(watch::Sender::new(state))
    }

    /// This many bytes more were delivered.
    pub(super) fn moved(&self, bytes: usize) {
        self.0.send_modify(|state| {
            state.delivered = state.delivered.saturating_add(bytes as u64);
            state.last_moved = Instant::now();
        });
    }

    /// The bytes that were delivered.
    pub(super) fn delivered(&self) -> u64 {
        self.0.borrow().delivered
    }

    /// The process has exited after it wrote this many bytes.
    pub(super) fn expect(&self, bytes: u64) {
        self.0.send_modify(|state| state.expected = Some(bytes));
    }

    /// Everything has been delivered, or nothing more will be.
    pub(super) fn complete(&self) {
        self.0.send_modify(|state| state.complete = true);
    }

    /// Waits until all that the process wrote before its exit has been delivered. Returns false if no bytes move for
    /// `patience`: a stalled reader must not delay the exit any longer, nor a guest that claims more bytes than it sends.
    pub(super) async fn drained(&self, patience: Duration) -> bool {
        let mut state = self.0.subscribe();
        // Patience starts now, not when bytes last moved: a process may have been silent for long before its last
        // output.
        let started = Instant::now();
        loop {
            let deadline = {
                let now = state.borrow_and_update();
                if now.is_complete() {
                    return true;
                }
                now.last_moved.max(started) + patience
            };
            tokio::select! {
                // Cannot fail: self holds the sender.
                _ = state.changed() => {}
                () = tokio::time::sleep_until(deadline) => {
                    if state.has_changed().unwrap_or(false) {
                        continue;
                    }
                    return false;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn an_exit_waits_for_the_bytes_before_it_but_not_for_those_that_never_come() {
        // The bytes that the guest claims and those that it sends, each a second after the one before; and whether the
        // output is complete, after how many seconds.
        for (claimed, sent, complete, seconds) in
            [(0, 0, true, 0), (3, 3, true, 3), (3, 9, true, 3), (u64::MAX, 2, false, 7), (4, 0, false, 5)]
        {
            let (progress, started) = (Progress::new(), Instant::now());
            let sender = tokio::spawn({
                let progress = progress.clone();
                async move {
                    for _ in 0..sent {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        progress.moved(1);
                    }
                }
            });
            progress.expect(claimed);
            assert_eq!(progress.drained(PATIENCE).await, complete, "{claimed} {sent}");
            assert_eq!(started.elapsed().as_secs(), seconds, "{claimed} {sent}");
            sender.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_copy_that_ends_waits_for_nothing() {
        let progress = Progress::new();
        progress.expect(u64::MAX);
        progress.complete();
        assert!(progress.drained(PATIENCE).await);
    }
}
