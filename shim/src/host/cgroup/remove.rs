//! Removes a cgroup with what is left in it.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::host::lock::is_gone;
use crate::host::process::ProcessId;

/// Shortest wait for a killed process: normally it is dead by then.
const MIN_WAIT: Duration = Duration::from_millis(100);
/// First and longest pause between two attempts to remove a cgroup: cgroup v1 does not report when a cgroup is empty.
const PAUSE: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

/// Kills the processes in the cgroup at `path`, except this one, and removes it.
pub(super) fn remove(path: &Path, within: Duration) -> io::Result<()> {
    let deadline = Instant::now() + within;
    let mut pause = PAUSE.0;
    loop {
        match fs::remove_dir(path) {
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) if is_busy(&error) && Instant::now() < deadline => {}
            other => return other,
        }
        // husk's own processes are dead by now. The cgroup contains children that they left behind.
        for pid in pids_in(path)?.into_iter().filter(|pid| *pid != std::process::id()) {
            // The PID may have been reused since the first read. Check again after `of`: a process is killed only if
            // it is in this cgroup.
            if let Some(id) = ProcessId::of(pid)?
                && pids_in(path)?.contains(&pid)
            {
                id.kill(deadline.saturating_duration_since(Instant::now()).max(MIN_WAIT))?;
            }
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(PAUSE.1);
    }
}

/// The PIDs in a cgroup. Read by hand: the `procfs` crate covers `/proc` only.
fn pids_in(cgroup: &Path) -> io::Result<Vec<u32>> {
    match fs::read_to_string(cgroup.join("cgroup.procs")) {
        // 0 stands for a process of another PID namespace, which cannot be killed from here.
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid != 0).collect()),
        // ENODEV: the cgroup was removed while its file was open.
        Err(error) if is_gone(&error) || error.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
