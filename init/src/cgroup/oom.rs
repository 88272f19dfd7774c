//! Processes that the kernel killed because their cgroup had no more memory (`memory.events`).

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::watch::Watched;
use super::{is_gone, number};

/// The kills of one group and all below it, counted from its beginning.
#[derive(Debug)]
pub struct Kills {
    /// None when the kernel has no memory controller: then no limit kills.
    events: Option<Watched>,
    seen: AtomicU64,
}

impl Kills {
    /// Begins to watch a group.
    ///
    /// # Errors
    /// When its events cannot be watched.
    pub fn of(group: &Path) -> io::Result<Self> {
        let events = match Watched::open(&group.join("memory.events")) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            other => Some(other?),
        };
        Ok(Self { events, seen: AtomicU64::new(0) })
    }

    /// Waits until there may be more of them.
    ///
    /// # Errors
    /// As [`Watched::changed`].
    pub async fn changed(&self) -> io::Result<()> {
        match &self.events {
            Some(events) => events.changed().await,
            None => std::future::pending().await,
        }
    }

    /// How many there were since this was last asked. A process's kill is counted before its exit can be seen (mm/oom_kill.c). A group that is gone,
    /// because the guest ends, has no more.
    ///
    /// # Errors
    /// When the events cannot be read.
    pub fn new_ones(&self) -> io::Result<u64> {
        let Some(events) = &self.events else { return Ok(0) };
        let all = match events.read() {
            Err(error) if is_gone(&error) => return Ok(0),
            read => number(&read?, "oom_kill"),
        };
        Ok(all.saturating_sub(self.seen.swap(all, Ordering::Relaxed)))
    }
}
