//! Processes that the kernel killed because their cgroup ran out of memory (`memory.events`).

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::file::{is_gone, number};
use super::watch::EventsFile;

/// The OOM kills in a group and below it.
#[derive(Debug)]
pub(crate) struct Kills {
    /// None when the kernel has no memory controller, and thus no limits that kill.
    events: Option<EventsFile>,
    seen: AtomicU64,
}

impl Kills {
    /// Starts to watch a group.
    ///
    /// # Errors
    /// When its events cannot be watched.
    pub(crate) fn of(group: &Path) -> io::Result<Self> {
        let events = match EventsFile::open(&group.join("memory.events")) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            other => Some(other?),
        };
        Ok(Self { events, seen: AtomicU64::new(0) })
    }

    /// Waits until there may be new kills.
    ///
    /// # Errors
    /// Those of [`EventsFile::changed`].
    pub(crate) async fn changed(&self) -> io::Result<()> {
        match &self.events {
            Some(events) => events.changed().await,
            None => std::future::pending().await,
        }
    }

    /// The number of kills since the last call. The kernel counts a kill before the process's exit is visible
    /// (mm/oom_kill.c). A group that has been removed has no new kills.
    ///
    /// # Errors
    /// When the events cannot be read.
    pub(crate) fn new_ones(&self) -> io::Result<u64> {
        let Some(events) = &self.events else { return Ok(0) };
        let all = match events.read() {
            Err(error) if is_gone(&error) => return Ok(0),
            read => number(&read?, "oom_kill"),
        };
        Ok(all.saturating_sub(self.seen.swap(all, Ordering::Relaxed)))
    }
}
