//! The benchmark: husk beside runc under one containerd, and the guest by instruction count beside the least that a guest can be.
//!
//! `bench [--json FILE] [--rounds N]` prints everything; `bench boots [N]` boots the production machine N times in a row and says
//! how many hung. Values are printed beside what is wanted; nothing fails because of a time.

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

    use anyhow::{Context, Result, bail};
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use crate::report::Report;
    use crate::{boots, guest, host, side};

    /// What the command line asks for.
    struct Wanted {
        json: Option<PathBuf>,
        rounds: usize,
        boots: Option<usize>,
    }

    pub fn main() -> Result<()> {
        let wanted = parse(std::env::args().skip(1))?;
        // A mount namespace of our own: what a VM mounts for its share goes with this process, however it ends.
        unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace (the benchmark needs root)")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut report = Report::new()?;
        match wanted.boots {
            Some(count) => runtime.block_on(boots::run(count, &mut report))?,
            None => {
                report.section("ctr, wall clock");
                side::run(wanted.rounds, &mut report)?;
                report.section("guest, instructions (QEMU -icount shift=0)");
                runtime.block_on(guest::run(&mut report))?;
                report.section("boot, wall clock");
                runtime.block_on(boots::beside_the_floor(wanted.rounds, &mut report))?;
                report.section("what it takes");
                runtime.block_on(guest::footprint(&mut report))?;
                host::run(&mut report)?;
            }
        }
        let mut out = std::io::stdout().lock();
        writeln!(out, "{report}")?;
        if let Some(path) = wanted.json {
            std::fs::write(&path, report.json()?).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }

    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Wanted> {
        let mut wanted = Wanted { json: None, rounds: 20, boots: None };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().with_context(|| format!("{argument} wants a value"));
            match argument.as_str() {
                "--json" => wanted.json = Some(value()?.into()),
                "--rounds" => wanted.rounds = value()?.parse().context("--rounds wants a number")?,
                "boots" => wanted.boots = Some(arguments.next().map_or(Ok(200), |count| count.parse())?),
                _ => bail!("unknown argument {argument}; usage: bench [--json FILE] [--rounds N] | bench boots [N]"),
            }
        }
        if wanted.rounds == 0 || wanted.boots == Some(0) {
            bail!("nothing can be said of no rounds");
        }
        Ok(wanted)
    }
}
