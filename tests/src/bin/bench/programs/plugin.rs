//! The plugin of QEMU that counts instructions (`count.c`), and what it has counted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::repository;

/// A boot executes more.
const BOOT: u64 = 1_000_000;

/// What the plugin has counted between two marks.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// The kernel's function whose execution ended it; `exit` in the last one.
    pub(super) end: String,
    /// Instructions that QEMU translated.
    pub(super) translated: u64,
    /// How often each reason began.
    pub(super) entries: BTreeMap<String, u64>,
    /// Instructions by reason.
    pub(super) instructions: BTreeMap<String, u64>,
}

impl Window {
    /// All of its executed instructions.
    pub(super) fn total(&self) -> u64 {
        self.instructions.values().sum()
    }
}

/// The compiled plugin, and the kernel whose functions it knows.
pub(super) struct Plugin {
    image: PathBuf,
    map: PathBuf,
    folder: tempfile::TempDir,
}

impl Plugin {
    /// For the kernel in a build folder.
    pub(super) fn compile(kernel: &Path) -> Result<Self> {
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
    pub(super) fn arguments(&self, name: &str, options: &str) -> [String; 4] {
        let (plugin, map, out) = (self.file("so"), self.map.display(), self.file(name));
        let plugin = format!("{},map={map},out={}{options}", plugin.display(), out.display());
        ["-kernel".into(), self.image.display().to_string(), "-plugin".into(), plugin]
    }

    /// What it has counted in the VM of that name.
    pub(super) fn windows(&self, name: &str) -> Result<Vec<Window>> {
        let windows = read(&std::fs::read_to_string(self.file(name))?)?;
        let (map, image) = (self.map.display(), self.image.display());
        // The first window ends when the kernel starts, the second with the execution of the init.
        let boot = windows.get(1).is_some_and(|boot| boot.total() > BOOT);
        ensure!(boot, "{map} is not the map of {image}");
        Ok(windows)
    }
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
        assert_eq!((second.entries["execve"], second.instructions["execve"]), (2, 34));
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
