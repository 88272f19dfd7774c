//! What PID 1 does once, before it serves anybody: each step in its own file, the order in [`boot`].
//!
//! A step that fails ends the guest: the host learns the reason from the console and the end from QEMU's exit.

mod clock;
mod cmdline;
mod devices;
mod disks;
mod extras;
mod mounts;
mod network;
mod own;
mod root;
mod timeline;

use std::io;

use husk_protos::extras::SUPERVISOR;
use husk_protos::system::BootStep;

pub use cmdline::Cmdline;
pub use own::randomize_addresses;
pub use timeline::{Timeline, boottime_ns};

use crate::report::Reports;
use crate::{cgroup, console};

/// A step of the boot that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Error {
    what: String,
    source: io::Error,
}

/// Names the step in an error.
trait Step<T> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error { what: what(), source: source.into() })
    }
}

/// A handler that panics is one failed call, and a defect that the host has to hear of.
fn tell_panics() {
    let to_console = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!(%panic, "the init panicked");
        to_console(panic);
    }));
}

/// Makes the guest ready to run containers, and answers what it was asked to be.
///
/// # Errors
/// The first step that failed. The guest is then good for nothing.
pub fn boot(timeline: &mut Timeline, reports: &Reports) -> Result<Cmdline, Error> {
    timeline.mark(BootStep::INIT);
    root::make_movable()?;
    mounts::mount_all()?;
    console::take_over();
    timeline.mark(BootStep::MOUNTS);

    let cmdline = cmdline::parse(&std::fs::read_to_string("/proc/cmdline").step(|| "read /proc/cmdline".into())?);
    tell_panics();
    let (reports, debug) = (reports.clone(), cmdline.debug);
    crate::log::start(cmdline.log, move |line| {
        if debug {
            console::show(&crate::log::console_line(&line));
        }
        reports.log(line);
    });
    for problem in &cmdline.problems {
        tracing::warn!("{problem}");
    }
    clock::set(cmdline.epoch_ns)?;
    timeline.mark(BootStep::CLOCK);

    cgroup::set_up().step(|| "set up the cgroups".into())?;
    timeline.mark(BootStep::CGROUPS);

    network::loopback_up()?;
    own::set_hostname(&cmdline.hostname)?;
    own::raise_limits()?;
    own::protect_from_oom()?;
    own::randomize_containers()?;
    own::keep_addresses()?;
    devices::credit_entropy()?;
    timeline.mark(BootStep::SYSTEM);

    if let Some(serial) = &cmdline.extras {
        extras::unpack(serial).step(|| "extras".into())?;
        timeline.mark(BootStep::EXTRAS);
    }
    if cmdline.supervisor {
        std::fs::metadata(SUPERVISOR).step(|| format!("the supervisor agent was asked for: {SUPERVISOR}"))?;
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "the guest is set up");
    Ok(cmdline)
}
