//! Kill: sends signals to processes.

use nix::errno::Errno;

use super::Tasks;
use super::container::Container;
use super::process::ProcessState;
use crate::cgroup;
use crate::error::{CallError, FailureKind};
use crate::reaper::kill_raw;

/// The kernel's highest signal number (`_NSIG`).
const SIGNAL_MAX: u32 = 64;

impl Tasks {
    /// Sends a signal to a process, or with `all` to every process of its container. Like runc, fails with NotFound if
    /// the process has exited; with FailedPrecondition if it was not started.
    pub(crate) fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), CallError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let pid = match process.state() {
            ProcessState::Created { pid }
            | ProcessState::Running { pid }
            | ProcessState::Starting { pid: Some(pid) } => pid,
            ProcessState::Added | ProcessState::Starting { pid: None } | ProcessState::Stopped { pid: 0, .. } => {
                return Err(CallError::new(FailureKind::FailedPrecondition, "process not created"));
            }
            // Other processes of the container may have outlived this one.
            ProcessState::Stopped { pid, .. } if all => pid,
            ProcessState::Stopped { .. } | ProcessState::Deleted => return Err(finished()),
        };
        if !(1..=SIGNAL_MAX).contains(&signal) {
            return Err(CallError::new(FailureKind::InvalidArgument, format!("{signal} is not a signal")));
        }
        if signal as i32 == libc::SIGKILL {
            // A killed program ends only after what it waits for: of a paused container, perhaps a frozen filesystem.
            self.disks.thaw(id);
        }
        if all {
            return kill_all(&container, signal as i32);
        }
        self.reaper.kill(pid, signal as i32).map_err(|error| match error {
            Errno::ESRCH => finished(),
            other => CallError::internal(format_args!("send signal {signal} to {pid}"), &other),
        })
    }
}

fn kill_all(container: &Container, signal: i32) -> Result<(), CallError> {
    let cgroup = container.cgroup();
    let failed = |e: &dyn std::error::Error| {
        CallError::internal(format_args!("send signal {signal} to all processes of {}", container.id), e)
    };
    if signal == libc::SIGKILL {
        return cgroup::kill(&cgroup).map_err(|e| failed(&e));
    }
    for pid in cgroup::processes(&cgroup).map_err(|e| failed(&e))? {
        // PID 1 is not the parent of these processes. If one exits after the list was read, its PID could belong to
        // another process, but only after the kernel has used up all of pid_max. runc takes the same risk.
        match kill_raw(pid, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    Ok(())
}

fn finished() -> CallError {
    CallError::new(FailureKind::NotFound, "process already finished")
}
