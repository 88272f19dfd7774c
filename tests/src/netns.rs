//! Runs closures inside network namespaces.

use std::fs::File;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

/// Runs `work` on a thread that is in the network namespace `path`. Sockets that it creates belong to that namespace.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let netns = File::open(path).with_context(|| path.display().to_string())?;
    let inside = || {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        work()
    };
    thread::scope(|scope| scope.spawn(inside).join())
        .map_err(|_| anyhow!("the thread in {} panicked", path.display()))?
}
