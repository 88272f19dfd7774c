//! Ends a VM whose guest does not do in time what the host demands: the end of a container or of the VM itself.

use std::time::Duration;

use super::running::Vm;

/// Into how many parts the deadline is divided. A shim that was stopped for a while finds one part over, and not the whole
/// deadline: then the guest's answer is read first.
const PARTS: u32 = 10;

impl Vm {
    /// Waits for `done`, and kills the VM if that takes longer than `kill_timeout_ms`. `missing` says what the guest has
    /// not done. Returns `None` if the VM is dead.
    pub(crate) async fn enforce<T>(&self, missing: &str, done: impl Future<Output = T>) -> Option<T> {
        let limit = self.kill_timeout;
        tokio::select! {
            biased;
            done = done => return Some(done),
            _ = self.died() => return None,
            () = deadline(limit) => {}
        }
        let share = self.share_problem().map_or_else(String::new, |problem| format!("; virtiofsd {problem}"));
        self.fail(format!("{missing} within {} ms{share}", limit.as_millis()));
        self.died().await;
        None
    }
}

/// Resolves after `limit` of this process's running time.
async fn deadline(limit: Duration) {
    for _ in 0..PARTS {
        tokio::time::sleep(limit / PARTS).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_deadline_takes_as_long_as_stated() {
        let started = tokio::time::Instant::now();
        deadline(Duration::from_secs(10)).await;
        assert_eq!(started.elapsed().as_secs(), 10);
    }
}
