//! The OCI runtime-tools' validation programs. Each makes bundles, has them run by the runtime of its environment, which
//! is this program (see [`crate::adapter`]), and prints what it found, in the Test Anything Protocol: outside the
//! container itself, and inside by `runtimetest`, the container's process, which compares what it sees with its spec.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::adapter;
use crate::place::{Place, bin, suites};
use crate::table::{Results, Verdict};

/// Deadline for one program. `linux_cgroups_cpus` runs 16 containers one after the other.
const DEADLINE: Duration = Duration::from_secs(900);
/// In the folder of the programs, but not one of them.
const NOT_PROGRAMS: [&str; 2] = ["runtimetest", "rootfs-amd64.tar.gz"];

fn folder() -> PathBuf {
    suites().join("validation")
}

/// The names of all programs.
pub fn list() -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder()).with_context(|| format!("read {}", folder().display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !NOT_PROGRAMS.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Runs one program. Returns the results and the output.
pub fn run(place: &Place, program: &str) -> Result<(Results, String)> {
    let shim = place.shim()?;
    let runtime = std::env::current_exe().context("find this program")?;
    let run = place.run(
        &folder(),
        &folder().join(program),
        |command| {
            command.env("RUNTIME", runtime).env(adapter::SHIM, shim).env(adapter::PUBLISHER, bin().join("containerd"));
        },
        DEADLINE,
    );
    Ok(match run {
        Ok(output) => {
            let text = output.text();
            let results = results(program, &text, output.code() == 0);
            (results, format!("{text}\n--- stderr, exit code {} ---\n{}", output.code(), output.errors()))
        }
        Err(error) => {
            let text = format!("{error:#}");
            let mut results = results(program, &text, false);
            results.insert(program.to_owned(), Verdict::Timeout);
            (results, text)
        }
    })
}

/// The assertions that a program prints, each under its description, and the program as a whole. An assertion made
/// several times passes if it passes each time. A program that asserts nothing has failed. Skipped assertions are about
/// what the bundle does not set: they count only if there is no other.
fn results(program: &str, output: &str, ended_well: bool) -> Results {
    let mut results = Results::new();
    let mut without = Verdict::Fail;
    for line in output.lines() {
        let (verdict, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) if rest.contains("# SKIP") => {
                without = Verdict::Skip;
                continue;
            }
            (Some(rest), _) => (Verdict::Pass, rest),
            (_, Some(rest)) => (Verdict::Fail, rest),
            _ => continue,
        };
        let description = rest.split_once(" - ").map_or("", |(_number, description)| description);
        let name = format!("{program}: {}", without_details(description));
        let worst = results.entry(name).or_insert(verdict);
        *worst = verdict.max(*worst);
    }
    let worst = results.values().copied().max().unwrap_or(without);
    results.insert(program.to_owned(), if ended_well { worst } else { worst.max(Verdict::Fail) });
    results
}

/// A description without what differs from run to run, in one column of a table.
fn without_details(description: &str) -> String {
    let words = description.split_whitespace().map(|word| if word.contains("ocitest") { "BUNDLE" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

/// What must exist before this suite can run.
pub fn needs() -> [PathBuf; 2] {
    [folder().join("runtimetest"), bin().join("containerd-shim-runc-v2")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_result_of_an_assertion_counts() {
        let output = "TAP version 13\nok 1 - a is set\n  ---\n  {\n  not ok\n  }\nnot ok 2 - a is set\nok 3 - b\n\
                      ok 4 # SKIP c\n1..4\n";
        let wanted = [("p", Verdict::Fail), ("p: a is set", Verdict::Fail), ("p: b", Verdict::Pass)];
        assert_eq!(results("p", output, true), wanted.into_iter().map(|(n, v)| (n.to_owned(), v)).collect());
        assert_eq!(results("p", "ok 1 - b", false)["p"], Verdict::Fail);
        assert_eq!(results("p", "1..0", true)["p"], Verdict::Fail);
        assert_eq!(results("p", "ok 1 # SKIP c", true)["p"], Verdict::Skip);
        assert_eq!(results("p", "ok 1 - b\nok 2 - open /run/tmp/ocitest81/x", true).len(), 3);
    }
}
