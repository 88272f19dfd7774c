//! What a VM from the pool saves: a whole `ctr run` that takes one, beside one that boots its own VM and runc's; and many
//! starts at once with a pool of a few.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use husk_tests::artifacts::Runtime;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::operator::{husk, husk_json};

use crate::cpu::Cpu;
use crate::ctr::ms;
use crate::report::{Column, Report, Target};

/// The target for a whole `ctr run` under TCG, from the issue that introduced the pool.
const TIMES_RUNC: f64 = 2.2;
/// Simultaneous starts, and the size of the pool for them.
const STARTS: usize = 20;
const POOL: usize = 4;
/// For a full pool on a loaded machine.
const FULL: Duration = Duration::from_secs(300);

const COLUMNS: [Column; 3] = [Column::Husk, Column::Cold, Column::Runc];

/// Measures the pool.
pub(crate) fn run(rounds: usize, report: &mut Report) -> Result<()> {
    let with = |pool: usize| {
        let setup = Setup { runtime: Some(Runtime::Husk), husk: format!("pool = {pool}\n"), ..Setup::default() };
        Containerd::with(setup)
    };
    let (one, none) = (with(1)?, with(0)?);
    let mut samples = COLUMNS.map(|column| (column, Vec::new()));
    let mut cpu = samples.clone();
    // The first round reads everything from the disk.
    for round in 0..=rounds {
        for ((column, samples), (_, cpu)) in samples.iter_mut().zip(&mut cpu) {
            let (containerd, runtime) = match column {
                Column::Husk => (&one, Runtime::Husk),
                Column::Cold => (&none, Runtime::Husk),
                _ => (&none, Runtime::Runc),
            };
            if *column == Column::Husk {
                fill(&one, 1)?;
            }
            let used = Cpu::start(containerd)?;
            let took = start(containerd, runtime)?;
            if round > 0 {
                samples.push(took);
                cpu.push(used.used()?);
            }
        }
    }
    husk(&one, &["pool", "drain"])?.ok()?;
    report.distribution("ctr run --rm true, from the pool", "ms", &samples, Target::TimesRunc(TIMES_RUNC));
    let name = "  its CPU time, with containerd's and ctr's";
    report.mean(name, "ms", &cpu, Target::Any);
    report.note("  the CPU time with a pool includes what the VM that replaces the one in use has taken so far");
    let few = with(POOL)?;
    let many = COLUMNS.map(|column| {
        let at_once = || match column {
            Column::Husk => {
                fill(&few, POOL)?;
                at_once(&few, Runtime::Husk)
            }
            Column::Cold => at_once(&none, Runtime::Husk),
            _ => at_once(&none, Runtime::Runc),
        };
        at_once().map(|took| (column, took))
    });
    let many = many.into_iter().collect::<Result<Vec<_>>>()?;
    let name = format!("each of {STARTS} simultaneous ctr run --rm true, pool of {POOL}");
    report.distribution(&name, "ms", &many, Target::Any);
    husk(&few, &["pool", "drain"])?.ok().map(drop)
}

/// Waits until this many VMs wait.
fn fill(containerd: &Containerd, size: usize) -> Result<()> {
    husk(containerd, &["pool", "fill"])?.ok()?;
    wait_for(FULL, "the pool is full", || {
        let pool = husk_json(containerd, &["pool", "list", "--json"]).ok()?;
        let waiting = pool.as_array()?.iter().filter(|vm| vm["state"] == "waiting").count();
        (waiting == size).then_some(())
    })
}

fn start(containerd: &Containerd, runtime: Runtime) -> Result<f64> {
    let ctr = containerd.ctr(["run", "--rm", "--runtime", runtime.name(), containerd.image()]);
    Ok(ms(ctr.arg(containerd.id("run")).arg("true").ok()?.took))
}

fn at_once(containerd: &Containerd, runtime: Runtime) -> Result<Vec<f64>> {
    thread::scope(|scope| {
        let starts: Vec<_> = (0..STARTS).map(|_| scope.spawn(|| start(containerd, runtime))).collect();
        let ended = starts.into_iter().map(|start| start.join().map_err(|_| anyhow!("a start panicked"))?);
        ended.collect::<Result<Vec<_>>>().context("simultaneous starts")
    })
}
