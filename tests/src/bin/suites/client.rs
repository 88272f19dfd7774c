//! The tests of containerd's Go client, `integration/client`. Each runs in a process of its own, which starts a
//! containerd of its own and pulls its image from a registry on the loopback address.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::place::{Place, bin, suites};
use crate::registry::{Images, serve};
use crate::table::{Results, Verdict};

/// Deadline for one test. VMs are emulated where the machine has no KVM.
const DEADLINE: Duration = Duration::from_secs(300);
/// Tests with a deadline of their own, with the reason.
const DEADLINES: [(&str, Duration, &str); 2] = [
    ("TestContainerExecLargeOutputWithTTY", Duration::from_secs(2700), "prints 100 × 6.9 MB to a terminal"),
    ("TestUserNamespaces", Duration::from_secs(600), "runs six containers"),
];
/// Address of the registry, which `tests/suites/images/images.go` names: each place has a network of its own.
const REGISTRY: &str = "127.0.0.1:5000";

/// The names of all tests.
pub fn list() -> Result<Vec<String>> {
    let program = bin().join("client.test");
    let mut command = std::process::Command::new(&program);
    command.args(["-test.short", "-test.list", "."]);
    let output = husk_tests::command::run(command, None, Duration::from_secs(60))?.ok()?.text();
    let tests = output.lines().filter(|line| line.starts_with("Test"));
    Ok(tests.map(str::to_owned).collect())
}

/// Makes a place ready for this suite: starts the registry.
pub fn prepare(place: &Place) -> Result<()> {
    let listener = place.containerd.in_network(|| TcpListener::bind(REGISTRY).context("listen for the registry"))?;
    serve(listener, Arc::new(Images::open(&images())?));
    Ok(())
}

fn images() -> PathBuf {
    suites().join("images")
}

/// Runs one test. Returns the results and the output.
pub fn run(place: &Place, test: &str) -> Result<(Results, String)> {
    let own = DEADLINES.iter().find(|(name, ..)| *name == test);
    let deadline = own.map_or(DEADLINE, |(_, deadline, _)| *deadline);
    let pattern = format!("^{test}$");
    let digest = Images::open(&images())?.digest("busybox:1")?.to_owned();
    let run = place.run(
        &bin(),
        &bin().join("client.test"),
        |command| {
            command.args(["-test.v", "-test.root", "-no-criu", "-test.run", &pattern]);
            command.env("TEST_RUNTIME", place.containerd.runtime().name()).env("HUSK_SUITES_BUSYBOX", digest);
        },
        deadline,
    );
    Ok(match run {
        Ok(output) => {
            let text = output.text();
            let mut results = results(&text);
            // A program that dies, or that fails outside of its test.
            if output.code() != 0 {
                let verdict = results.entry(test.to_owned()).or_insert(Verdict::Fail);
                *verdict = (*verdict).max(Verdict::Fail);
            }
            (results, format!("{text}\n--- stderr, exit code {} ---\n{}", output.code(), output.errors()))
        }
        Err(error) => {
            let text = format!("{error:#}");
            let mut results = results(&text);
            results.insert(test.to_owned(), Verdict::Timeout);
            (results, text)
        }
    })
}

/// What `-test.v` prints of each test and its parts.
fn results(output: &str) -> Results {
    let mut results = Results::new();
    for line in output.lines() {
        let Some((verdict, rest)) = line.trim_start().strip_prefix("--- ").and_then(|rest| rest.split_once(": "))
        else {
            continue;
        };
        let verdict = match verdict {
            "PASS" => Verdict::Pass,
            "FAIL" => Verdict::Fail,
            "SKIP" => Verdict::Skip,
            _ => continue,
        };
        if let Some((name, _time)) = rest.rsplit_once(" (") {
            results.insert(name.to_owned(), verdict);
        }
    }
    results
}

/// What must exist before this suite can run.
pub fn needs() -> [PathBuf; 2] {
    [bin().join("client.test"), images().join("tags")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_results_of_a_go_test_and_its_parts_are_read() {
        let output = "=== RUN   TestA\n=== PAUSE TestA\n--- FAIL: TestA (1.20s)\n    --- PASS: TestA/x_y (0.00s)\n    \
                      --- FAIL: TestA/z (0.10s)\n        a_test.go:7: --- nothing\n--- SKIP: TestB (0.00s)\nFAIL\n";
        let wanted = [
            ("TestA", Verdict::Fail),
            ("TestA/x_y", Verdict::Pass),
            ("TestA/z", Verdict::Fail),
            ("TestB", Verdict::Skip),
        ];
        assert_eq!(results(output), wanted.into_iter().map(|(name, verdict)| (name.to_owned(), verdict)).collect());
    }
}
