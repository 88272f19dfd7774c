//! Update: changes the limits of a container in place.
//!
//! Runs in a worker, although it does not use libcontainer: a write to memory.max reclaims memory and kills processes
//! until the new limit holds, while PID 1 has to serve other calls. Such a write can take longer than a worker may run,
//! and a worker that is killed halfway would leave half of the limits behind. So an alarm interrupts the write earlier.
//! The kernel has stored the limit by then and enforces it from the next page that the container allocates
//! (mm/memcontrol.c, memory_max_write and memory_high_write).

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;

use husk_protos::chain::Chain;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::alarm;
use oci_spec::runtime::{LinuxResources, Spec};

use super::libcontainer::decode;
use super::spec;
use crate::cgroup::{self, limits};
use crate::error::{CallError, FailureKind};
use crate::paths;

/// Seconds that all writes together may take before the alarm interrupts them: half of the worker's timeout.
const WRITE_TIMEOUT: u32 = 15;

/// Sets all limits that stdin contains, or none. Names those that have no meaning here.
pub(super) fn update(id: &str) -> Result<Vec<String>, CallError> {
    let invalid = |what: String| CallError::new(FailureKind::InvalidArgument, format!("update {id}: {what}"));
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let input = input.map_err(|e| CallError::internal("duplicate stdin", &e))?;
    let mut resources: LinuxResources = decode(input.into()).map_err(|e| invalid(format!("linux.resources: {e}")))?;
    let config = paths::bundle(id).join("config.json");
    let spec = Spec::load(&config).map_err(|e| CallError::internal(format_args!("read {}", config.display()), &e))?;
    let cgroup = cgroup::of(id);
    let present =
        limits::Present::of(&cgroup).map_err(|e| CallError::internal(format_args!("read the limits of {id}"), &e))?;

    let ignored = limits::drop_absent_page_sizes(&mut resources, &cgroup);
    let mut problems = spec::check_update(&spec, &resources);
    let writes = limits::plan(&resources, &present).unwrap_or_else(|more| {
        problems.extend(more);
        Vec::new()
    });
    if !problems.is_empty() {
        return Err(invalid(problems.join("; ")));
    }
    interrupt_after(WRITE_TIMEOUT).map_err(|e| CallError::internal("set an alarm", &e))?;
    limits::apply(&cgroup, &writes).map_err(|error| {
        let kind = match error.source.kind() {
            ErrorKind::InvalidInput => FailureKind::InvalidArgument,
            ErrorKind::ResourceBusy => FailureKind::FailedPrecondition,
            // The kernel returns ERANGE for numbers that a file does not accept.
            _ if error.source.raw_os_error() == Some(libc::ERANGE) => FailureKind::InvalidArgument,
            _ => FailureKind::Internal,
        };
        CallError::new(kind, format!("update {id}: {}", Chain(&error)))
    })?;
    Ok(ignored)
}

/// Interrupts a blocking system call of this process after `seconds`, and then every second: the first alarm may arrive
/// between two calls.
fn interrupt_after(seconds: u32) -> io::Result<()> {
    extern "C" fn rearm(_: libc::c_int) {
        alarm::set(1);
    }
    // Without SA_RESTART, which would resume the interrupted call.
    let action = SigAction::new(SigHandler::Handler(rearm), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler only calls alarm(2), which is async-signal-safe (signal-safety(7)).
    unsafe { sigaction(Signal::SIGALRM, &action) }?;
    alarm::set(seconds);
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use nix::poll::{PollFd, PollFlags, poll};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork, pipe, read};

    use super::*;

    #[test]
    fn each_blocking_call_is_interrupted() {
        let (silent, writer) = pipe().unwrap();
        let (child_exit, child_end) = pipe().unwrap();
        // SAFETY: the child only makes system calls and exits with _exit. In its own process, the alarm is delivered to
        // its only thread.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                drop(writer);
                let armed = interrupt_after(1).is_ok();
                let interrupted = (0..2).all(|_| read(&silent, &mut [0]) == Err(Errno::EINTR));
                // SAFETY: ends the child without running the test's destructors.
                unsafe { libc::_exit(if armed && interrupted { 0 } else { 1 }) }
            }
            ForkResult::Parent { child } => {
                drop(child_end);
                // Waits for the child's exit. After the timeout, closing the writer ends the child's read.
                poll(&mut [PollFd::new(child_exit.as_fd(), PollFlags::POLLIN)], 20_000u16).unwrap();
                drop(writer);
                assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
            }
        }
    }
}
