//! Freezes and thaws all processes of a cgroup (`cgroup.freeze`).

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;

use super::file::ignore_gone;
use super::watch::EventsFile;

/// Freezes a group and waits until all of its processes have stopped. Thaws the group on failure.
///
/// # Errors
/// `TimedOut` when a process does not stop within `deadline`, for example because it waits inside the kernel.
pub(crate) async fn freeze(group: &Path, deadline: Duration) -> io::Result<()> {
    let frozen = switch(group, true, deadline).await;
    if frozen.is_err() {
        release(group)?;
    }
    frozen
}

/// Thaws a group without waiting for its processes. Succeeds when the group does not exist.
///
/// # Errors
/// The error of write(2).
pub(crate) fn release(group: &Path) -> io::Result<()> {
    ignore_gone(fs::write(group.join("cgroup.freeze"), "0"))
}

/// Thaws a group and waits until its processes run.
///
/// # Errors
/// Those of [`freeze`].
pub(crate) async fn thaw(group: &Path, deadline: Duration) -> io::Result<()> {
    switch(group, false, deadline).await
}

async fn switch(group: &Path, frozen: bool, deadline: Duration) -> io::Result<()> {
    let bit = u8::from(frozen);
    let events = EventsFile::open(&group.join("cgroup.events"))?;
    fs::write(group.join("cgroup.freeze"), bit.to_string())?;
    // The write does not wait: a process stops when it leaves the kernel, and cgroup.events reports when all have.
    match timeout(deadline, events.until(&format!("frozen {bit}"))).await {
        Ok(switched) => switched,
        Err(_) => {
            let what = if frozen { "stopped" } else { "resumed" };
            Err(io::Error::new(ErrorKind::TimedOut, format!("not every process {what} within {deadline:?}")))
        }
    }
}
