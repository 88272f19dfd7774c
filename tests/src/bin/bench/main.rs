//! The benchmark: husk beside runc under one containerd, and the guest by instruction count beside the least that a guest can be.
//!
//! `bench [--json FILE] [--rounds N] [--only PART]` prints everything, or one part; `bench boots [N]` boots the production machine N
//! times in a row and says how many hung. Values are printed beside what is wanted; nothing fails because of a time.

#[cfg(not(target_env = "musl"))]
mod boots;
#[cfg(not(target_env = "musl"))]
mod guest;
#[cfg(not(target_env = "musl"))]
mod host;
#[cfg(not(target_env = "musl"))]
mod report;
#[cfg(not(target_env = "musl"))]
mod side;
#[cfg(not(target_env = "musl"))]
mod steps;

#[cfg(not(target_env = "musl"))]
fn main() -> anyhow::Result<()> {
    run::main()
}

/// Cargo builds all programs of the crate for the guest when it is asked to; this one is none of them.
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
    use crate::{boots, guest, host, side, steps};

    /// What the command line asks for.
    struct Wanted {
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
        Boots,
    }

    /// Name on the command line, title in the table. All but the last are run when nothing else is said.
    const PARTS: [(Part, &str, &str); 7] = [
        (Part::Ctr, "ctr", "ctr, wall clock"),
        (Part::Steps, "steps", "the calls of a `ctr run`, wall clock"),
        (Part::Guest, "guest", "guest, instructions (QEMU -icount shift=0)"),
        (Part::Boot, "boot", "boot, wall clock"),
        (Part::Footprint, "footprint", "the init"),
        (Part::Host, "host", "the host, one idle VM"),
        (Part::Boots, "boots", "boots in a row"),
    ];

    pub fn main() -> Result<()> {
        let wanted = parse(std::env::args().skip(1))?;
        // A mount namespace of our own: what a VM mounts for its share goes with this process, however it ends.
        unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace (the benchmark needs root)")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut report = Report::new()?;
        let mut failures = Vec::new();
        for (part, name, title) in PARTS.into_iter().filter(|(part, ..)| wanted.parts.contains(part)) {
            report.section(title);
            let done = match part {
                Part::Ctr => side::run(wanted.rounds, &mut report),
                Part::Steps => steps::run(wanted.rounds, &mut report),
                Part::Guest => runtime.block_on(guest::run(&mut report)),
                Part::Boot => runtime.block_on(boots::beside_the_floor(wanted.rounds, &mut report)),
                Part::Footprint => runtime.block_on(guest::footprint(&mut report)),
                Part::Host => host::run(&mut report),
                Part::Boots => runtime.block_on(boots::run(wanted.boots, &mut report)),
            };
            // What the other parts give is worth having all the same.
            if let Err(error) = done {
                report.note(format!("failed: {error:#}"));
                failures.push(name);
            }
        }
        writeln!(std::io::stdout().lock(), "{report}")?;
        if let Some(path) = wanted.json {
            std::fs::write(&path, report.json()?).with_context(|| format!("write {}", path.display()))?;
        }
        ensure!(failures.is_empty(), "could not be measured: {}", failures.join(", "));
        Ok(())
    }

    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Wanted> {
        let usual = PARTS.iter().map(|(part, ..)| *part).filter(|part| *part != Part::Boots).collect();
        let mut wanted = Wanted { json: None, rounds: 20, parts: usual, boots: 200 };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().with_context(|| format!("{argument} wants a value"));
            match argument.as_str() {
                "--json" => wanted.json = Some(value()?.into()),
                "--rounds" => wanted.rounds = value()?.parse().context("--rounds wants a number")?,
                "--only" => {
                    let name = value()?;
                    let part = PARTS.iter().find(|(_, known, _)| *known == name);
                    wanted.parts = vec![part.with_context(|| format!("no part is called {name}"))?.0];
                }
                "boots" => {
                    wanted.parts = vec![Part::Boots];
                    wanted.boots = arguments.next().map_or(Ok(wanted.boots), |count| count.parse())?;
                }
                _ => bail!(
                    "unknown argument {argument}; usage: bench [--json FILE] [--rounds N] [--only PART] | bench boots [N]"
                ),
            }
        }
        ensure!(wanted.rounds > 0 && wanted.boots > 0, "nothing can be said of no rounds");
        Ok(wanted)
    }
}
