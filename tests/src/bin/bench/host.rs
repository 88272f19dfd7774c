//! The cost of one running VM on the host: memory per process, at its start and after many execs, and wake-ups while idle.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::artifacts::Runtime;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::process::Process;

use crate::report::{Column, Report, Target};

/// Two heartbeats of the guest.
pub(crate) const IDLE: Duration = Duration::from_secs(20);
/// The shim's limit per second: each heartbeat, every 10 s, wakes the vsock device's thread, the reader and its timer.
const HEARTBEATS: f64 = 0.5;
/// The goal for the memory of an idle guest, MiB.
const MAX_GUEST_MIB: f64 = 32.0;
/// Limits of the memory of its own that a VM takes besides the guest's, MiB.
const MAX_AT_START_MIB: f64 = 70.0;
const MAX_AFTER_EXECS_MIB: f64 = 90.0;
/// A thousand with twenty rounds.
const EXECS_PER_ROUND: usize = 50;
pub(crate) const KIB_PER_MIB: f64 = 1024.0;

/// A process's share of the host's memory, in KiB.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Proportional set size, without what follows.
    pub(crate) own: u64,
    /// Proportional set size of unchanged pages of files: the host's page cache, which it keeps as long as it likes.
    pub(crate) files: u64,
    /// Proportional set size of the guest's memory.
    pub(crate) guest: u64,
}

impl Memory {
    fn add(&mut self, other: Self) {
        self.own += other.own;
        self.files += other.files;
        self.guest += other.guest;
    }
}

/// Parses proc_pid_smaps(5). The guest's memory is QEMU's memfd, which the shim and virtiofsd map too.
fn memory(smaps: &str) -> Memory {
    let mut memory = Memory::default();
    let (mut in_guest, mut in_file) = (false, false);
    for line in smaps.lines() {
        let kib = |rest: &str| rest.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        match line.split_once(':') {
            Some(("Pss", rest)) if in_guest => memory.guest += kib(rest),
            Some(("Pss", rest)) if in_file => memory.files += kib(rest),
            Some(("Pss", rest)) => memory.own += kib(rest),
            // A part of the above: since Linux 6.0.
            Some(("Pss_Dirty", rest)) if in_file => {
                memory.files -= kib(rest);
                memory.own += kib(rest);
            }
            // The first line of a mapping starts with its addresses; its device number also contains a colon.
            Some((head, _)) if head.contains('-') => {
                in_guest = line.contains("/memfd:memory");
                in_file = !in_guest && line.contains(" /");
            }
            _ => {}
        }
    }
    memory
}

fn memory_of(process: &Process) -> Result<Memory> {
    let path = format!("/proc/{}/smaps", process.pid);
    Ok(memory(&fs::read_to_string(&path).with_context(|| format!("read {path}"))?))
}

/// The memory of some processes together.
pub(crate) fn memory_of_all<'a>(processes: impl Iterator<Item = &'a Process>) -> Result<Memory> {
    let mut all = Memory::default();
    for process in processes {
        all.add(memory_of(process)?);
    }
    Ok(all)
}

/// Context switches of all threads.
pub(crate) fn switches(process: &Process) -> u64 {
    let threads = fs::read_dir(format!("/proc/{}/task", process.pid)).into_iter().flatten().flatten();
    let statuses = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    let count = |status: String| -> u64 {
        let lines = status.lines().filter(|line| line.contains("ctxt_switches:"));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    statuses.map(count).sum()
}

/// Measures one idle container with its VM, compared with runc, and again after execs, fifty in each round.
pub(crate) fn run(rounds: usize, report: &mut Report) -> Result<()> {
    let containerd = Containerd::with(Setup { runtime: Some(Runtime::Husk), ..Setup::default() })?;
    let husk = containerd.detached_with(Runtime::Husk, &[], "idle", &["sleep", "100000"])?;
    let runc = containerd.detached_with(Runtime::Runc, &[], "idle", &["sleep", "100000"])?;
    let (shim, below) = containerd.shim_of(husk.id())?;
    let (runc_shim, _) = containerd.shim_of(runc.id())?;
    let named = |name: &str| -> Vec<&Process> { below.iter().filter(|p| p.name.starts_with(name)).collect() };
    let parts = [("shim", vec![&shim]), ("QEMU", named("qemu")), ("virtiofsd", named("virtiofsd"))];

    memory_rows(&parts, &runc_shim, "", MAX_AT_START_MIB, report)?;

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
    let execs = rounds * EXECS_PER_ROUND;
    for _ in 0..execs {
        for container in [&husk, &runc] {
            container.exec(&["true"]).ok()?;
        }
    }
    memory_rows(&parts, &runc_shim, &format!(", after {execs} execs"), MAX_AFTER_EXECS_MIB, report)
}

/// The processes of a VM, by their part in it.
type Parts<'a> = [(&'a str, Vec<&'a Process>); 3];

/// Rows for the memory of each part, and of all.
fn memory_rows(parts: &Parts<'_>, runc_shim: &Process, when: &str, most: f64, report: &mut Report) -> Result<()> {
    let mib = |kib: u64| kib as f64 / KIB_PER_MIB;
    let mut all = Memory::default();
    for (name, processes) in parts {
        let part = memory_of_all(processes.iter().copied())?;
        all.add(part);
        let mut values = vec![(Column::Husk, mib(part.own + part.files))];
        if *name == "shim" {
            let runc = memory_of(runc_shim)?;
            values.push((Column::Runc, mib(runc.own + runc.files)));
        }
        report.row(&format!("  PSS of {name}{when}"), "MiB", &values, Target::Any);
    }
    let mut row = |name: &str, kib, target| {
        report.row(&format!("{name}{when}"), "MiB", &[(Column::Husk, mib(kib))], target);
    };
    row("host memory per VM, without guest memory", all.own + all.files, Target::Any);
    row("  of it unchanged pages of files", all.files, Target::Any);
    row("  of it memory of its own", all.own, Target::AtMost(most));
    row("guest memory allocated on the host", all.guest, Target::AtMost(MAX_GUEST_MIB));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_counted_separately() {
        let smaps = "\
7f00-7f10 rw-s 00000000 00:01 5 /memfd:memory-backend-memfd (deleted)\nSize: 16 kB\nPss: 12 kB\nPss_Dirty: 12 kB\n\
7f20-7f30 r-xp 00000000 fe:00 9 /usr/bin/qemu-system-x86_64\nSize: 16 kB\nPss: 7 kB\nPss_Dirty: 2 kB\nVmFlags: rd ex\n\
7f40-7f50 rw-p 00000000 00:00 0 \nPss: 3 kB\n";
        assert_eq!(memory(smaps), Memory { own: 5, files: 5, guest: 12 });
    }
}
