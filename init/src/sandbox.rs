//! A sandbox without a pause container: a process that holds the namespaces which the sandbox's containers share.
//!
//! PID 1 executes its own binary under [`NAME`]. That intermediate process creates the namespaces, forks, and reports its
//! child, which is the init of the PID namespace: it reaps what the containers leave, and runs until the guest ends.

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::SANDBOX_SHM;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2, setsid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::timeout;

use crate::error::{CallError, FailureKind};
use crate::reaper::Reaper;
use crate::spawn::{self, ChildStreams};
use crate::worker::sysctls;

/// argv\[0\] of the intermediate process.
pub(crate) const NAME: &str = "husk-sandbox";
/// Time until the namespaces exist.
const DEADLINE: Duration = Duration::from_secs(10);

/// Creates the namespaces and the shared /dev/shm, with the size that containerd gives a pod's. Returns the PID of the process that holds them.
///
/// # Errors
/// Those of the kernel, and TimedOut.
pub(crate) async fn start(reaper: &Arc<Reaper>) -> io::Result<u32> {
    fs::create_dir_all(SANDBOX_SHM)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("shm"), SANDBOX_SHM, Some("tmpfs"), flags, Some("mode=1777,size=64m"))?;
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

/// Sets sysctls in the caller's network namespace and in the IPC and UTS namespaces that `holder` holds, in the order of
/// their names. The files of a namespace are those that the opening thread sees, so a thread of its own enters them.
///
/// # Errors
/// `FailedPrecondition` without a holder, `InvalidArgument` for a sysctl that cannot be set.
pub(crate) fn set_sysctls(holder: u32, sysctls: HashMap<String, String>) -> Result<(), CallError> {
    if holder == 0 {
        return Err(CallError::new(FailureKind::FailedPrecondition, "the guest has no sandbox"));
    }
    let mut sysctls: Vec<_> = sysctls.into_iter().collect();
    sysctls.sort();
    let set = move || {
        for kind in ["ipc", "uts"] {
            let entered = fs::File::open(format!("/proc/{holder}/ns/{kind}"))
                .and_then(|namespace| Ok(setns(namespace, CloneFlags::empty())?));
            entered.map_err(|e| CallError::internal(format_args!("enter the sandbox's {kind} namespace"), &e))?;
        }
        sysctls::write(&sysctls).map_err(|why| CallError::new(FailureKind::InvalidArgument, why))
    };
    match std::thread::spawn(set).join() {
        Ok(done) => done,
        Err(_) => Err(CallError::new(FailureKind::Internal, "set the sandbox's sysctls: the thread panicked")),
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
        let set = |sysctls: &[(&str, &str)]| {
            let sysctls = sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            set_sysctls(pid.cast_unsigned(), sysctls)
        };
        let own = fs::read_to_string("/proc/sys/kernel/shm_rmid_forced").unwrap();
        set(&[("kernel.shm_rmid_forced", if own == "1\n" { "0" } else { "1" })]).unwrap();
        assert_eq!(fs::read_to_string("/proc/sys/kernel/shm_rmid_forced").unwrap(), own, "this namespace's");
        let error = set(&[("kernel.shm_nonsense", "1")]).unwrap_err();
        assert_eq!(error.kind, FailureKind::InvalidArgument);
        assert!(error.message.starts_with("write sysctl key kernel.shm_nonsense: open "), "{error}");
        nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        assert_eq!(set_sysctls(0, HashMap::new()).unwrap_err().kind, FailureKind::FailedPrecondition);
    }
}
