//! The only place where PID 1 waits for children. It reaps every child and sends the exit status to the task that
//! registered the PID.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use husk_protos::lock::lock;
use nix::errno::Errno;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The exit code (0 to 255), or 128 plus the number of the signal that killed the process.
    pub(crate) status: u32,
    /// When the process was reaped.
    pub(crate) at: SystemTime,
}

/// Converts a raw wait(2) status to the exit status that containerd expects. None when the process has not exited.
///
/// nix's `WaitStatus` does not fit: it knows no real-time signals and fails on a process that one of them killed.
fn decode(status: i32) -> Option<u32> {
    if libc::WIFEXITED(status) {
        Some(libc::WEXITSTATUS(status) as u32)
    } else if libc::WIFSIGNALED(status) {
        Some(128 + libc::WTERMSIG(status) as u32)
    } else {
        None
    }
}

#[derive(Debug, Default)]
struct Table {
    waiters: HashMap<i32, oneshot::Sender<Exit>>,
    /// Processes being created. During a creation, an unregistered child may be the new process, whose PID is not known
    /// yet.
    creations: usize,
    /// Exits that nobody has registered for yet.
    early: HashMap<i32, Exit>,
}

/// Reaps children and delivers their exits.
#[derive(Debug, Default)]
pub(crate) struct Reaper(Mutex<Table>);

impl Reaper {
    /// Starts reaping on the current runtime.
    ///
    /// # Errors
    /// When the SIGCHLD handler cannot be installed.
    pub(crate) fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child())?;
        let this = reaper.clone();
        tokio::spawn(async move {
            // Reap before waiting for the first signal: a child may have exited before the handler existed.
            loop {
                this.reap();
                if children.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(reaper)
    }

    /// Announces that a process is about to be created. Until the returned value is dropped, exits of unknown PIDs are
    /// kept.
    pub(crate) fn creation(self: &Arc<Self>) -> Creation {
        self.table().creations += 1;
        Creation(self.clone())
    }

    /// Sends a signal to a registered child that has not been reaped. A PID that the kernel has reused is never
    /// signalled.
    ///
    /// # Errors
    /// ESRCH when the PID is not such a child; otherwise the error of kill(2).
    pub(crate) fn kill(&self, pid: i32, signal: i32) -> Result<(), Errno> {
        let table = self.table();
        if !table.waiters.contains_key(&pid) {
            return Err(Errno::ESRCH);
        }
        kill_raw(pid, signal)
    }

    /// Like [`Reaper::kill`], for the process group that the child leads.
    pub(crate) fn kill_group(&self, leader: i32, signal: i32) -> Result<(), Errno> {
        let table = self.table();
        if !table.waiters.contains_key(&leader) {
            return Err(Errno::ESRCH);
        }
        kill_raw(-leader, signal)
    }

    fn reap(&self) {
        // waitpid frees the PID: holding the lock across it keeps kill() from signalling a reused PID.
        let mut table = self.table();
        loop {
            let mut status = 0;
            // SAFETY: waitpid writes one int, into a variable that outlives the call.
            match Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) }) {
                Ok(0) | Err(Errno::ECHILD) => return,
                Ok(pid) => {
                    if let Some(status) = decode(status) {
                        table.ended(pid, Exit { status, at: SystemTime::now() });
                    }
                }
                Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "failed to wait for children");
                    return;
                }
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.0)
    }
}

/// Sends a signal, to a process group if the PID is negative. Takes a number because nix's `Signal` lacks real-time
/// signals.
pub(crate) fn kill_raw(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: kill(2) takes two integers and touches no memory.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

impl Table {
    fn ended(&mut self, pid: i32, exit: Exit) {
        match self.waiters.remove(&pid) {
            // Fails only when the waiter no longer wants the exit.
            Some(waiter) => drop(waiter.send(exit)),
            None if self.creations > 0 => drop(self.early.insert(pid, exit)),
            // An orphan of a container, or a helper process of libcontainer.
            None => {}
        }
    }

    fn wait(&mut self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, exit) = oneshot::channel();
        match self.early.remove(&pid) {
            Some(early) => drop(sender.send(early)),
            None => drop(self.waiters.insert(pid, sender)),
        }
        exit
    }
}

/// A process is being created. Registering for an exit requires this value, so that no exit can be missed.
#[derive(Debug)]
pub(crate) struct Creation(Arc<Reaper>);

impl Creation {
    /// Registers for the exit of `pid`, which may have exited already.
    pub(crate) fn exit_of(&self, pid: i32) -> oneshot::Receiver<Exit> {
        self.0.table().wait(pid)
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.creations -= 1;
        if table.creations == 0 {
            table.early = HashMap::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_become_the_exit_codes_that_containerd_expects() {
        // Linux's encoding: the signal in the low 7 bits, 0x80 for a core dump, the exit code in the next byte; 0x7f is
        // stopped.
        let cases = [
            (0, Some(0)),
            (1 << 8, Some(1)),
            (255 << 8, Some(255)),
            (libc::SIGTERM, Some(143)),
            (libc::SIGKILL, Some(137)),
            (libc::SIGSEGV | 0x80, Some(139)),
            (34, Some(162)),
            (64, Some(192)),
            (libc::SIGSTOP << 8 | 0x7f, None),
            (0xffff, None),
        ];
        for (status, expected) in cases {
            assert_eq!(decode(status), expected, "{status:#x}");
        }
    }

    fn exit(status: u32) -> Exit {
        Exit { status, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn an_exit_is_delivered_whether_it_precedes_or_follows_its_registration() {
        let reaper = Arc::new(Reaper::default());
        let creation = reaper.creation();
        let mut late = creation.exit_of(10);
        reaper.table().ended(10, exit(1));
        reaper.table().ended(11, exit(2));
        let mut early = creation.exit_of(11);
        assert_eq!(late.try_recv().unwrap(), exit(1));
        assert_eq!(early.try_recv().unwrap(), exit(2));
    }

    #[test]
    fn exits_that_nobody_can_register_for_are_discarded() {
        let reaper = Arc::new(Reaper::default());
        reaper.table().ended(10, exit(1));
        assert!(reaper.table().early.is_empty());
        let (one, two) = (reaper.creation(), reaper.creation());
        reaper.table().ended(11, exit(1));
        drop(one);
        assert_eq!(reaper.table().early.len(), 1);
        drop(two);
        assert!(reaper.table().early.is_empty());
    }

    #[test]
    fn an_unregistered_pid_is_never_signalled() {
        let reaper = Arc::new(Reaper::default());
        let me = std::process::id() as i32;
        assert_eq!(reaper.kill(me, 0), Err(Errno::ESRCH));
        let creation = reaper.creation();
        let _exit = creation.exit_of(me);
        assert_eq!(reaper.kill(me, 0), Ok(()));
        reaper.table().ended(me, exit(0));
        assert_eq!(reaper.kill(me, 0), Err(Errno::ESRCH));
    }
}
