//! The step between PID 1 and the agent: what the agent must not have of PID 1 is taken off in a process between the two, PID 1's own program once
//! more, which then becomes the agent. (PID 1 cannot do that between a fork and an exec: it does not fork.)
//!
//! Why it could not be done comes back through a pipe, which an exec that succeeds closes.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::stat::Mode;
use nix::unistd::{execve, pipe2, setsid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::reaper::{Exit, Reaper};
use crate::{boot, cgroup};

/// argv[0] of a process that is about to become the agent.
pub const NAME: &str = "husk-launch";
/// Where it says why it cannot.
const STATUS_FD: i32 = 3;
/// Most bytes of that.
const STATUS_MAX: u64 = 1024;
/// Until it has become the agent.
const DEADLINE: Duration = Duration::from_secs(20);
/// After every container's, whose own may be as low as a kubelet's -997, and before PID 1's: an agent that is the leak itself can be killed for it.
const OOM_SCORE_ADJ: &str = "-999";
/// Open files at first, as everywhere; the agent may raise it.
const OPEN_FILES: u64 = 1024;
const ENVIRONMENT: [&CStr; 1] = [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];

/// Starts the agent, whose output goes into `output`; its pid, and where its exit will be told.
///
/// # Errors
/// What it failed of, also when the agent cannot be executed.
pub async fn launch(
    reaper: &Arc<Reaper>,
    program: &str,
    output: &OwnedFd,
) -> io::Result<(i32, oneshot::Receiver<Exit>)> {
    let (status, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    // An agent that ends at once is not missed: its exit is kept until it is asked for.
    let creation = reaper.creation();
    let pid = spawn(program, output, &theirs)?;
    let exit = creation.exit_of(pid);
    // The other end is the process's alone now: without that, the pipe would never come to its end.
    drop(theirs);
    let mut said = String::new();
    let mut status = Receiver::from_owned_fd(status)?.take(STATUS_MAX);
    match timeout(DEADLINE, status.read_to_string(&mut said)).await {
        Ok(Ok(0)) => Ok((pid, exit)),
        Ok(Ok(_)) => Err(io::Error::other(said)),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            // It may have ended just now.
            let _ = reaper.kill(pid, libc::SIGKILL);
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("it did not start within {DEADLINE:?}")))
        }
    }
}

fn spawn(program: &str, output: &OwnedFd, status: &OwnedFd) -> io::Result<i32> {
    let mut actions = PosixSpawnFileActions::init()?;
    actions.add_open(0, "/dev/null", OFlag::O_RDONLY, Mode::empty())?;
    for fd in [1, 2] {
        actions.add_dup2(output.as_raw_fd(), fd)?;
    }
    actions.add_dup2(status.as_raw_fd(), STATUS_FD)?;
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK)?;
    let args = [CString::new(NAME)?, CString::new(program)?];
    Ok(posix_spawn("/proc/self/exe", &actions, &attributes, &args, &ENVIRONMENT)?.as_raw())
}

/// In the new process: becomes the agent, or tells why not.
pub fn become_agent(program: &str) -> ExitCode {
    // SAFETY: PID 1 has put the pipe on this descriptor, and nothing else in this process has taken it.
    let status = unsafe { OwnedFd::from_raw_fd(STATUS_FD) };
    let Err(why) = prepare(program, &status);
    // PID 1 may have given it up; then nobody wants to know.
    let _ = File::from(status).write_all(why.as_bytes());
    ExitCode::FAILURE
}

/// Names the step in what is told.
fn step<T>(what: &str, done: Result<T, impl Display>) -> Result<T, String> {
    done.map_err(|error| format!("{what}: {error}"))
}

fn prepare(program: &str, status: &OwnedFd) -> Result<Infallible, String> {
    step("keep the pipe", fcntl(status, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)))?;
    // Itself, so that nothing that it will start can be anywhere else.
    step("enter its cgroup", fs::write(format!("{}/cgroup.procs", cgroup::SUPERVISOR), "0"))?;
    step("set oom_score_adj", fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ))?;
    step("reset the personality", boot::randomize_addresses())?;
    let most = step("read the limit of open files", getrlimit(Resource::RLIMIT_NOFILE))?.1;
    step("set the limit of open files", setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, most))?;
    step("begin a session", setsid())?;
    // Rust's runtime ignores it, and an exec would pass that on.
    // SAFETY: the default action is no handler that could do anything wrong.
    step("reset SIGPIPE", unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) })?;
    let path = step(program, CString::new(program))?;
    step(&format!("execute {program}"), execve(&path, &[&path], &ENVIRONMENT))
}
