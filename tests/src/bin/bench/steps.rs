//! The parts of a `ctr run`: the duration of each call that containerd makes to a shim.

use std::time::Instant;

use anyhow::{Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::shim::{Shim, Streams};

use crate::ctr::{BOTH, ms};
use crate::report::{Column, Report, Target, percentile};

/// In containerd's order.
const STEPS: [&str; 6] = ["start (the shim)", "Create", "Start", "Wait", "Delete", "Shutdown, and exit of the shim"];

/// Times the calls for a container that runs `true`.
pub(crate) fn run(rounds: usize, report: &mut Report) -> Result<()> {
    let mut all: Vec<(Column, Vec<[f64; STEPS.len()]>)> = Vec::new();
    for (column, runtime) in BOTH {
        let containerd = Containerd::with(Setup { runtime: Some(runtime), ..Setup::default() })?;
        // The first round reads everything from the disk.
        once(&containerd, runtime)?;
        let rounds = (0..rounds).map(|_| once(&containerd, runtime)).collect::<Result<_>>()?;
        all.push((column, rounds));
    }
    for (index, step) in STEPS.iter().enumerate() {
        let median = |rounds: &[[f64; STEPS.len()]]| {
            percentile(&rounds.iter().map(|round| round[index]).collect::<Vec<_>>(), 50)
        };
        let values: Vec<_> = all.iter().map(|(column, rounds)| (*column, median(rounds))).collect();
        report.row(&format!("  {step}, p50"), "ms", &values, Target::Any);
    }
    Ok(())
}

fn once(containerd: &Containerd, runtime: Runtime) -> Result<[f64; STEPS.len()]> {
    let id = containerd.id("steps");
    let mut took = [0.0; STEPS.len()];
    let mut since = Instant::now();
    let mut lap = |step: usize| {
        took[step] = ms(since.elapsed());
        since = Instant::now();
    };
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["true"]))?;
    lap(0);
    shim.create(&Streams::default())?;
    lap(1);
    shim.task.start(&id, "")?;
    lap(2);
    ensure!(shim.task.wait(&id, "")? == 0, "`true` failed under {}", runtime.name());
    lap(3);
    shim.task.delete(&id, "")?;
    lap(4);
    shim.shutdown();
    lap(5);
    Ok(took)
}
