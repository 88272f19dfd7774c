//! Work that changes what the threads of a process share.

use std::io;

use nix::sched::{CloneFlags, unshare};

/// Runs `work` on a thread that shares neither root nor working directory with the others, and is not reused.
///
/// # Errors
/// Those of `work`, or when there is no thread.
pub(crate) fn with_own_root<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mount".into()).spawn_scoped(scope, || {
            unshare(CloneFlags::CLONE_FS)?;
            work()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}
