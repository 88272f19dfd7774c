//! Pods on a cluster: scripts that print what kubectl says, for a pod of runc's RuntimeClass and for one of husk's.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::artifacts::repository;
use husk_tests::command::{self, Output};
use husk_tests::table::Verdict;

use crate::cluster::{Cluster, NODE};
use crate::outcome::{Outcome, Outcomes, in_one_line, left};

/// Deadline for one script.
const DEADLINE: Duration = Duration::from_secs(600);

/// Where scripts are, and `common.sh` with their functions.
fn folder() -> PathBuf {
    repository().join("tests/kubernetes")
}

/// The names of all scripts.
fn scripts() -> Result<Vec<String>> {
    let folder = folder().join("pods");
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".sh").map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Runs the scripts with `matching` in their names for each class, the first of which is the reference: the others pass
/// if they print the same. Returns the results in the order of the classes.
pub fn run(version: &str, classes: &[&str], matching: &str, logs: &Path) -> Result<Vec<Outcomes>> {
    let mut cluster =
        Cluster::start(version, logs).with_context(|| format!("start a cluster; see {}", logs.display()))?;
    cluster.serve_metrics(logs)?;
    let mut all = vec![Outcomes::new(); classes.len()];
    for script in scripts()?.into_iter().filter(|name| name.contains(matching)) {
        let mut reference: Option<String> = None;
        for (class, outcomes) in classes.iter().zip(&mut all) {
            let (outcome, printed) = run_one(&cluster, &script, class, reference.as_deref(), logs)?;
            reference = reference.or(printed);
            outcomes.insert(script.clone(), outcome);
        }
    }
    let found = cluster.node().left()?;
    all.iter_mut().for_each(|outcomes| outcomes.extend([left(&found)]));
    Ok(all)
}

/// Runs a script, a path in [`folder`] without its suffix, for the pod of this name with this class.
pub fn script(cluster: &Cluster, script: &str, class: &str, pod: &str, deadline: Duration) -> Result<Output> {
    command::run(command(cluster, script, class, pod), None, deadline)
}

/// The command that runs a script.
pub fn command(cluster: &Cluster, script: &str, class: &str, pod: &str) -> Command {
    let (top, folder) = (repository(), folder());
    let (top, folder) = (top.display(), folder.display());
    let variables = format!("CLASS={class} POD={pod} NODE={NODE} REPOSITORY={top}");
    let line = format!("set -eu; {variables}; . {folder}/common.sh; . {folder}/{script}.sh");
    let mut command = cluster.command();
    command.args(["-c", &line]);
    command
}

/// Runs a script for one class. Returns the result, and what it printed if it ended well.
fn run_one(
    cluster: &Cluster,
    script: &str,
    class: &str,
    reference: Option<&str>,
    logs: &Path,
) -> Result<(Outcome, Option<String>)> {
    let pod = format!("{script}-{class}").replace('_', "-");
    let ran = self::script(cluster, &format!("pods/{script}"), class, &pod, DEADLINE);
    let described = cluster.sh(&format!("kubectl describe pod {pod}; kubectl get pod {pod} -o yaml"), DEADLINE)?;
    let deleted = cluster.sh(&format!("kubectl delete pod {pod} --ignore-not-found --timeout=120s"), DEADLINE)?.ok();
    let (printed, why) = match ran {
        Ok(output) if output.code() == 0 => (Some(output.text().replace(&pod, "POD").replace(class, "CLASS")), None),
        Ok(output) => (None, Some(format!("exit code {}: {} {}", output.code(), output.errors(), output.text()))),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    let why =
        why.or(deleted.err().map(|error| format!("{error:#}"))).or_else(|| differs(printed.as_deref(), reference));
    let text = format!(
        "{}\n--- {} ---\n{}",
        printed.as_deref().unwrap_or_default(),
        why.as_deref().unwrap_or("passed"),
        described.text()
    );
    let log = logs.join(format!("{script}.{class}"));
    fs::write(&log, text).with_context(|| format!("write {}", log.display()))?;
    let verdict = if why.is_none() { Verdict::Pass } else { Verdict::Fail };
    Ok((Outcome { verdict, why: in_one_line(&why.unwrap_or_default()) }, printed))
}

/// The first line that differs from the reference.
fn differs(printed: Option<&str>, reference: Option<&str>) -> Option<String> {
    let (printed, reference) = (printed?, reference?);
    let numbered = |text: &str| text.lines().map(str::to_owned).enumerate().collect::<BTreeMap<_, _>>();
    let (ours, theirs) = (numbered(printed), numbered(reference));
    let lines = ours.len().max(theirs.len());
    let at = (0..lines).find(|line| ours.get(line) != theirs.get(line))?;
    let line = |lines: &BTreeMap<usize, String>| lines.get(&at).cloned().unwrap_or_else(|| "(nothing)".into());
    Some(format!("line {}: {:?} instead of {:?}", at + 1, line(&ours), line(&theirs)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_named() {
        assert_eq!(differs(Some("a\nb"), Some("a\nb")), None);
        assert_eq!(differs(Some("a"), None), None);
        assert_eq!(differs(Some("a\nc"), Some("a\nb")).unwrap(), r#"line 2: "c" instead of "b""#);
        assert_eq!(differs(Some("a"), Some("a\nb")).unwrap(), r#"line 2: "(nothing)" instead of "b""#);
    }
}
