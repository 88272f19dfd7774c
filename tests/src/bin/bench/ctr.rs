//! The latencies that a user of `ctr` sees, with husk and with runc under the same containerd.

use std::time::{Duration, Instant};

use anyhow::Result;
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::containerd::{Containerd, Setup};

use crate::report::{Column, Report, Target};

/// The target for a whole `ctr run` under TCG, from the issue that introduced the benchmark.
const TIMES_RUNC: f64 = 8.0;

/// The runtimes to compare.
pub(crate) const BOTH: [(Column, Runtime); 2] = [(Column::Husk, Runtime::Husk), (Column::Runc, Runtime::Runc)];

/// Converts to milliseconds.
pub(crate) fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

/// Measures everything that needs a containerd.
pub(crate) fn run(rounds: usize, report: &mut Report) -> Result<()> {
    let containerd = Containerd::with(Setup { runtime: Some(Runtime::Husk), ..Setup::default() })?;
    report.about("containerd", Version::default_for_tests().name());
    whole_runs(&containerd, rounds, report)?;
    let mut execs = Vec::new();
    for (column, runtime) in BOTH {
        let container = containerd.detached_with(runtime, &[], "bench", &["sleep", "100000"])?;
        let samples = sample(rounds, || Ok(ms(container.exec(&["true"]).ok()?.took)))?;
        execs.push((column, samples));
    }
    report.distribution("ctr task exec true", "ms", &execs, Target::Any);
    deletes(&containerd, rounds.div_ceil(2), report)
}

fn whole_runs(containerd: &Containerd, rounds: usize, report: &mut Report) -> Result<()> {
    let mut runs = Vec::new();
    for (column, runtime) in BOTH {
        let run = || {
            let ctr = containerd.ctr(["run", "--rm", "--runtime", runtime.name(), containerd.image()]);
            Ok(ms(ctr.arg(containerd.id("run")).arg("true").ok()?.took))
        };
        // The first run reads everything from the disk.
        run()?;
        runs.push((column, sample(rounds, run)?));
    }
    report.distribution("ctr run --rm true", "ms", &runs, Target::TimesRunc(TIMES_RUNC));
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
