//! Naming a process so that another one is never taken for it, and ending it: pid, start time, pidfd.
//! Starting processes is not here, see `vm/launch.rs`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// A process, told apart from every later one that gets the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Pid in the shim's pid namespace.
    pub pid: u32,
    /// Clock ticks between the host's boot and the process's start: field 22 of `/proc/<pid>/stat` (proc_pid_stat(5)).
    pub start_time: u64,
}

/// What [`ProcessId::kill`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Killed {
    /// It had ended before, or the pid belongs to another process by now.
    AlreadyGone,
    /// It was killed, and is dead.
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

    /// The process that has `pid` now, or `None` when there is none.
    ///
    /// # Errors
    /// When `/proc/<pid>/stat` cannot be read or understood.
    pub fn of(pid: u32) -> io::Result<Option<Self>> {
        let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat,
            // ESRCH: the process went away between open and read.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        let start_time = start_time(&stat)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat: no start time")))?;
        Ok(Some(Self { pid, start_time }))
    }

    /// Whether this very process is still in the table (a zombie is).
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn exists(self) -> io::Result<bool> {
        Ok(Self::of(self.pid)? == Some(self))
    }

    /// Whether this very process still runs. One that has ended and is not waited for yet (a zombie) does not: whoever adopted it may take
    /// its time.
    ///
    /// # Errors
    /// When it cannot be looked for.
    pub fn runs(self) -> io::Result<bool> {
        match self.pidfd()? {
            Some(fd) => Ok(!wait_dead(fd, Duration::ZERO)?),
            None => Ok(false),
        }
    }

    /// A handle on this very process, or `None` when it is gone.
    ///
    /// # Errors
    /// pidfd_open(2)'s, or when `/proc` cannot be read.
    pub fn pidfd(self) -> io::Result<Option<OwnedFd>> {
        let Some(fd) = pidfd_open(self.pid)? else { return Ok(None) };
        // Only after the handle is open: if the pid still names our process now, then the handle does too, because
        // ours is older than whatever could have had the pid after it.
        Ok(self.exists()?.then_some(fd))
    }

    /// Its children; none when it is gone, or when the kernel cannot tell (CONFIG_PROC_CHILDREN).
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn children(self) -> io::Result<Vec<Self>> {
        let mut children = Vec::new();
        let listed = match fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid)) {
            Ok(text) if self.exists()? => text,
            Err(e) if e.kind() != io::ErrorKind::NotFound && e.raw_os_error() != Some(libc::ESRCH) => return Err(e),
            _ => return Ok(children),
        };
        for pid in listed.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()) {
            children.extend(Self::of(pid)?);
        }
        Ok(children)
    }

    /// Sends SIGKILL, and returns a handle to wait by; `None` when it had ended before.
    ///
    /// # Errors
    /// What the system calls say.
    pub fn send_kill(self) -> io::Result<Option<OwnedFd>> {
        let Some(fd) = self.pidfd()? else { return Ok(None) };
        match pidfd_send_signal(&fd, libc::SIGKILL) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            other => other.map(|()| Some(fd)),
        }
    }

    /// Sends SIGKILL and waits until the process is dead. Its exit status is left to its parent.
    ///
    /// # Errors
    /// `TimedOut` when it is still there after `within`; otherwise what the system calls say.
    pub fn kill(self, within: Duration) -> io::Result<Killed> {
        let Some(fd) = self.send_kill()? else { return Ok(Killed::AlreadyGone) };
        if wait_dead(&fd, within)? {
            Ok(Killed::Now)
        } else {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("process {} still lives {} ms after SIGKILL", self.pid, within.as_millis()),
            ))
        }
    }
}

/// Opens a close-on-exec handle on whatever process has `pid`, or `None` when there is none.
///
/// # Errors
/// pidfd_open(2)'s.
pub fn pidfd_open(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match Errno::result(fd) {
        // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) })),
        Err(Errno::ESRCH) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Sends `signal` to the process behind `pidfd`.
///
/// # Errors
/// pidfd_send_signal(2)'s; ESRCH when it has ended and been waited for.
pub fn pidfd_send_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: a valid descriptor, and a null siginfo, which the call permits.
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

/// Waits for the death (zombies are dead) of the process behind `pidfd`; false when `within` passes first.
///
/// # Errors
/// poll(2)'s.
pub fn wait_dead(pidfd: impl AsFd, within: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last fraction of a millisecond is not spent spinning.
        let millis = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(millis)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Field 22 of a stat line. The second field is the program's name in parentheses, and may hold spaces and parentheses
/// itself, so counting starts after the last one.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_found_behind_any_program_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        for (name, want) in [("sh", Some(4242)), ("a b", Some(4242)), (") S 1 (x)", Some(4242))] {
            assert_eq!(start_time(&format!("7 ({name}) {tail}")), want, "{name}");
        }
        for broken in ["", "7 (sh", "7 (sh) S 1", "7 (sh) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x"] {
            assert_eq!(start_time(broken), None, "{broken}");
        }
    }

    #[test]
    fn children_are_found() {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "sleep 600 >/dev/null & echo; wait"]).stdout(std::process::Stdio::piped());
        let mut parent = command.spawn().unwrap();
        let mut said = [0];
        io::Read::read_exact(parent.stdout.as_mut().unwrap(), &mut said).unwrap();
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
        assert!(id.exists().unwrap() && !id.runs().unwrap(), "a zombie is there and does not run");
        child.wait().unwrap();
        assert!(!id.exists().unwrap() && !id.runs().unwrap());
        assert_eq!(id.kill(Duration::from_secs(5)).unwrap(), Killed::AlreadyGone);
    }
}
