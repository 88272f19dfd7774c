//! Starts processes: PID 1 executes its own binary under another name. posix_spawn shares PID 1's memory until the
//! exec, whereas fork would copy its page tables. The caller registers the PID with the reaper.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::SigSet;
use nix::sys::stat::Mode;
use nix::unistd::Pid;

/// The standard streams of a new process. A stream that is None becomes /dev/null.
#[derive(Debug, Default)]
pub(crate) struct ChildStreams {
    /// Read end of its stdin.
    pub(crate) stdin: Option<OwnedFd>,
    /// Write end of its stdout.
    pub(crate) stdout: Option<OwnedFd>,
    /// Write end of its stderr.
    pub(crate) stderr: Option<OwnedFd>,
    /// With a terminal: the process waits on this descriptor before it runs. See [`crate::worker::console`].
    pub(crate) gate: Option<OwnedFd>,
}

/// Executes this binary in a new process and returns its PID. `args` start with argv\[0\]; `more` are further
/// descriptors, each with its number in the new process. The process has default signal handlers and an empty signal
/// mask.
///
/// # Errors
/// When descriptors, memory or PIDs run out.
pub(crate) fn spawn_self(
    args: &[CString],
    env: &[CString],
    streams: &ChildStreams,
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
