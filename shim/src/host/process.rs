//! Identifies processes so that a reused PID is never mistaken for the original: PID, start time, pidfd. `child.rs`
//! starts processes.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use procfs::process::Process;
use procfs::{ProcError, ProcResult};
use serde::{Deserialize, Serialize};

/// Identifies a process. A later process with the same PID has another start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// PID in the shim's PID namespace.
    pub pid: u32,
    /// Clock ticks from the host's boot to the start of the process: field 22 of `/proc/<pid>/stat` (proc_pid_stat(5)).
    pub start_time: u64,
}

/// Result of [`ProcessId::kill`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Killed {
    /// The process had ended before; its PID may belong to another one by now.
    AlreadyGone,
    /// The process was killed and is dead.
    Now,
}

impl ProcessId {
    /// The calling process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id())?.ok_or_else(|| io::Error::other("/proc does not list this process"))
    }

    /// The process that has `pid` now, or `None` if there is none.
    ///
    /// # Errors
    /// When `/proc/<pid>/stat` cannot be read or parsed.
    pub fn of(pid: u32) -> io::Result<Option<Self>> {
        let stat = found(Process::new(pid.cast_signed()).and_then(|process| process.stat()))?;
        Ok(stat.map(|stat| Self { pid, start_time: stat.starttime }))
    }

    /// Whether the process exists; a zombie does.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn exists(self) -> io::Result<bool> {
        Ok(Self::of(self.pid)? == Some(self))
    }

    /// Whether the process still runs. A zombie does not: the process that adopted it may reap it late.
    ///
    /// # Errors
    /// Those of [`ProcessId::pidfd`] and poll(2).
    pub fn runs(self) -> io::Result<bool> {
        match self.pidfd()? {
            Some(fd) => Ok(!wait_dead(fd, Duration::ZERO)?),
            None => Ok(false),
        }
    }

    /// A handle on the process, or `None` if it is gone.
    ///
    /// # Errors
    /// Those of pidfd_open(2), or when `/proc` cannot be read.
    pub fn pidfd(self) -> io::Result<Option<OwnedFd>> {
        let Some(fd) = pidfd_open(self.pid)? else { return Ok(None) };
        // Check after opening: if the PID names the original process now, it did so when the handle was opened.
        Ok(self.exists()?.then_some(fd))
    }

    /// Sets how eagerly the OOM killer takes the process (proc_pid_oom_score_adj(5)). Without a score, takes only an
    /// inherited protection away. Does nothing if the process has ended.
    ///
    /// # Errors
    /// When the file cannot be written, for example because a lower score requires CAP_SYS_RESOURCE.
    pub(crate) fn set_oom_score(self, score: Option<i32>) -> io::Result<()> {
        let path = format!("/proc/{}/oom_score_adj", self.pid);
        let mut file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        let mut inherited = String::new();
        let written = file.read_to_string(&mut inherited).and_then(|_| {
            // Check after opening: if the PID names the original process now, it did so then.
            let runs = self.exists()?;
            match score {
                Some(score) if runs => file.write_all(score.to_string().as_bytes()),
                None if runs && inherited.starts_with('-') => file.write_all(b"0"),
                _ => Ok(()),
            }
        });
        match written {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            written => written,
        }
    }

    /// Its mount namespace.
    ///
    /// # Errors
    /// ESRCH if the process has exited.
    pub(crate) fn mount_namespace(self) -> io::Result<File> {
        let namespace = File::open(format!("/proc/{}/ns/mnt", self.pid))?;
        // Check after opening: if the PID names the process now, it did so then.
        if self.exists()? { Ok(namespace) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    }

    /// The children of the main thread. Empty if the process is gone, or if the kernel lacks CONFIG_PROC_CHILDREN.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn children(self) -> io::Result<Vec<Self>> {
        let main_thread = Process::new(self.pid.cast_signed()).and_then(|process| process.task_main_thread());
        let listed = found(main_thread.and_then(|thread| thread.children()))?.unwrap_or_default();
        let mut children = Vec::new();
        // Check after listing: otherwise the children may be those of a later process with this PID.
        if self.exists()? {
            for pid in listed {
                children.extend(Self::of(pid)?);
            }
        }
        Ok(children)
    }

    /// Its threads' TIDs, by those that they have in their own PID namespace. Without the threads that end meanwhile.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(crate) fn threads_by_inner_number(self) -> io::Result<HashMap<i32, i32>> {
        let tasks = found(Process::new(self.pid.cast_signed()).and_then(|process| process.tasks()))?;
        let mut threads = HashMap::new();
        for task in tasks.into_iter().flatten() {
            let Some(status) = found(task.and_then(|task| task.status()))? else { continue };
            // From the namespace of /proc to the thread's own: proc_pid_status(5).
            let inner = status.nspid.as_ref().and_then(|numbers| numbers.last()).copied().unwrap_or(status.pid);
            threads.insert(inner, status.pid);
        }
        Ok(threads)
    }

    /// Sends SIGKILL and returns a handle to wait with; `None` if the process had ended before.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn send_kill(self) -> io::Result<Option<OwnedFd>> {
        self.send(libc::SIGKILL)
    }

    /// Sends SIGTERM and returns a handle to wait with; `None` if the process had ended before.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn send_terminate(self) -> io::Result<Option<OwnedFd>> {
        self.send(libc::SIGTERM)
    }

    /// Sends SIGHUP; a process that has ended is no error.
    ///
    /// # Errors
    /// Those of the system calls.
    pub(crate) fn send_hangup(self) -> io::Result<()> {
        self.send(libc::SIGHUP).map(drop)
    }

    fn send(self, signal: i32) -> io::Result<Option<OwnedFd>> {
        let Some(fd) = self.pidfd()? else { return Ok(None) };
        match pidfd_send_signal(&fd, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            other => other.map(|()| Some(fd)),
        }
    }

    /// Sends SIGKILL and waits until the process is dead. Leaves its exit status to its parent.
    ///
    /// # Errors
    /// `TimedOut` if the process is still alive after `within`; otherwise those of the system calls.
    pub fn kill(self, within: Duration) -> io::Result<Killed> {
        let Some(fd) = self.send_kill()? else { return Ok(Killed::AlreadyGone) };
        if wait_dead(&fd, within)? {
            Ok(Killed::Now)
        } else {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("process {} is still alive {} ms after SIGKILL", self.pid, within.as_millis()),
            ))
        }
    }
}

