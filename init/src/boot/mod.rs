//! What PID 1 does once, before it serves the host: one file per step, in the order of [`boot`].
//!
//! A step that fails ends the guest. The host reads the reason from the console and notices QEMU's exit.

mod cmdline;
mod disks;
mod entropy;
mod error;
mod extras;
mod limits;
mod mounts;
mod root;
mod timeline;
mod wall_clock;

use husk_protos::extras::SUPERVISOR;
use husk_protos::param;
use husk_protos::system::BootStep;

pub(crate) use cmdline::Cmdline;
pub(crate) use entropy::{random, reseed};
pub(crate) use limits::randomize_addresses;
pub(crate) use timeline::Timeline;

use crate::report::Reports;
use crate::{cgroup, console, log, loopback};
use error::{BootError, NameStep};

/// Logs panics to the host as well: a panic in a handler fails only that call, but is a bug that the host must learn
/// of.
fn log_panics() {
    let to_console = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!(%panic, "the init panicked");
        to_console(panic);
    }));
}

/// Sends log lines to the host, and in debug mode to the console too.
fn start_log(cmdline: &Cmdline, reports: &Reports) {
    let (reports, debug) = (reports.clone(), cmdline.debug);
    log::start(cmdline.log, move |line| {
        if debug {
            console::show(&log::console_line(&line));
        }
        reports.log(line);
    });
    for problem in &cmdline.problems {
        tracing::warn!("{problem}");
    }
}

/// Prepares the guest to run containers and returns its settings.
///
/// # Errors
/// The first step that failed. The guest is unusable then.
pub(crate) fn boot(timeline: &mut Timeline, reports: &Reports) -> Result<Cmdline, BootError> {
    timeline.mark(BootStep::INIT);
    root::make_movable()?;
    mounts::mount_all()?;
    console::take_over();
    timeline.mark(BootStep::MOUNTS);

    let cmdline = cmdline::parse(&std::fs::read_to_string("/proc/cmdline").step(|| "read /proc/cmdline".into())?);
    log_panics();
    start_log(&cmdline, reports);
    wall_clock::set(cmdline.epoch_ns)?;
    timeline.mark(BootStep::CLOCK);

    cgroup::set_up().step(|| "set up the cgroups".into())?;
    timeline.mark(BootStep::CGROUPS);

    loopback::up().step(|| "bring up lo".into())?;
    limits::set_hostname(&cmdline.hostname)?;
    limits::raise()?;
    limits::protect_from_oom()?;
    limits::randomize_containers()?;
    limits::keep_addresses()?;
    entropy::credit()?;
    timeline.mark(BootStep::SYSTEM);

    if let Some(serial) = &cmdline.extras {
        extras::unpack(serial).step(|| "unpack the extras".into())?;
        timeline.mark(BootStep::EXTRAS);
    }
    if cmdline.supervisor {
        std::fs::metadata(SUPERVISOR).step(|| format!("{}=1 requires {SUPERVISOR}", param::SUPERVISOR))?;
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "the guest is set up");
    Ok(cmdline)
}
