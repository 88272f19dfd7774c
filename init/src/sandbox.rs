//! A sandbox without a pause container: a process that holds the namespaces which the sandbox's containers share.
//!
//! PID 1 executes its own binary under [`NAME`]. That intermediate process creates the namespaces, forks, and reports its
//! child, which is the init of the PID namespace: it reaps what the containers leave, and runs until the guest ends.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2, setsid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::timeout;

use crate::reaper::Reaper;
use crate::spawn::{self, ChildStreams};

/// argv\[0\] of the intermediate process.
pub(crate) const NAME: &str = "husk-sandbox";
/// Time until the namespaces exist.
const DEADLINE: Duration = Duration::from_secs(10);

/// Creates the namespaces. Returns the PID of the process that holds them.
///
/// # Errors
/// Those of the kernel, and TimedOut.
pub(crate) async fn start(reaper: &Arc<Reaper>) -> io::Result<u32> {
    let (report, stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let args = [CString::new(NAME)?];
    // The intermediate process is reaped like every child. Nobody waits for it.
    let creation = reaper.creation();
    let streams = ChildStreams { stdout: Some(stdout), ..ChildStreams::default() };
    drop(creation.exit_of(spawn::spawn_self(&args, &[], &streams, &[], true)?));
    // Only the new process may hold this end, or a failure would look like a delay.
    drop(streams);
    let mut report = Receiver::from_owned_fd(report)?;
    match timeout(DEADLINE, report.read_u32_le()).await {
        Ok(Ok(pid)) => Ok(pid),
        Ok(Err(_)) => Err(io::Error::other("the process that creates the namespaces failed")),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Runs in the intermediate process and, after the fork, in the one that holds the namespaces.
pub(crate) fn become_sandbox() -> ExitCode {
    match split() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The guest's console: stderr is /dev/null.
            crate::console::write(&format!("husk: create the sandbox's namespaces: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Creates the namespaces and their holder, and reports it.
fn split() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWPID)?;
    // SAFETY: this process has one thread, so the child may do everything.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            nix::unistd::write(io::stdout(), &child.as_raw().cast_unsigned().to_le_bytes())?;
            Ok(())
        }
        ForkResult::Child => hold().map(|never| match never {}),
    }
}

/// The init of the PID namespace.
fn hold() -> io::Result<Infallible> {
    // SAFETY: closes all descriptors; nothing in this process owns one any more.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) })?;
    setsid()?;
    prctl::set_name(c"husk-sandbox")?;
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block()?;
    loop {
        // A signal that arrives in between stays pending.
        while !matches!(waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive) | Err(_)) {}
        children.wait()?;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn the_holder_has_namespaces_of_its_own() {
        if !nix::unistd::geteuid().is_root() {
            panic!("this test needs root");
        }
        let (report, stdout) = pipe2(OFlag::O_CLOEXEC).unwrap();
        // SAFETY: the child calls only functions that are async-signal-safe in effect: it has one thread, and uses no lock
        // that another thread of the test may hold.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                // SAFETY: dup2 onto stdout of this process.
                unsafe { libc::dup2(stdout.as_raw_fd(), 1) };
                let code = i32::from(split().is_err());
                // SAFETY: ends the child without the test's destructors.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
            }
        }
        let mut pid = [0; 4];
        nix::unistd::read(&report, &mut pid).unwrap();
        let pid = i32::from_le_bytes(pid);
        for kind in ["ipc", "uts", "pid"] {
            let link = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).unwrap();
            assert_ne!(link(&pid.to_string()), link("self"), "{kind}");
        }
        nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }
}
