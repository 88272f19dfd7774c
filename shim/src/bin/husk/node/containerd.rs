//! The node's containerd: what it reads from a configuration, and its restart.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use toml::{Table, Value};

use super::command;
use super::edit::NAME;
use super::places::SHIM;

/// Deadline for `containerd config dump`, which takes some 100 ms.
const DUMP: Duration = Duration::from_secs(60);
/// Deadline for a restart. systemd waits until containerd has loaded its plugins, and kills it after 90 s by default.
const RESTART: Duration = Duration::from_secs(300);
/// The tables of runtimes in what containerd prints, whatever the version of the file that it has read.
const RUNTIMES: [&str; 2] = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];

/// The configuration that this containerd makes of a file, with its defaults. The file may be missing.
pub(crate) fn effective(program: &str, file: &Path) -> Result<Table> {
    let mut dump = Command::new(program);
    dump.arg("--config").arg(file).args(["config", "dump"]);
    let text = command::run(&mut dump, DUMP)?;
    text.parse().with_context(|| format!("parse the output of {program:?} config dump"))
}

/// Restarts containerd with the node's command, such as `systemctl restart containerd`.
pub(crate) fn restart(words: &str) -> Result<()> {
    let mut words = words.split_whitespace();
    let program = words.next().context("--restart names no program")?;
    // systemctl does nothing, with success, if it takes a changed root for a container's.
    command::run(Command::new(program).args(words).env("SYSTEMD_IGNORE_CHROOT", "1"), RESTART)?;
    Ok(())
}

/// Checks that a changed configuration registers husk and changes nothing else.
pub(crate) fn check(before: &Table, after: &Table) -> Result<()> {
    let runtime = runtime(after).with_context(|| format!("containerd would not have the runtime {NAME:?}"))?;
    let shim = runtime.get("runtime_type").and_then(Value::as_str);
    ensure!(shim == Some(SHIM), "containerd would start {shim:?} for the runtime {NAME:?}, not {SHIM:?}");
    if let Some(lost) = lost(before, after, "") {
        bail!("containerd would lose the setting {lost} of its present configuration");
    }
    Ok(())
}

fn runtime(effective: &Table) -> Option<&Table> {
    let plugins = effective.get("plugins")?.as_table()?;
    let of = |plugin| -> Option<&Table> {
        let containerd = plugins.get(plugin)?.get("containerd")?;
        containerd.get("runtimes")?.get(NAME)?.as_table()
    };
    RUNTIMES.into_iter().find_map(of)
}

/// The first setting that differs. An empty value may disappear: containerd prints the defaults of some sections only
/// if no file mentions them. The list of imports contains the name of the file itself, and husk's runtime is an
/// installation's to change.
fn lost(before: &Table, after: &Table, within: &str) -> Option<String> {
    before.iter().find_map(|(key, value)| {
        let path = if within.is_empty() { key.clone() } else { format!("{within}.{key}") };
        match (value, after.get(key)) {
            _ if path == "imports" || path.ends_with(".containerd.runtimes.husk") => None,
            (Value::Table(value), Some(Value::Table(other))) => lost(value, other, &path),
            (Value::Table(value), None) => lost(value, &Table::new(), &path),
            (value, Some(other)) if value == other => None,
            (value, None) if is_empty(value) => None,
            // containerd 1.7 takes an empty mode for this one, and sets it itself only in its default list of runtimes.
            (Value::String(mode), Some(Value::String(other))) if key == "sandbox_mode" && mode == "podsandbox" => {
                (!other.is_empty()).then_some(path)
            }
            _ => Some(path),
        }
    })
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Integer(number) => *number == 0,
        Value::Float(number) => *number == 0.0,
        Value::Boolean(is) => !is,
        Value::Array(items) => items.is_empty(),
        Value::Table(_) | Value::Datetime(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_setting_is_named() {
        let table = |text: &str| text.parse::<Table>().unwrap();
        let husk = "[plugins.b.containerd.runtimes.husk]\nsandboxer = 'shim'\n";
        let before = format!("imports = ['a']\nx = ''\n[plugins.a.options]\nCgroup = true\nnone = 0\n{husk}");
        let before = table(&before);
        let cases = [
            ("imports = ['b']\n[plugins.a.options]\nCgroup = true\nnew = 1\n", None),
            ("x = ''\n[plugins.a.options]\nCgroup = false\n", Some("plugins.a.options.Cgroup")),
            ("x = 'y'\n[plugins.a.options]\nCgroup = true\n", Some("x")),
            ("x = ''\n[plugins.a]\n", Some("plugins.a.options.Cgroup")),
            ("[plugins]\na = 1\n", Some("plugins.a")),
        ];
        for (after, expected) in cases {
            assert_eq!(lost(&before, &table(after), "").as_deref(), expected, "{after}");
        }
    }
}
