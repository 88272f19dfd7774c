//! Where the instructions of a boot and of starting programs go, as a plugin of QEMU (`count.c`) counts them.

mod translated;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::repository;
use husk_tests::guest::Guest;
use husk_tests::programs::{Program, Programs};

use crate::report::{Column, Report, Target};

/// How often each program is started.
const TIMES: u32 = 20;
/// A boot executes more.
const BOOT: u64 = 1_000_000;

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

/// What the plugin has counted between two marks.
#[derive(Debug, Default)]
struct Window {
    /// The kernel's function whose execution ended it; `exit` in the last one.
    end: String,
    /// Instructions that QEMU translated.
    translated: u64,
    /// How often each reason began.
    entries: BTreeMap<String, u64>,
    /// Instructions by reason.
    instructions: BTreeMap<String, u64>,
}

impl Window {
    fn total(&self) -> u64 {
        self.instructions.values().sum()
    }
}

fn sum(map: &BTreeMap<String, u64>, keys: &[&str]) -> u64 {
    keys.iter().filter_map(|key| map.get(*key)).sum()
}

/// The compiled plugin, and the kernel whose functions it knows.
struct Plugin {
    image: PathBuf,
    map: PathBuf,
    folder: tempfile::TempDir,
}

impl Plugin {
    /// For the kernel in a build folder.
    fn compile(kernel: &Path) -> Result<Self> {
        let [image, map] = ["vmlinux", "System.map"].map(|name| kernel.join(name));
        for file in [&image, &map] {
            ensure!(file.is_file(), "{} is missing: run kernel-config/build", file.display());
        }
        let plugin = Self { image, map, folder: tempfile::tempdir()? };
        let source = repository().join("tests/src/bin/bench/programs/count.c");
        let mut cc = Command::new("cc");
        cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]).arg(plugin.file("so")).arg(source);
        let output = cc.output().context("run cc")?;
        ensure!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
        Ok(plugin)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// QEMU's arguments for a VM whose windows [`Self::windows`] reads under the same name.
    fn arguments(&self, name: &str, options: &str) -> [String; 4] {
        let (plugin, map, out) = (self.file("so"), self.map.display(), self.file(name));
        let plugin = format!("{},map={map},out={}{options}", plugin.display(), out.display());
        ["-kernel".into(), self.image.display().to_string(), "-plugin".into(), plugin]
    }

    fn windows(&self, name: &str) -> Result<Vec<Window>> {
        let windows = read(&std::fs::read_to_string(self.file(name))?)?;
        let (map, image) = (self.map.display(), self.image.display());
        // The first window ends when the kernel starts, the second with the execution of the init.
        let boot = windows.get(1).is_some_and(|boot| boot.total() > BOOT);
        ensure!(boot, "{map} is not the map of {image}");
        Ok(windows)
    }
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

/// Reads the plugin's lines: `window NUMBER END`, `translated WHERE NUMBER`,
/// `entries REASON NUMBER` and `REASON FUNCTION INSTRUCTIONS`.
fn read(lines: &str) -> Result<Vec<Window>> {
    let mut windows = Vec::new();
    for line in lines.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        if let ["window", _, end] = fields[..] {
            windows.push(Window { end: end.into(), ..Window::default() });
            continue;
        }
        let window = windows.last_mut().context("the first line is no window")?;
        if let ["translated", _, number] = fields[..] {
            window.translated += number.parse::<u64>().with_context(|| format!("in {line:?}"))?;
            continue;
        }
        let (map, reason, number) = match fields[..] {
            ["entries", reason, number] => (&mut window.entries, reason, number),
            [reason, _, number] => (&mut window.instructions, reason, number),
            _ => anyhow::bail!("unexpected line {line:?}"),
        };
        *map.entry(reason.into()).or_default() += number.parse::<u64>().with_context(|| format!("in {line:?}"))?;
    }
    Ok(windows)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugins_lines_are_summed_by_reason() -> Result<()> {
        let windows = read(
            "window\t0\ta\nwindow\t1\tb\ntranslated\tkernel\t6\ntranslated\tuser\t1\nentries\texecve\t2\nexecve\tf\t30\nexecve\tg\t4\nuser\tuser\t5\n",
        )?;
        let [first, second] = &windows[..] else { anyhow::bail!("{windows:?}") };
        assert_eq!((first.total(), second.total()), (0, 39));
        assert_eq!((&*first.end, first.translated, &*second.end, second.translated), ("a", 0, "b", 7));
        assert_eq!((second.entries["execve"], sum(&second.instructions, &["execve", "fork"])), (2, 34));
        Ok(())
    }

    #[test]
    fn a_line_of_another_form_is_named() {
        for (lines, expected) in [
            ("execve\tf\t30\n", "the first line is no window"),
            ("window\t0\ta\nx\n", "unexpected line \"x\""),
            ("window\t0\ta\na\tb\tc\n", "in \"a\\tb\\tc\""),
        ] {
            assert_eq!(read(lines).unwrap_err().to_string(), expected, "{lines:?}");
        }
    }
}
