//! Signals.

use nix::errno::Errno;

use super::Tasks;
use super::container::Container;
use super::process::State;
use crate::cgroup;
use crate::error::{Error, Kind};
use crate::reaper::kill_raw;

/// The kernel's highest signal (`_NSIG`).
const SIGNAL_MAX: u32 = 64;

impl Tasks {
    /// Sends a signal to a process, or with `all` to every process of its container.
    ///
    /// # Errors
    /// NotFound when it has ended, as runc answers; FailedPrecondition when it has not begun.
    pub fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let pid = match process.state() {
            State::Created { pid } | State::Running { pid } | State::Starting { pid: Some(pid) } => pid,
            State::Added | State::Starting { pid: None } | State::Stopped { pid: 0, .. } => {
                return Err(Error::new(Kind::FailedPrecondition, "process not created"));
            }
            // Others of the container may have outlived it.
            State::Stopped { pid, .. } if all => pid,
            State::Stopped { .. } | State::Deleted => return Err(finished()),
        };
        if !(1..=SIGNAL_MAX).contains(&signal) {
            return Err(Error::new(Kind::InvalidArgument, format!("{signal} is not a signal")));
        }
        if all {
            return kill_all(&container, signal as i32);
        }
        self.reaper.kill(pid, signal as i32).map_err(|error| match error {
            Errno::ESRCH => finished(),
            other => Error::internal(format_args!("send signal {signal} to {pid}"), &other),
        })
    }
}

fn kill_all(container: &Container, signal: i32) -> Result<(), Error> {
    let group = container.group();
    let failed =
        |e: &dyn std::error::Error| Error::internal(format_args!("send signal {signal} to all of {}", container.id), e);
    if signal == libc::SIGKILL {
        return cgroup::kill(&group).map_err(|e| failed(&e));
    }
    for pid in cgroup::processes(&group).map_err(|e| failed(&e))? {
        // Of these PID 1 is not the parent: one may have ended since the list was read, and its pid been given away only if all of
        // pid_max were used in between. runc takes the same chance.
        match kill_raw(pid, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    Ok(())
}

fn finished() -> Error {
    Error::new(Kind::NotFound, "process already finished")
}
