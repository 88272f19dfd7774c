//! How long the threads of a process wait for a CPU (`/proc/<pid>/task/<tid>/schedstat`,
//! Documentation/scheduler/sched-stats.rst).

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use procfs::ProcResult;
use procfs::process::{Process, Task};
use tokio::time::Instant;

use super::process::ProcessId;

/// A thread at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Thread {
    /// Nanoseconds for which it has run.
    ran: u64,
    /// Nanoseconds for which it has waited for a CPU. The kernel adds a wait when it ends.
    waited: u64,
    /// It runs, or waits for a CPU.
    runnable: bool,
}

/// The threads of a process at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunDelays(BTreeMap<i32, Thread>);

impl RunDelays {
    /// Reads them.
    ///
    /// # Errors
    /// When the process has exited, or the host's kernel lacks CONFIG_SCHED_INFO.
    pub(crate) fn of(process: ProcessId) -> io::Result<Self> {
        let read = |task: Task| -> ProcResult<(i32, Thread)> {
            let times = task.schedstat()?;
            let runnable = task.stat()?.state == 'R';
            Ok((task.tid, Thread { ran: times.sum_exec_runtime, waited: times.run_delay, runnable }))
        };
        let tasks = Process::new(process.pid.cast_signed()).and_then(|process| process.tasks());
        // A thread that exits meanwhile does not wait.
        let threads: BTreeMap<_, _> =
            tasks.map_err(io::Error::other)?.filter_map(|task| task.and_then(read).ok()).collect();
        if threads.is_empty() {
            return Err(io::Error::other("no thread has a schedstat"));
        }
        Ok(Self(threads))
    }

    /// Those of a process with one thread, which has waited this long.
    #[cfg(test)]
    pub(crate) fn of_waiting(waited: Duration) -> Self {
        Self(BTreeMap::from([(1, Thread { ran: 0, waited: waited.as_nanos() as u64, runnable: false })]))
    }

    /// How long the thread that has waited longest has waited since `earlier`, which is `passed` ago: at most `passed`.
    /// `counted` has, for each thread whose wait goes on, what earlier calls have returned of it.
    fn longest_since(&self, earlier: &Self, passed: Duration, counted: &mut BTreeMap<i32, Duration>) -> Duration {
        let mut longest = Duration::ZERO;
        for (tid, now) in &self.0 {
            let Some(before) = earlier.0.get(tid) else { continue };
            // A thread that has run for no moment waits all the time.
            let waited = if before.runnable && now.runnable && (now.ran, now.waited) == (before.ran, before.waited) {
                *counted.entry(*tid).or_default() += passed;
                passed
            } else {
                let ended = Duration::from_nanos(now.waited.saturating_sub(before.waited));
                ended.saturating_sub(counted.remove(tid).unwrap_or_default())
            };
            longest = longest.max(waited.min(passed));
        }
        counted.retain(|tid, _| self.0.contains_key(tid));
        longest
    }
}

/// Measures for how much of the time at least one thread of a process waits for a CPU. A wait that goes on counts from
/// one sample to the next, so there must be several samples in the time of interest.
#[derive(Debug)]
pub(crate) struct CpuWaits {
    /// The threads at the last sample, if they are known.
    last: Option<RunDelays>,
    at: Instant,
    counted: BTreeMap<i32, Duration>,
}

impl CpuWaits {
    /// Begins with a first sample.
    pub(crate) fn begin(threads: io::Result<RunDelays>) -> Self {
        Self { last: known(threads), at: Instant::now(), counted: BTreeMap::new() }
    }

    /// When the last sample was taken.
    pub(crate) fn last_sample(&self) -> Instant {
        self.at
    }

    /// How long threads have waited since the last sample, and the time since then. Threads that are not known wait for
    /// nothing.
    pub(crate) fn sample(&mut self, threads: io::Result<RunDelays>) -> (Duration, Duration) {
        let (now, passed) = (known(threads), self.at.elapsed());
        let waited = match (&now, &self.last) {
            (Some(now), Some(last)) => now.longest_since(last, passed, &mut self.counted),
            _ => Duration::ZERO,
        };
        (self.last, self.at) = (now, self.at + passed);
        (waited, passed)
    }
}

