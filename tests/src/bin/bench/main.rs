//! The benchmark: husk compared with runc under one containerd, and the guest's instruction count compared with a
//! baseline guest.
//!
//! `bench --help` prints the arguments. Values are printed next to their targets; a missed target is not a failure.

#[cfg(not(target_env = "musl"))]
mod arguments;
#[cfg(not(target_env = "musl"))]
mod boots;
#[cfg(not(target_env = "musl"))]
mod cpu;
#[cfg(not(target_env = "musl"))]
mod ctr;
#[cfg(not(target_env = "musl"))]
mod density;
#[cfg(not(target_env = "musl"))]
mod disks;
#[cfg(not(target_env = "musl"))]
mod files;
#[cfg(not(target_env = "musl"))]
mod guest;
#[cfg(not(target_env = "musl"))]
mod host;
#[cfg(not(target_env = "musl"))]
mod network;
#[cfg(not(target_env = "musl"))]
mod pods;
#[cfg(not(target_env = "musl"))]
mod pool;
#[cfg(not(target_env = "musl"))]
mod programs;
#[cfg(not(target_env = "musl"))]
mod report;
#[cfg(not(target_env = "musl"))]
mod steps;
#[cfg(not(target_env = "musl"))]
mod streams;

#[cfg(not(target_env = "musl"))]
fn main() -> std::process::ExitCode {
    run::main()
}

/// Cargo builds all programs of the crate when it builds one for the guest. This program does not run there.
#[cfg(target_env = "musl")]
fn main() {}

#[cfg(not(target_env = "musl"))]
mod run {
    use std::io::Write;
    use std::process::ExitCode;

    use anyhow::{Context, Result, ensure};
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use crate::arguments::{Arguments, Command, PARTS, Part, help, parse};
    use crate::report::Report;
    use crate::{boots, ctr, density, disks, files, guest, host, network, pods, pool, programs, steps, streams};

    /// Exit status for a wrong argument.
    const USAGE: u8 = 2;

    pub(super) fn main() -> ExitCode {
        let done = match parse(std::env::args().skip(1)) {
            Ok(Command::Help) => write!(std::io::stdout().lock(), "{}", help()).map_err(Into::into),
            Ok(Command::Measure(arguments)) => measure(&arguments),
            Err(wrong) => {
                eprintln!("bench: {wrong} (see bench --help)");
                return ExitCode::from(USAGE);
            }
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bench: {error:#}");
                ExitCode::FAILURE
            }
        }
    }

    fn measure(arguments: &Arguments) -> Result<()> {
        // A private mount namespace: the mounts of a VM's share end with this process, even if it is killed.
        unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace (the benchmark needs root)")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut report = Report::new()?;
        let mut failures = Vec::new();
        for (part, name, title, _) in PARTS.into_iter().filter(|(part, ..)| arguments.parts.contains(part)) {
            report.section(title);
            let done = match part {
                Part::Ctr => ctr::run(arguments.rounds, &mut report),
                Part::Steps => steps::run(arguments.rounds, &mut report),
                Part::Streams => streams::run(arguments.rounds, &mut report),
                Part::Guest => runtime.block_on(guest::run(&mut report)),
                Part::Programs => runtime.block_on(programs::run(arguments.kernel.as_deref(), &mut report)),
                Part::Boot => runtime.block_on(boots::compare_with_floor(arguments.rounds, &mut report)),
                Part::Footprint => runtime.block_on(guest::footprint(&mut report)),
                Part::Host => host::run(arguments.rounds, &mut report),
                Part::Density => density::run(arguments.vms, &mut report),
                Part::Network => network::run(arguments.rounds, &runtime, &mut report),
                Part::Pods => pods::run(arguments.rounds, &mut report),
                Part::Pool => pool::run(arguments.rounds, &mut report),
                Part::Files => files::run(&arguments.columns, arguments.rounds, &mut report),
                Part::Disks => disks::run(arguments.rounds, &mut report),
                Part::Boots => runtime.block_on(boots::run(arguments.boots, &mut report)),
            };
            // The results of the other parts are still useful.
            if let Err(error) = done {
                report.note(format!("failed: {error:#}"));
                failures.push(name);
            }
        }
        writeln!(std::io::stdout().lock(), "{report}")?;
        if let Some(path) = &arguments.json {
            std::fs::write(path, report.json()?).with_context(|| format!("write {}", path.display()))?;
        }
        ensure!(failures.is_empty(), "failed parts: {}", failures.join(", "));
        Ok(())
    }
}
