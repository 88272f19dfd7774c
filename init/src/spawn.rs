//! How PID 1 starts a process: itself again under another name, by posix_spawn, which shares its memory until the exec, where a fork would copy
//! its page tables. Whoever calls has the reaper know the pid.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::SigSet;
use nix::sys::stat::Mode;
use nix::unistd::Pid;

/// The standard streams of a new process; /dev/null for those that are none.
#[derive(Debug, Default)]
pub struct Streams {
    /// Read end of its stdin.
    pub stdin: Option<OwnedFd>,
    /// Write end of its stdout.
    pub stdout: Option<OwnedFd>,
    /// Write end of its stderr.
    pub stderr: Option<OwnedFd>,
    /// What it waits for before it runs, if its streams are a terminal; see [`crate::worker::console`].
    pub gate: Option<OwnedFd>,
}

/// Starts this program again. `args` begin with its name; `more` are descriptors that it gets beside its streams, each with its number there.
/// Nothing of PID 1's signals is inherited.
///
/// # Errors
/// When descriptors, memory or pids run out.
pub fn again(
    args: &[CString],
    env: &[CString],
    streams: &Streams,
    more: &[(&OwnedFd, i32)],
    leads_group: bool,
) -> io::Result<i32> {
    let mut actions = PosixSpawnFileActions::init()?;
    for (fd, stream) in [&streams.stdin, &streams.stdout, &streams.stderr].into_iter().enumerate() {
        match stream {
            Some(stream) => actions.add_dup2(stream.as_raw_fd(), fd as i32)?,
            None => actions.add_open(fd as i32, "/dev/null", OFlag::O_RDWR, Mode::empty())?,
        }
    }
    for (ours, theirs) in more {
        actions.add_dup2(ours.as_raw_fd(), *theirs)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_pgroup(Pid::from_raw(0))?;
    let mut flags = PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK;
    flags.set(PosixSpawnFlags::POSIX_SPAWN_SETPGROUP, leads_group);
    attributes.set_flags(flags)?;
    Ok(posix_spawn("/proc/self/exe", &actions, &attributes, args, env)?.as_raw())
}