/// `None` if the process is gone. procfs reports both ENOENT and ESRCH as `NotFound`.
fn found<T>(result: ProcResult<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(ProcError::NotFound(_)) => Ok(None),
        Err(error @ ProcError::PermissionDenied(_)) => Err(io::Error::new(io::ErrorKind::PermissionDenied, error)),
        Err(error @ ProcError::Io(..)) => Err(io::Error::other(error)),
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}

/// Opens a handle on the process that has `pid` now, or `None` if there is none. The handle is close-on-exec.
///
/// # Errors
/// Those of pidfd_open(2).
pub fn pidfd_open(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match Errno::result(fd) {
        // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) })),
        Err(Errno::ESRCH) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Sends `signal` to the process behind `pidfd`.
///
/// # Errors
/// Those of pidfd_send_signal(2); ESRCH if the process has been reaped.
pub fn pidfd_send_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is valid, and the call permits a null siginfo.
    let r = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(r).map(drop).map_err(Into::into)
}

/// Waits until the process behind `pidfd` is dead; a zombie is. Returns false if `within` passes first.
///
/// # Errors
/// Those of poll(2).
pub fn wait_dead(pidfd: impl AsFd, within: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, to avoid spinning in the last fraction of a millisecond.
        let millis = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(millis)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use procfs::FromRead;

    use super::*;

    /// Names may contain spaces and parentheses, which the parser of `/proc/<pid>/stat` must not count as fields.
    #[test]
    fn the_start_time_does_not_depend_on_the_programs_name() {
        let tail =
            "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36";
        let parse = |stat: &str| procfs::process::Stat::from_read(stat.as_bytes()).map(|stat| stat.starttime).ok();
        for (name, expected) in [("sh", Some(4242)), ("a b", Some(4242)), (") S 1 (x)", Some(4242))] {
            assert_eq!(parse(&format!("7 ({name}) {tail}")), expected, "{name}");
        }
        for broken in ["", "7 (sh", "7 (sh) S 1", "7 (sh) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x"] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn a_pid_without_a_process_is_none() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        for pid in [child.id(), u32::MAX] {
            assert_eq!(ProcessId::of(pid).unwrap(), None, "{pid}");
        }
    }

    #[test]
    fn an_oom_score_is_set_and_without_one_only_a_protection_is_taken_away() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        let score = || std::fs::read_to_string(format!("/proc/{}/oom_score_adj", child.id())).unwrap();
        id.set_oom_score(Some(321)).unwrap();
        assert_eq!(score(), "321\n");
        id.set_oom_score(None).unwrap();
        assert_eq!(score(), "321\n");
        ProcessId { start_time: id.start_time + 1, ..id }.set_oom_score(Some(400)).unwrap();
        assert_eq!(score(), "321\n");
        child.kill().unwrap();
        child.wait().unwrap();
        id.set_oom_score(Some(400)).unwrap();
    }

    #[test]
    fn children_are_found() {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "sleep 600 >/dev/null & echo; wait"]).stdout(std::process::Stdio::piped());
        let mut parent = command.spawn().unwrap();
        let mut newline = [0];
        io::Read::read_exact(parent.stdout.as_mut().unwrap(), &mut newline).unwrap();
        let id = ProcessId::of(parent.id()).unwrap().unwrap();
        let children = id.children().unwrap();
        assert_eq!(children.len(), 1);
        id.kill(Duration::from_secs(5)).unwrap();
        parent.wait().unwrap();
        assert_eq!(children[0].kill(Duration::from_secs(5)).unwrap(), Killed::Now);
        assert_eq!(id.children().unwrap(), []);
    }

    #[test]
    fn a_reused_pid_is_not_killed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        let earlier = ProcessId { start_time: id.start_time - 1, ..id };
        assert_eq!(earlier.kill(Duration::from_secs(5)).unwrap(), Killed::AlreadyGone);
        assert!(id.exists().unwrap());
        assert!(!wait_dead(pidfd_open(id.pid).unwrap().unwrap(), Duration::from_millis(5)).unwrap());
        assert!(id.runs().unwrap());
        assert_eq!(id.kill(Duration::from_secs(5)).unwrap(), Killed::Now);
        assert!(id.exists().unwrap() && !id.runs().unwrap(), "a zombie exists and does not run");
        child.wait().unwrap();
        assert!(!id.exists().unwrap() && !id.runs().unwrap());
        assert_eq!(id.kill(Duration::from_secs(5)).unwrap(), Killed::AlreadyGone);
    }
}
