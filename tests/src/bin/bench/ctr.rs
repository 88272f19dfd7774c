//! The latencies that a user of `ctr` sees, with husk and with runc under the same containerd, and with gVisor where its
//! program `runsc` is installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::containerd::{Containerd, Setup};

use crate::cpu::Cpu;
use crate::report::{Column, Report, Target};

/// The targets under TCG.
const RUN_TIMES_RUNC: f64 = 6.0;
const EXEC_TIMES_RUNC: f64 = 2.2;

/// The runtimes to compare.
pub(crate) const BOTH: [(Column, Runtime); 2] = [(Column::Husk, Runtime::Husk), (Column::Runc, Runtime::Runc)];

/// Converts to milliseconds.
pub(crate) fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

/// A column, and the arguments of `ctr run` that select its runtime.
struct Contender {
    column: Column,
    flags: Vec<String>,
}

/// husk and runc, and gVisor if `runsc` is in `PATH`. `folder` gets what containerd starts in its place.
fn contenders(folder: &Path) -> Result<Vec<Contender>> {
    let named = |(column, runtime): (Column, Runtime)| Contender {
        column,
        flags: vec!["--runtime".to_owned(), runtime.name().to_owned()],
    };
    let mut contenders: Vec<Contender> = BOTH.into_iter().map(named).collect();
    if let Some(runsc) = in_path("runsc") {
        let wrapper = folder.join("runsc");
        // The platform that needs no hardware virtualization.
        fs::write(&wrapper, format!("#!/bin/sh\nexec {} --platform=systrap \"$@\"\n", runsc.display()))?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
        let mut gvisor = named((Column::Gvisor, Runtime::Runc));
        gvisor.flags.extend(["--runc-binary".to_owned(), wrapper.display().to_string()]);
        contenders.push(gvisor);
    }
    Ok(contenders)
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Measures everything that needs a containerd.
pub(crate) fn run(rounds: usize, report: &mut Report) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let contenders = contenders(folder.path())?;
    let containerd = Containerd::with(Setup { runtime: Some(Runtime::Husk), ..Setup::default() })?;
    report.about("containerd", Version::default_for_tests().name());
    whole_runs(&containerd, &contenders, rounds, report)?;
    execs(&containerd, &contenders, rounds, report)?;
    deletes(&containerd, rounds.div_ceil(2), report)
}

/// Samples of wall-clock and of CPU time.
type Samples = (Vec<(Column, Vec<f64>)>, Vec<(Column, Vec<f64>)>);

/// Takes turns, so that a change of the machine's load meets all.
fn in_turn(
    containerd: &Containerd,
    contenders: &[Contender],
    rounds: usize,
    once: impl Fn(&Contender) -> Result<f64>,
) -> Result<Samples> {
    let none = || contenders.iter().map(|contender| (contender.column, Vec::new())).collect::<Vec<_>>();
    let (mut wall, mut cpu) = (none(), none());
    // The first round reads everything from the disk.
    for round in 0..=rounds {
        for ((contender, (_, wall)), (_, cpu)) in contenders.iter().zip(&mut wall).zip(&mut cpu) {
            let used = Cpu::start(containerd)?;
            let took = once(contender)?;
            if round > 0 {
                wall.push(took);
                cpu.push(used.used()?);
            }
        }
    }
    Ok((wall, cpu))
}

fn whole_runs(containerd: &Containerd, contenders: &[Contender], rounds: usize, report: &mut Report) -> Result<()> {
    let (wall, cpu) = in_turn(containerd, contenders, rounds, |contender| {
        let ctr = containerd.ctr(["run", "--rm"]).args(&contender.flags).arg(containerd.image());
        Ok(ms(ctr.arg(containerd.id("run")).arg("true").ok()?.took))
    })?;
    report.distribution("ctr run --rm true", "ms", &wall, Target::TimesRunc(RUN_TIMES_RUNC));
    report.mean("  its CPU time, with containerd's and ctr's", "ms", &cpu, Target::Any);
    Ok(())
}

fn execs(containerd: &Containerd, contenders: &[Contender], rounds: usize, report: &mut Report) -> Result<()> {
    let start = |contender: &Contender| {
        let id = containerd.id("bench");
        let ctr = containerd.ctr(["run", "--detach"]).args(&contender.flags).arg(containerd.image());
        ctr.arg(&id).args(["sleep", "100000"]).ok()?;
        Ok((contender.column, containerd.adopt(&id)))
    };
    let containers = contenders.iter().map(start).collect::<Result<Vec<_>>>()?;
    let (wall, cpu) = in_turn(containerd, contenders, rounds, |contender| {
        let container = containers.iter().find(|(column, _)| *column == contender.column);
        Ok(container.map(|(_, container)| container.exec(&["true"]).ok()).transpose()?.map_or(0.0, |ran| ms(ran.took)))
    })?;
    report.distribution("ctr task exec true", "ms", &wall, Target::TimesRunc(EXEC_TIMES_RUNC));
    report.mean("  its CPU time, with containerd's and ctr's", "ms", &cpu, Target::Any);
    Ok(())
}

fn deletes(containerd: &Containerd, rounds: usize, report: &mut Report) -> Result<()> {
    let mut deletes = Vec::new();
    for (column, runtime) in BOTH {
        let samples = sample(rounds, || {
            let container = containerd.detached_with(runtime, &[], "delete", &["sleep", "100000"])?;
            container.kill("SIGKILL")?;
            container.await_status("STOPPED")?;
            let started = Instant::now();
            container.delete_task()?;
            Ok(ms(started.elapsed()))
        })?;
        deletes.push((column, samples));
    }
    report.distribution("ctr task rm of a stopped container", "ms", &deletes, Target::Any);
    Ok(())
}

fn sample(rounds: usize, mut once: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    (0..rounds).map(|_| once()).collect()
}
