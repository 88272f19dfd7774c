//! The result of one test with one runtime.

use std::collections::BTreeMap;

use husk_tests::table::Verdict;

/// Limit for a reason.
const MAX_REASON: usize = 400;

/// A result, and why it is not a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The result.
    pub verdict: Verdict,
    /// The reason in one line.
    pub why: String,
}

/// Results by the name of the test.
pub type Outcomes = BTreeMap<String, Outcome>;

/// The start of a message, in one column of a table.
pub fn in_one_line(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(MAX_REASON).collect()
}

/// The result of the check after the last test, with its name: what was left on the node.
pub fn left(found: &str) -> (String, Outcome) {
    let verdict = if found.is_empty() { Verdict::Pass } else { Verdict::Fail };
    ("nothing is left on the node".into(), Outcome { verdict, why: in_one_line(found) })
}
