//! critest: one run of all its tests with one runtime handler, and what its report says of each.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::command;
use husk_tests::table::Verdict;
use serde_json::Value;

use crate::node::{self, Husk, Node};
use crate::outcome::{Outcome, Outcomes, in_one_line, left};

/// After this time critest reports the tests that it has not run yet as not run.
const TIMEOUT: Duration = Duration::from_secs(2 * 3600);
/// husk's configuration. A test of pods with hostPID expects that a container sees the programs of another one of its pod.
const HUSK: &str = "host_pid = \"pod\"\n";
/// Deadline for the rest: a test that is under way is given time to clean up.
const GRACE: Duration = Duration::from_secs(600);

/// Runs the tests with `matching` in their names on a node of their own. The output, the report and containerd's log are
/// written to `folder`.
pub fn run(handler: &str, matching: &str, folder: &Path) -> Result<Outcomes> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let node = Node::start(&folder.join("containerd.log"), Husk::Registered(HUSK)).context("start a node")?;
    let report = folder.join("report.json");
    let mut command = node.enter("sh");
    command.args(["-c", r#"cd /run/tmp && exec "$@" >"$0" 2>&1"#]).arg(folder.join("output")).arg(program());
    command.args(["-runtime-handler", handler, "-runtime-endpoint", &format!("unix://{}", node::SOCKET)]);
    command.args(["-nri-socket", node::NRI, "-ginkgo.no-color", "-ginkgo.v", "-ginkgo.seed=1"]);
    command.arg(format!("-ginkgo.timeout={}s", TIMEOUT.as_secs()));
    command.arg(format!("-ginkgo.json-report={}", report.display()));
    if !matching.is_empty() {
        command.arg(format!("-ginkgo.focus={}", escaped(matching)));
    }
    // The report has the failures: critest exits with a failure if there is any.
    command::run(command, None, TIMEOUT + GRACE).with_context(|| format!("see {}", folder.display()))?;
    let text = fs::read_to_string(&report).with_context(|| format!("critest wrote no report: {}", folder.display()))?;
    let mut outcomes = outcomes(&text)?;
    let (name, outcome) = left(&node.left()?);
    outcomes.insert(name, outcome);
    Ok(outcomes)
}

fn program() -> PathBuf {
    node::bin().join("critest")
}

/// What must exist before critest can run.
pub fn needs() -> PathBuf {
    program()
}

/// The regular expression for this text.
fn escaped(text: &str) -> String {
    let escape = |c: char| if c.is_ascii_punctuation() { vec!['\\', c] } else { vec![c] };
    text.chars().flat_map(escape).collect()
}

/// Reads ginkgo's JSON report.
fn outcomes(text: &str) -> Result<Outcomes> {
    let report: Value = serde_json::from_str(text).context("parse critest's report")?;
    let specs = report[0]["SpecReports"].as_array().context("critest's report has no SpecReports")?;
    let mut outcomes = Outcomes::new();
    for spec in specs.iter().filter(|spec| spec["LeafNodeType"] == "It") {
        let containers = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten();
        let words: Vec<&str> = containers.chain([&spec["LeafNodeText"]]).filter_map(Value::as_str).collect();
        let name = words.join(" ").split_whitespace().collect::<Vec<_>>().join(" ");
        let why = in_one_line(spec["Failure"]["Message"].as_str().unwrap_or_default());
        let verdict = match spec["State"].as_str().unwrap_or_default() {
            "passed" => Verdict::Pass,
            // What was not asked for: a test that skips itself says why.
            "skipped" if why.is_empty() => continue,
            "skipped" | "pending" => Verdict::Skip,
            "timedout" => Verdict::Timeout,
            "interrupted" | "aborted" => Verdict::Absent,
            _ => Verdict::Fail,
        };
        ensure!(
            outcomes.insert(name.clone(), Outcome { verdict, why }).is_none(),
            "critest has two tests named {name:?}"
        );
    }
    ensure!(!outcomes.is_empty(), "critest has run no test");
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_gives_each_tests_result_with_its_reason() {
        let spec = |name: &str, state: &str, message: &str| {
            serde_json::json!({"ContainerHierarchyTexts": ["[k8s.io] Pod", "x"], "LeafNodeType": "It",
                "LeafNodeText": name, "State": state, "Failure": {"Message": message}})
        };
        let report = serde_json::json!([{"SpecReports": [
            {"LeafNodeType": "BeforeSuite", "State": "passed"},
            spec("a", "passed", ""), spec("b", "failed", "no\n\tnetwork"), spec("c", "skipped", ""),
            spec("d", "skipped", "no SELinux"), spec("e", "panicked", "index"), spec("f", "timedout", ""),
        ]}]);
        let outcomes = outcomes(&report.to_string()).unwrap();
        let found: Vec<_> = outcomes.iter().map(|(name, o)| (name.as_str(), o.verdict, o.why.as_str())).collect();
        assert_eq!(
            found,
            [
                ("[k8s.io] Pod x a", Verdict::Pass, ""),
                ("[k8s.io] Pod x b", Verdict::Fail, "no network"),
                ("[k8s.io] Pod x d", Verdict::Skip, "no SELinux"),
                ("[k8s.io] Pod x e", Verdict::Fail, "index"),
                ("[k8s.io] Pod x f", Verdict::Timeout, ""),
            ]
        );
    }

    #[test]
    fn a_report_without_tests_is_an_error() {
        for text in ["", "{}", r#"[{"SpecReports":[]}]"#] {
            assert!(outcomes(text).is_err(), "{text}");
        }
    }
}
