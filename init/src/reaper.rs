//! The only wait in the process: every child of PID 1 is reaped here, and who asked for a pid is told its status.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use nix::errno::Errno;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0..=255 as the process said it, or 128 plus the signal that killed it.
    pub status: u32,
    /// When it was reaped.
    pub at: SystemTime,
}

/// The exit status that containerd wants, from wait(2)'s raw one; none when the process did not end.
///
/// Not by nix's `WaitStatus`: it knows no real-time signals, and fails on the status of a process that one has killed.
pub fn decode(status: i32) -> Option<u32> {
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
    /// Creations under way. While there is one, a child that nobody waits for may be its process, whose pid has not been told yet.
    creations: usize,
    early: HashMap<i32, Exit>,
}

/// Pids of children and who waits for them.
#[derive(Debug, Default)]
pub struct Reaper(Mutex<Table>);

impl Reaper {
    /// Starts reaping on the current runtime.
    ///
    /// # Errors
    /// When SIGCHLD cannot be listened to.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child())?;
        let this = reaper.clone();
        tokio::spawn(async move {
            // Reaped once before the first signal is waited for: a child may have ended before the handler was there.
            loop {
                this.reap();
                if children.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(reaper)
    }

    /// Announces that a process is about to be made. An exit that comes before its pid is known is kept until the answer is dropped.
    pub fn creation(self: &Arc<Self>) -> Creation {
        self.table().creations += 1;
        Creation(self.clone())
    }

    /// Sends a signal to a child that is waited for and was not reaped yet: a pid that the kernel has given away again is never hit.
    ///
    /// # Errors
    /// ESRCH when the pid is not such a child; else what kill(2) says.
    pub fn kill(&self, pid: i32, signal: i32) -> Result<(), Errno> {
        let table = self.table();
        if !table.waiters.contains_key(&pid) {
            return Err(Errno::ESRCH);
        }
        kill_raw(pid, signal)
    }

    /// Like [`Reaper::kill`], for the process group that the child leads.
    pub fn kill_group(&self, leader: i32, signal: i32) -> Result<(), Errno> {
        let table = self.table();
        if !table.waiters.contains_key(&leader) {
            return Err(Errno::ESRCH);
        }
        kill_raw(-leader, signal)
    }

    fn reap(&self) {
        // The lock is held across waitpid, which frees the pid: kill() above sees a pid as a child, or not at all.
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
                    tracing::error!(%error, "wait for children");
                    return;
                }
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Sends any signal number, real-time ones included, which nix's `Signal` does not know; to a process group if the pid is negative.
pub fn kill_raw(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: kill(2) takes two integers and touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

impl Table {
    fn ended(&mut self, pid: i32, exit: Exit) {
        match self.waiters.remove(&pid) {
            // A waiter that went away does not want to know.
            Some(waiter) => drop(waiter.send(exit)),
            None if self.creations > 0 => drop(self.early.insert(pid, exit)),
            // An orphan of a container, or a helper of libcontainer's.
            None => {}
        }
    }

    fn wait(&mut self, pid: i32) -> oneshot::Receiver<Exit> {
        let (told, exit) = oneshot::channel();
        match self.early.remove(&pid) {
            Some(early) => drop(told.send(early)),
            None => drop(self.waiters.insert(pid, told)),
        }
        exit
    }
}

/// A process is being made. Only who holds this can ask for an exit, so no exit can be missed.
#[derive(Debug)]
pub struct Creation(Arc<Reaper>);

impl Creation {
    /// The exit of `pid`, also if it has ended already.
    pub fn exit_of(&self, pid: i32) -> oneshot::Receiver<Exit> {
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
    fn statuses_are_decoded_as_containerd_expects_them() {
        // Linux's encoding: the signal in the low 7 bits, 0x80 for a core, the code in the next byte; 0x7f is stopped.
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
        for (status, want) in cases {
            assert_eq!(decode(status), want, "{status:#x}");
        }
    }

    fn exit(status: u32) -> Exit {
        Exit { status, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn an_exit_is_told_whether_it_comes_before_or_after_its_registration() {
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
    fn exits_that_nobody_can_ask_for_are_forgotten() {
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
    fn a_pid_that_is_not_waited_for_is_never_signalled() {
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
