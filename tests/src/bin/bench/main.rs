//! The benchmark: husk compared with runc under one containerd, and the guest's instruction count compared with a
//! baseline guest.
//!
//! `bench [--json FILE] [--rounds N] [--only PART]` measures everything, or one part; `bench boots [N]` boots the
//! production machine N times in a row and reports how many boots hung. Values are printed next to their targets; a
//! missed target is not a failure.

#[cfg(not(target_env = "musl"))]
mod boots;
#[cfg(not(target_env = "musl"))]
mod ctr;
#[cfg(not(target_env = "musl"))]
mod guest;
#[cfg(not(target_env = "musl"))]
mod host;
#[cfg(not(target_env = "musl"))]
mod network;
#[cfg(not(target_env = "musl"))]
mod report;
#[cfg(not(target_env = "musl"))]
mod steps;

#[cfg(not(target_env = "musl"))]
fn main() -> anyhow::Result<()> {
    run::main()
}

/// Cargo builds all programs of the crate when it builds one for the guest. This program does not run there.
#[cfg(target_env = "musl")]
fn main() {}

#[cfg(not(target_env = "musl"))]
mod run {
    use std::io::Write;
    use std::path::PathBuf;

    use anyhow::{Context, Result, bail, ensure};
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use crate::report::Report;
    use crate::{boots, ctr, guest, host, network, steps};

    /// The command line.
    struct Arguments {
        json: Option<PathBuf>,
        rounds: usize,
        parts: Vec<Part>,
        boots: usize,
    }

    /// A part of the table.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Part {
        Ctr,
        Steps,
        Guest,
        Boot,
        Footprint,
        Host,
        Network,
        Boots,
    }

    /// Name on the command line and title in the table. By default, all parts but the last run.
    const PARTS: [(Part, &str, &str); 8] = [
        (Part::Ctr, "ctr", "ctr, wall clock"),
        (Part::Steps, "steps", "the calls of a `ctr run`, wall clock"),
        (Part::Guest, "guest", "guest, instructions (QEMU -icount shift=0)"),
        (Part::Boot, "boot", "boot, wall clock"),
        (Part::Footprint, "footprint", "the init"),
        (Part::Host, "host", "the host, one idle VM"),
        (Part::Network, "network", "network"),
        (Part::Boots, "boots", "boots in a row"),
    ];

    pub(super) fn main() -> Result<()> {
        let arguments = parse(std::env::args().skip(1))?;
        // A private mount namespace: the mounts of a VM's share end with this process, even if it is killed.
        unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace (the benchmark needs root)")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut report = Report::new()?;
        let mut failures = Vec::new();
        for (part, name, title) in PARTS.into_iter().filter(|(part, ..)| arguments.parts.contains(part)) {
            report.section(title);
            let done = match part {
                Part::Ctr => ctr::run(arguments.rounds, &mut report),
                Part::Steps => steps::run(arguments.rounds, &mut report),
                Part::Guest => runtime.block_on(guest::run(&mut report)),
                Part::Boot => runtime.block_on(boots::compare_with_floor(arguments.rounds, &mut report)),
                Part::Footprint => runtime.block_on(guest::footprint(&mut report)),
                Part::Host => host::run(&mut report),
                Part::Network => network::run(arguments.rounds, &runtime, &mut report),
                Part::Boots => runtime.block_on(boots::run(arguments.boots, &mut report)),
            };
            // The results of the other parts are still useful.
            if let Err(error) = done {
                report.note(format!("failed: {error:#}"));
                failures.push(name);
            }
        }
        writeln!(std::io::stdout().lock(), "{report}")?;
        if let Some(path) = arguments.json {
            std::fs::write(&path, report.json()?).with_context(|| format!("write {}", path.display()))?;
        }
        ensure!(failures.is_empty(), "failed parts: {}", failures.join(", "));
        Ok(())
    }

    fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
        let default_parts = PARTS.iter().map(|(part, ..)| *part).filter(|part| *part != Part::Boots).collect();
        let mut arguments = Arguments { json: None, rounds: 20, parts: default_parts, boots: 200 };
        while let Some(argument) = words.next() {
            let mut value = || words.next().with_context(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--json" => arguments.json = Some(value()?.into()),
                "--rounds" => arguments.rounds = value()?.parse().context("--rounds needs a number")?,
                "--only" => {
                    let name = value()?;
                    let part = PARTS.iter().find(|(_, known, _)| *known == name);
                    arguments.parts = vec![part.with_context(|| format!("no part named {name}"))?.0];
                }
                "boots" => {
                    arguments.parts = vec![Part::Boots];
                    arguments.boots = words.next().map_or(Ok(arguments.boots), |count| count.parse())?;
                }
                _ => bail!(
                    "unknown argument {argument}; usage: bench [--json FILE] [--rounds N] [--only PART] | bench boots [N]"
                ),
            }
        }
        ensure!(arguments.rounds > 0 && arguments.boots > 0, "the number of rounds must not be 0");
        Ok(arguments)
    }
}