fn known(threads: io::Result<RunDelays>) -> Option<RunDelays> {
    threads.inspect_err(|error| tracing::debug!(%error, "failed to read how long threads wait for CPUs")).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    use super::*;

    fn delays(threads: &[(i32, u64, u64, bool)]) -> RunDelays {
        let thread = |&(tid, ran, waited, runnable)| (tid, Thread { ran, waited, runnable });
        RunDelays(threads.iter().map(thread).collect())
    }

    #[test]
    fn the_longest_wait_counts_even_if_it_has_not_ended() {
        let second = 1_000_000_000;
        let before = delays(&[(1, 5, 7, true), (2, 5, 7, false), (3, 0, 0, true)]);
        for (now, expected) in [
            // All sleep.
            (&[(1, 5, 7, false), (2, 5, 7, false)][..], 0),
            // One waits from time to time, another runs.
            (&[(1, 9 * second, 7, true), (2, 6, 7 + second, false)], 1),
            // One has not run at all.
            (&[(1, 5, 7, true), (2, 6, 7 + second, false)], 15),
            // Another has become runnable, and when is unknown.
            (&[(1, 6, 7, true), (2, 5, 7, true)], 0),
            // A wait that began before.
            (&[(1, 6, 7 + 40 * second, true)], 15),
            // A new thread.
            (&[(4, 0, 100 * second, true)], 0),
        ] {
            let waited = delays(now).longest_since(&before, Duration::from_secs(15), &mut BTreeMap::new());
            assert_eq!(waited, Duration::from_secs(expected), "{now:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn every_second_of_a_wait_counts_once_when_samples_are_taken_in_it() {
        let second = 1_000_000_000;
        let mut waits = CpuWaits::begin(Ok(delays(&[(1, 0, 0, false), (2, 0, 0, true)])));
        for (now, expected) in [
            // The first runs a little and waits, the second sleeps.
            (&[(1, 1, 0, true), (2, 1, 0, false)][..], 0),
            (&[(1, 1, 0, true), (2, 1, 0, false)], 1),
            (&[(1, 1, 0, true), (2, 1, 0, false)], 1),
            // Its wait ends with half a second that no sample has seen, and it waits for the second thread, which waits.
            (&[(1, 2, 2 * second + second / 2, false), (2, 1, 0, true)], 0),
            (&[(1, 2, 2 * second + second / 2, false), (2, 1, 0, true)], 1),
            // It has ended.
            (&[(2, 2, second, true)], 0),
            (&[(2, 2, second, true)], 1),
        ] {
            tokio::time::advance(Duration::from_secs(1)).await;
            let (waited, passed) = waits.sample(Ok(delays(now)));
            assert_eq!((waited.as_secs(), passed.as_secs()), (expected, 1), "{now:?}");
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(waits.sample(Err(io::ErrorKind::NotFound.into())).0.is_zero());
        assert!(waits.counted.len() <= 1);
    }

    #[test]
    fn threads_that_share_a_cpu_wait_for_it() {
        let cpus = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let mut one = CpuSet::new();
        one.set((0..CpuSet::count()).find(|cpu| cpus.is_set(*cpu).unwrap()).unwrap()).unwrap();
        let (own, end) = (ProcessId::own().unwrap(), AtomicBool::new(false));
        let spin = || {
            sched_setaffinity(Pid::from_raw(0), &one).unwrap();
            while !end.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        let waited = std::thread::scope(|scope| {
            (0..2).for_each(|_| drop(scope.spawn(spin)));
            let (mut waits, began) = (CpuWaits::begin(RunDelays::of(own)), Instant::now());
            let mut waited = Duration::ZERO;
            while waited.is_zero() && began.elapsed() < Duration::from_secs(60) {
                (waited, _) = waits.sample(RunDelays::of(own));
            }
            end.store(true, Ordering::Relaxed);
            waited
        });
        assert!(!waited.is_zero());
    }
}
