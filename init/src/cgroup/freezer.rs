//! Stopping all processes of a cgroup where they are, and letting them go on (`cgroup.freeze`).

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;

use super::watch::Watched;

/// Freezes a group, and waits until nothing in it runs any more. After a failure it is thawed.
///
/// # Errors
/// `TimedOut` when a process did not stop within `deadline`: one that waits inside the kernel cannot.
pub async fn freeze(group: &Path, deadline: Duration) -> io::Result<()> {
    let frozen = switch(group, true, deadline).await;
    if frozen.is_err() {
        release(group)?;
    }
    frozen
}

/// Lets a group's processes go on, and does not wait for it. A group that is gone has none.
///
/// # Errors
/// What write(2) said.
pub fn release(group: &Path) -> io::Result<()> {
    super::missing_is_fine(fs::write(group.join("cgroup.freeze"), "0"))
}

/// Lets a group's processes go on.
///
/// # Errors
/// As [`freeze`].
pub async fn thaw(group: &Path, deadline: Duration) -> io::Result<()> {
    switch(group, false, deadline).await
}

async fn switch(group: &Path, frozen: bool, deadline: Duration) -> io::Result<()> {
    let bit = u8::from(frozen);
    let events = Watched::open(&group.join("cgroup.events"))?;
    fs::write(group.join("cgroup.freeze"), bit.to_string())?;
    // A process stops only when it comes out of the kernel: the write does not wait for it, the event tells.
    match timeout(deadline, events.until(&format!("frozen {bit}"))).await {
        Ok(switched) => switched,
        Err(_) => Err(io::Error::new(ErrorKind::TimedOut, format!("not every process followed within {deadline:?}"))),
    }
}
