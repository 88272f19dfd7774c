//! What many VMs take together: memory, CPU time and wake-ups of idle ones, and many starts at once.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use husk_tests::artifacts::Runtime;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::process::{Process, descendants};

use crate::cpu::{Cpu, MS_PER_TICK};
use crate::ctr::{BOTH, ms};
use crate::host::{IDLE, KIB_PER_MIB, Memory, memory_of_all, switches};
use crate::report::{Report, Target};

/// Simultaneous starts.
const STARTS: usize = 16;
/// The target for them under TCG.
const STARTS_TIMES_RUNC: f64 = 5.0;
/// A guest reports the pages that its boot has freed two seconds later.
const SETTLED: Duration = Duration::from_secs(5);

/// What containers take while nothing happens in them.
#[derive(Debug, Default)]
struct Idle {
    memory: Memory,
    /// Milliseconds in a second.
    cpu: f64,
    /// In a second.
    switches: f64,
}

/// Measures so many idle VMs beside as many containers of runc, and many starts at once.
pub(crate) fn run(vms: usize, report: &mut Report) -> Result<()> {
    let daemon = || Containerd::with(Setup { runtime: Some(Runtime::Husk), ..Setup::default() });
    let idle = BOTH.map(|(column, runtime)| idle(&daemon()?, runtime, vms).map(|idle| (column, idle)));
    let idle = idle.into_iter().collect::<Result<Vec<_>>>()?;
    let mut row = |name: &str, unit, value: &dyn Fn(&Idle) -> f64| {
        let values: Vec<_> = idle.iter().map(|(column, idle)| (*column, value(idle))).collect();
        report.row(&format!("{vms} idle containers: {name}"), unit, &values, Target::Any);
    };
    let each = |kib: u64| kib as f64 / KIB_PER_MIB / vms as f64;
    row("memory of each, without guest memory", "MiB", &|idle| each(idle.memory.own + idle.memory.files));
    row("guest memory of each on the host", "MiB", &|idle| each(idle.memory.guest));
    row("CPU time of all", "ms per s", &|idle| idle.cpu);
    row("wake-ups of all", "per s", &|idle| idle.switches);
    starts(&daemon()?, report)
}

/// Starts containers one after the other, and looks at all.
fn idle(containerd: &Containerd, runtime: Runtime, count: usize) -> Result<Idle> {
    let start = |_| containerd.detached_with(runtime, &[], "idle", &["sleep", "100000"]);
    // Dropping one deletes it.
    let _containers = (0..count).map(start).collect::<Result<Vec<_>>>()?;
    thread::sleep(SETTLED);
    let processes: Vec<Process> =
        descendants(containerd.pid()).into_iter().filter(|process| !is_daemon(process)).collect();
    let switched = || processes.iter().map(switches).sum::<u64>();
    let ticked = || processes.iter().map(Process::cpu_ticks).sum::<u64>();
    let (switches_before, ticks_before) = (switched(), ticked());
    // The measurement is that nothing happens.
    thread::sleep(IDLE);
    let seconds = IDLE.as_secs_f64();
    let ticks = ticked().saturating_sub(ticks_before) as f64;
    Ok(Idle {
        memory: memory_of_all(processes.iter())?,
        cpu: ticks * MS_PER_TICK / seconds,
        switches: switched().saturating_sub(switches_before) as f64 / seconds,
    })
}

/// Whether a process serves all containers.
fn is_daemon(process: &Process) -> bool {
    process.name == "containerd" || process.name == "sh"
}

fn starts(containerd: &Containerd, report: &mut Report) -> Result<()> {
    let (mut each, mut all, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    for (column, runtime) in BOTH {
        // The first one reads everything from the disk.
        start(containerd, runtime)?;
        let (used, began) = (Cpu::start(containerd)?, Instant::now());
        let took = thread::scope(|scope| {
            let starts: Vec<_> = (0..STARTS).map(|_| scope.spawn(|| start(containerd, runtime))).collect();
            let ended = starts.into_iter().map(|start| start.join().map_err(|_| anyhow!("a start panicked"))?);
            ended.collect::<Result<Vec<_>>>().context("simultaneous starts")
        })?;
        all.push((column, ms(began.elapsed())));
        cpu.push((column, used.used()?));
        each.push((column, took));
    }
    let name = format!("{STARTS} simultaneous ctr run --rm true");
    report.row(&format!("{name}, until all have ended"), "ms", &all, Target::TimesRunc(STARTS_TIMES_RUNC));
    report.distribution(&format!("  each of {name}"), "ms", &each, Target::Any);
    report.row("  CPU time of all, with containerd's and ctr's", "ms", &cpu, Target::Any);
    Ok(())
}

fn start(containerd: &Containerd, runtime: Runtime) -> Result<f64> {
    let ctr = containerd.ctr(["run", "--rm", "--runtime", runtime.name(), containerd.image()]);
    Ok(ms(ctr.arg(containerd.id("run")).arg("true").ok()?.took))
}
