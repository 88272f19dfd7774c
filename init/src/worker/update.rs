//! Update: new limits for a container, in place.
//!
//! In a worker although libcontainer has no part in it: a write to memory.max reclaims and kills until the new limit holds, and PID 1 has
//! others to serve meanwhile. It can take longer than a worker may, and one that is killed half-way would leave half of the limits: such a
//! write is interrupted before. The kernel has set the limit by then, and holds it from there on, with the next page that the container wants
//! (mm/memcontrol.c, memory_max_write and memory_high_write).

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;

use husk_protos::chain::Chain;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::alarm;
use oci_spec::runtime::{LinuxResources, Spec};

use super::serve::decode;
use super::spec;
use crate::cgroup::{self, limits};
use crate::error::{Error, Kind};
use crate::places;

/// Seconds that writes may take together before the one that still waits is interrupted: half of what the worker has.
const PATIENCE: u32 = 15;

/// Sets the limits that the standard input names, all or none of them.
pub fn update(id: &str) -> Result<(), Error> {
    let invalid = |what: String| Error::new(Kind::InvalidArgument, format!("update {id}: {what}"));
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let input = input.map_err(|e| Error::internal("take the standard input", &e))?;
    let resources: LinuxResources = decode(input.into()).map_err(|e| invalid(format!("linux.resources: {e}")))?;
    let config = places::bundle(id).join("config.json");
    let spec = Spec::load(&config).map_err(|e| Error::internal(format_args!("read {}", config.display()), &e))?;
    let group = cgroup::of(id);
    let present =
        limits::Present::of(&group).map_err(|e| Error::internal(format_args!("read the limits of {id}"), &e))?;

    let mut problems = spec::check_update(&spec, &resources);
    let planned = limits::plan(&resources, &present).unwrap_or_else(|more| {
        problems.extend(more);
        Vec::new()
    });
    if !problems.is_empty() {
        return Err(invalid(problems.join("; ")));
    }
    interrupt_after(PATIENCE).map_err(|e| Error::internal("set an alarm", &e))?;
    limits::apply(&group, &planned).map_err(|refused| {
        let kind = match refused.source.kind() {
            ErrorKind::InvalidInput => Kind::InvalidArgument,
            ErrorKind::ResourceBusy => Kind::FailedPrecondition,
            // ERANGE, of a number that the file does not take.
            _ if refused.source.raw_os_error() == Some(libc::ERANGE) => Kind::InvalidArgument,
            _ => Kind::Internal,
        };
        Error::new(kind, format!("update {id}: {}", Chain(&refused)))
    })
}

/// Interrupts what this process waits for in the kernel after `seconds`, and then each second: the first may come between two waits.
fn interrupt_after(seconds: u32) -> io::Result<()> {
    extern "C" fn again(_: libc::c_int) {
        alarm::set(1);
    }
    // Without SA_RESTART, with which the kernel would go back to the wait.
    let action = SigAction::new(SigHandler::Handler(again), SaFlags::empty(), SigSet::empty());
    // SAFETY: all that the handler does is alarm(2), which is async-signal-safe (signal-safety(7)).
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
    fn a_wait_in_the_kernel_is_interrupted_and_so_is_the_next() {
        let (silent, speaker) = pipe().unwrap();
        let (ends, end) = pipe().unwrap();
        // SAFETY: the child makes system calls only, and leaves by _exit. In a process of its own, the alarm has one thread to go to.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                drop(speaker);
                let armed = interrupt_after(1).is_ok();
                let interrupted = (0..2).all(|_| read(&silent, &mut [0]) == Err(Errno::EINTR));
                // SAFETY: ends the child, and runs nothing of the test's.
                unsafe { libc::_exit(if armed && interrupted { 0 } else { 1 }) }
            }
            ForkResult::Parent { child } => {
                drop(end);
                // Its end, or ours to its waiting: without a speaker it reads the end of the pipe.
                poll(&mut [PollFd::new(ends.as_fd(), PollFlags::POLLIN)], 20_000u16).unwrap();
                drop(speaker);
                assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
            }
        }
    }
}
