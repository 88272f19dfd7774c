//! How many of the guest's instructions QEMU translates for a container: most of the time of a start without KVM.

use anyhow::{Context, Result, ensure};
use husk_tests::guest::Guest;
use husk_tests::programs::Programs;

use super::plugin::{Plugin, Window};
use crate::report::{Column, Report, Target};

/// The phases of a start in a new VM, each with the kernel's function that ends it and how often that has been executed
/// by then. The init, a worker and the program call execve(2), in this order.
const PHASES: [(&str, &str, usize); 5] = [
    ("kernel, up to PID 1", "run_init_process", 1),
    ("PID 1, until it connects to the host", "vsock_connect", 1),
    ("PID 1, until it starts a worker", EXECVE, 2),
    ("worker, until it starts the program", EXECVE, 3),
    ("the program and its end", "exit", 1),
];
const EXECVE: &str = "begin_new_exec";
/// Limits of a start in a new VM, and in one that has run a container before, in thousands.
const MAX_COLD: f64 = 330.0;
const MAX_WARM: f64 = 20.0;

/// Counts for containers that run `true`.
pub(super) async fn run(plugin: &Plugin, report: &mut Report) -> Result<()> {
    let phases = phases(&cold(plugin).await?)?;
    let mut row = |name: &str, instructions: u64, target| {
        report.row(name, "k instr", &[(Column::Husk, instructions as f64 / 1000.0)], target);
    };
    row("translated for `true` in a new VM", phases.iter().sum(), Target::AtMost(MAX_COLD));
    for ((title, ..), translated) in PHASES.iter().zip(phases) {
        row(&format!("  {title}"), translated, Target::Any);
    }
    let again = again(&windows_of(plugin, "again", &["first", "second", "third"]).await?)?;
    row("translated for `true` after another one", again, Target::AtMost(MAX_WARM));
    Ok(())
}

/// The windows of a VM that runs one container, and ends with it as the shim ends it: the guest neither deletes the
/// container nor shuts down.
async fn cold(plugin: &Plugin) -> Result<Vec<Window>> {
    let programs = Programs::new()?;
    let mut config = programs.vm_without_clock()?;
    config.qemu_arguments.extend(plugin.arguments("phases", ",phases=on"));
    let guest = Guest::boot_with(config).await?;
    programs.run_to_its_end(&guest, "cold").await?;
    guest.quit().await?;
    plugin.windows("phases")
}

/// The windows of a VM that runs these containers one after the other.
async fn windows_of(plugin: &Plugin, name: &str, containers: &[&str]) -> Result<Vec<Window>> {
    let programs = Programs::new()?;
    let mut config = programs.vm_without_clock()?;
    config.qemu_arguments.extend(plugin.arguments(name, ",phases=on"));
    let guest = Guest::boot_with(config).await?;
    for id in containers {
        programs.run(&guest, id).await?;
    }
    guest.shut_down().await?;
    plugin.windows(name)
}

/// What is translated in each of [`PHASES`]. The first window is the firmware's.
fn phases(windows: &[Window]) -> Result<Vec<u64>> {
    let (mut windows, mut execs) = (windows.iter().skip(1), 0);
    let phase = |(_, end, times): (&str, &str, usize)| {
        let mut translated = 0;
        loop {
            let window = windows.next().with_context(|| format!("the guest does not call {end} {times} times"))?;
            translated += window.translated;
            execs += usize::from(window.end == EXECVE);
            if window.end == end && (end != EXECVE || execs == times) {
                return Ok(translated);
            }
        }
    };
    PHASES.into_iter().map(phase).collect()
}

/// What is translated from the second container's worker to the third one's.
fn again(windows: &[Window]) -> Result<u64> {
    let execs: Vec<usize> = (0..windows.len()).filter(|at| windows[*at].end == EXECVE).collect();
    // The init, and two for each container.
    ensure!(execs.len() == 7, "{} calls of execve for three containers", execs.len());
    Ok(windows[execs[3] + 1..=execs[5]].iter().map(|window| window.translated).sum())
}
