//! How long the threads of a process wait for a CPU (`/proc/<pid>/task/<tid>/schedstat`,
//! Documentation/scheduler/sched-stats.rst).

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use procfs::ProcResult;
use procfs::process::{Process, Task};

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

    /// The longest time for which one thread has waited since `earlier`, which is `passed` ago.
    pub(crate) fn longest_since(&self, earlier: &Self, passed: Duration) -> Duration {
        let waited = |(tid, now): (&i32, &Thread)| {
            let before = earlier.0.get(tid)?;
            // A thread that has run for no moment waits all the time.
            if before.runnable && now.runnable && (now.ran, now.waited) == (before.ran, before.waited) {
                return Some(passed);
            }
            Some(Duration::from_nanos(now.waited.saturating_sub(before.waited)))
        };
        self.0.iter().filter_map(waited).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn the_longest_wait_counts_even_if_it_has_not_ended() {
        let second = 1_000_000_000;
        let delays = |threads: &[(i32, u64, u64, bool)]| {
            let thread = |&(tid, ran, waited, runnable)| (tid, Thread { ran, waited, runnable });
            RunDelays(threads.iter().map(thread).collect())
        };
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
            // A new thread.
            (&[(4, 0, 100 * second, true)], 0),
        ] {
            let waited = delays(now).longest_since(&before, Duration::from_secs(15));
            assert_eq!(waited, Duration::from_secs(expected), "{now:?}");
        }
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
            let (before, began) = (RunDelays::of(own).unwrap(), Instant::now());
            let mut waited = Duration::ZERO;
            while waited.is_zero() && began.elapsed() < Duration::from_secs(60) {
                waited = RunDelays::of(own).unwrap().longest_since(&before, began.elapsed());
            }
            end.store(true, Ordering::Relaxed);
            waited
        });
        assert!(!waited.is_zero());
    }
}
