//! The cost of one running VM on the host: memory per process, and wake-ups while idle.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::artifacts::Runtime;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::process::Process;

use crate::report::{Column, Report, Target};

/// Two heartbeats of the guest.
const IDLE: Duration = Duration::from_secs(20);
/// The shim's limit per second: each heartbeat, every 10 s, wakes the vsock device's thread, the reader and its timer.
const HEARTBEATS: f64 = 0.5;
const KIB_PER_MIB: f64 = 1024.0;

/// A process's share of the host's memory, in KiB.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Memory {
    /// Proportional set size, without the guest's memory.
    own: u64,
    /// Proportional set size of the guest's memory.
    guest: u64,
}

/// Parses proc_pid_smaps(5). The guest's memory is QEMU's memfd, which the shim and virtiofsd map too.
fn memory(smaps: &str) -> Memory {
    let mut memory = Memory::default();
    let mut in_guest = false;
    for line in smaps.lines() {
        match line.split_once(':') {
            Some(("Pss", rest)) => {
                let kib: u64 = rest.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
                *if in_guest { &mut memory.guest } else { &mut memory.own } += kib;
            }
            // The first line of a mapping starts with its addresses; its device number also contains a colon.
            Some((head, _)) if head.contains('-') => in_guest = line.contains("/memfd:memory"),
            _ => {}
        }
    }
    memory
}

fn memory_of(process: &Process) -> Result<Memory> {
    let path = format!("/proc/{}/smaps", process.pid);
    Ok(memory(&fs::read_to_string(&path).with_context(|| format!("read {path}"))?))
}

/// Context switches of all threads.
fn switches(process: &Process) -> u64 {
    let threads = fs::read_dir(format!("/proc/{}/task", process.pid)).into_iter().flatten().flatten();
    let statuses = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    let count = |status: String| -> u64 {
        let lines = status.lines().filter(|line| line.contains("ctxt_switches:"));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    statuses.map(count).sum()
}

/// Measures one idle container with its VM, compared with runc.
pub(crate) fn run(report: &mut Report) -> Result<()> {
    let containerd = Containerd::with(Setup { runtime: Some(Runtime::Husk), ..Setup::default() })?;
    let husk = containerd.detached_with(Runtime::Husk, &[], "idle", &["sleep", "100000"])?;
    let runc = containerd.detached_with(Runtime::Runc, &[], "idle", &["sleep", "100000"])?;
    let (shim, below) = containerd.shim_of(husk.id())?;
    let (runc_shim, _) = containerd.shim_of(runc.id())?;
    let named = |name: &str| -> Vec<&Process> { below.iter().filter(|p| p.name.starts_with(name)).collect() };
    let parts = [("shim", vec![&shim]), ("QEMU", named("qemu")), ("virtiofsd", named("virtiofsd"))];

    let (mut own, mut guest) = (0, 0);
    for (name, processes) in &parts {
        let mut part = Memory::default();
        for process in processes {
            let memory = memory_of(process)?;
            part.own += memory.own;
            part.guest += memory.guest;
        }
        own += part.own;
        guest += part.guest;
        let mut values = vec![(Column::Husk, part.own as f64 / KIB_PER_MIB)];
        if *name == "shim" {
            values.push((Column::Runc, memory_of(&runc_shim)?.own as f64 / KIB_PER_MIB));
        }
        report.row(&format!("  PSS of {name}, without guest memory"), "MiB", &values, Target::Any);
    }
    report.row(
        "host memory per VM, without guest memory",
        "MiB",
        &[(Column::Husk, own as f64 / KIB_PER_MIB)],
        Target::Any,
    );
    report.row("guest memory allocated on the host", "MiB", &[(Column::Husk, guest as f64 / KIB_PER_MIB)], Target::Any);

    let count = || parts.iter().map(|(_, all)| all.iter().map(|p| switches(p)).sum::<u64>()).collect::<Vec<_>>();
    let (before, runc_before) = (count(), switches(&runc_shim));
    // The measurement is that nothing happens.
    std::thread::sleep(IDLE);
    let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / IDLE.as_secs_f64();
    let runc_rate = rate(runc_before, switches(&runc_shim));
    for (((name, _), before), after) in parts.iter().zip(before).zip(count()) {
        let mut values = vec![(Column::Husk, rate(before, after))];
        if *name == "shim" {
            values.push((Column::Runc, runc_rate));
        }
        let target = match *name {
            "shim" => Target::AtMost(HEARTBEATS),
            "virtiofsd" => Target::AtMost(0.0),
            _ => Target::Any,
        };
        report.row(&format!("  wake-ups of {name}, idle VM"), "per s", &values, target);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_counted_separately() {
        let smaps = "\
7f00-7f10 rw-s 00000000 00:01 5 /memfd:memory-backend-memfd (deleted)\nSize: 16 kB\nPss: 12 kB\nPss_Dirty: 12 kB\n\
7f20-7f30 r-xp 00000000 fe:00 9 /usr/bin/qemu-system-x86_64\nSize: 16 kB\nPss: 7 kB\nVmFlags: rd ex\n\
7f40-7f50 rw-p 00000000 00:00 0 \nPss: 3 kB\n";
        assert_eq!(memory(smaps), Memory { own: 10, guest: 12 });
    }
}
