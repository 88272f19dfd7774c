//! Where the instructions of a boot and of starting programs go, as a plugin of QEMU (`count.c`) counts them.

mod plugin;
mod translated;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use husk_tests::artifacts::repository;
use husk_tests::guest::Guest;
use husk_tests::programs::{Program, Programs};

use crate::report::{Column, Report, Target};
use plugin::{Plugin, Window};

/// How often each program is started.
const TIMES: u32 = 20;

/// The rows of a program: the title, the plugin's reasons, and which of those are counted as events.
const ROWS: [(&str, &[&str], &[&str]); 9] = [
    ("page faults", &["page fault"], &["page fault"]),
    ("execve", &["execve"], &["execve"]),
    ("exit and wait", &["exit_group", "wait4"], &["exit_group"]),
    ("fork", &["clone", "fork", "vfork", "new task"], &["clone", "fork", "vfork"]),
    ("virtio-fs requests", &["virtio-fs request", "virtio-fs completion"], &["virtio-fs request"]),
    ("TLB flushes", &["TLB flush", "change of address space"], &["TLB flush", "change of address space"]),
    ("interrupts", &["interrupt"], &["interrupt"]),
    ("kernel threads", &["kernel thread"], &[]),
    ("user space", &["user"], &[]),
];

fn sum(map: &BTreeMap<String, u64>, keys: &[&str]) -> u64 {
    keys.iter().filter_map(|key| map.get(*key)).sum()
}

/// Counts with the kernel in the build folder `kernel`, by default that of `out/vmlinux`.
pub(crate) async fn run(kernel: Option<&Path>, report: &mut Report) -> Result<()> {
    let plugin = Plugin::compile(&kernel.map_or_else(|| repository().join(".cache/kernel/kernel"), PathBuf::from))?;
    translated::run(&plugin, report).await?;
    let programs = Programs::new()?;
    let mut config = programs.vm()?;
    config.qemu_arguments.extend(plugin.arguments("programs", ""));
    let guest = Guest::boot_with(config).await?;
    for program in [Program::Static, Program::Dynamic] {
        programs.cost(&guest, &format!("{program:?}").to_lowercase(), program, TIMES).await?;
    }
    guest.shut_down().await?;
    let windows = plugin.windows("programs")?;
    let boot = &windows[1];
    let million = boot.total() as f64 / 1e6;
    report.row("kernel's first instruction -> PID 1", "M instr", &[(Column::Husk, million)], Target::Any);
    let counted = |window: &&Window| window.entries.get("execve") == Some(&TIMES.into());
    let counted: Vec<_> = windows.iter().filter(counted).collect();
    ensure!(counted.len() == 2, "{} windows with {TIMES} calls of execve", counted.len());
    for (window, program) in counted.into_iter().zip(["a static program", "a dynamic program"]) {
        rows(window, program, report);
    }
    Ok(())
}

fn rows(window: &Window, program: &str, report: &mut Report) {
    let each = |number: u64| number as f64 / f64::from(TIMES);
    let mut row = |name: &str, number| {
        report.row(name, "k instr", &[(Column::Husk, each(number) / 1000.0)], Target::Any);
    };
    row(&format!("starting {program}, in sum"), window.total());
    let mut rest = window.total();
    for (title, reasons, events) in ROWS {
        let instructions = sum(&window.instructions, reasons);
        rest -= instructions;
        let times = match sum(&window.entries, events) {
            0 => String::new(),
            events => format!(" ({:.0})", each(events)),
        };
        row(&format!("  {title}{times}"), instructions);
    }
    row("  other system calls and exceptions", rest);
}
