//! A table of the results of other projects' tests under runc and under husk: its text, what a run may not differ from,
//! and what a run has changed. Pure.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, bail};

/// Start of the reason of a test whose result depends on the machine's speed.
const VARIES: &str = "varies: ";

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It passed.
    Pass,
    /// It skipped itself.
    Skip,
    /// It failed.
    Fail,
    /// It did not end before its deadline.
    Timeout,
    /// It was not reached: what comes before it ended the program.
    Absent,
}

impl Verdict {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Pass, "pass"),
        (Self::Skip, "skip"),
        (Self::Fail, "fail"),
        (Self::Timeout, "timeout"),
        (Self::Absent, "absent"),
    ];

    fn parse(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|(_, name)| *name == text);
        found.map(|(verdict, _)| verdict).with_context(|| format!("{text:?} is no result"))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.into_iter().find(|(verdict, _)| verdict == self).map_or("", |(_, name)| name);
        f.pad(name)
    }
}

/// A test of a suite, or a part of one: `TestX`, `TestX/part`, `program`, `program: assertion`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The suite.
    pub suite: String,
    /// The test.
    pub test: String,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.suite, self.test)
    }
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The result under runc's shim.
    pub runc: Verdict,
    /// The result under husk.
    pub husk: Verdict,
    /// Why the row is not `pass pass`.
    pub reason: String,
}

impl Row {
    fn passes(&self) -> bool {
        (self.runc, self.husk) == (Verdict::Pass, Verdict::Pass)
    }

    fn varies(&self) -> bool {
        self.reason.starts_with(VARIES)
    }
}

/// All rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table(pub BTreeMap<Name, Row>);

impl Table {
    /// Parses the file. An error names the line.
    pub fn parse(text: &str) -> Result<Self> {
        let mut rows = BTreeMap::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let context = || format!("line {}: {line:?}", number + 1);
            let columns: Vec<&str> = line.split('\t').collect();
            let [suite, test, runc, husk, reason] = columns[..] else {
                bail!("{}: {} columns, want 5 separated by tabs", context(), columns.len());
            };
            let name = Name { suite: suite.into(), test: test.into() };
            let (runc, husk) =
                (Verdict::parse(runc).with_context(context)?, Verdict::parse(husk).with_context(context)?);
            if rows.insert(name, Row { runc, husk, reason: reason.into() }).is_some() {
                bail!("{}: a second row of this test", context());
            }
        }
        Ok(Self(rows))
    }

    /// The text of the file; `header` has its first lines.
    pub fn text(&self, header: &str) -> String {
        let line = |(name, row): (&Name, &Row)| {
            format!("{}\t{}\t{}\t{}\t{}\n", name.suite, name.test, row.runc, row.husk, row.reason)
        };
        header.to_owned() + &self.0.iter().map(line).collect::<String>()
    }

    /// Adds the results of one test under both runtimes, each with its parts: the test itself always, a part only if it
    /// does not pass under both. A part that a failed test did not reach says nothing more than the failure.
    pub fn add(&mut self, suite: &str, test: &str, runc: &Results, husk: &Results) {
        let name = |test: &str| Name { suite: suite.into(), test: test.into() };
        let row = |part: &str| {
            let verdict = |results: &Results| results.get(part).copied().unwrap_or(Verdict::Absent);
            Row { runc: verdict(runc), husk: verdict(husk), reason: String::new() }
        };
        let main = row(test);
        for part in runc.keys().chain(husk.keys()).filter(|part| *part != test) {
            let row = row(part);
            let says_enough =
                |verdict, main| verdict == Verdict::Pass || verdict == Verdict::Absent && main > Verdict::Skip;
            if !(says_enough(row.runc, main.runc) && says_enough(row.husk, main.husk)) {
                self.0.insert(name(part), row);
            }
        }
        self.0.insert(name(test), main);
    }

    /// The tests without those whose results vary.
    fn steady(&self, tests: &[Name]) -> Vec<Name> {
        tests.iter().filter(|test| !self.0.get(*test).is_some_and(Row::varies)).cloned().collect()
    }

    /// What a run of these tests changes.
    pub fn changes(&self, run: &Table, tests: &[Name]) -> Vec<String> {
        let tests = &self.steady(tests);
        let mut changes = Vec::new();
        for (name, now) in run.0.iter().filter(|(name, _)| is_of(name, tests)) {
            let now_text = format!("runc {}, husk {}", now.runc, now.husk);
            match self.0.get(name) {
                Some(row) if (row.runc, row.husk) == (now.runc, now.husk) => {}
                Some(row) => changes.push(format!("{name}: now {now_text}; was runc {}, husk {}", row.runc, row.husk)),
                None => changes.push(format!("{name}: now {now_text}; the table has no such row")),
            }
        }
        for (name, row) in self.0.iter().filter(|(name, _)| !run.0.contains_key(*name) && is_of(name, tests)) {
            changes.push(format!("{name}: was runc {}, husk {}; now passes or is gone", row.runc, row.husk));
        }
        changes
    }

    /// This table with the results of a run of these tests. The reasons stay.
    pub fn updated(&self, run: &Table, tests: &[Name]) -> Table {
        let tests = &self.steady(tests);
        let mut rows = self.0.clone();
        rows.retain(|name, _| !is_of(name, tests));
        for (name, now) in run.0.iter().filter(|(name, _)| is_of(name, tests)) {
            let before = self.0.get(name).filter(|_| !now.passes()).map(|row| row.reason.clone());
            rows.insert(name.clone(), Row { reason: before.unwrap_or_default(), ..now.clone() });
        }
        Table(rows)
    }

    /// Rows that lack a reason, or have one without need.
    pub fn without_reason(&self) -> Vec<&Name> {
        let lacks = |row: &Row| row.passes() != row.reason.is_empty() && !row.varies();
        self.0.iter().filter(|(_, row)| lacks(row)).map(|(name, _)| name).collect()
    }

    /// The rows whose results differ between the runtimes.
    pub fn differences(&self) -> Vec<(&Name, &Row)> {
        self.0.iter().filter(|(_, row)| row.runc != row.husk).collect()
    }
}

/// Results of one test and its parts under one runtime, by name.
pub type Results = BTreeMap<String, Verdict>;

/// Whether the row is of one of these tests, or of a part of one.
fn is_of(name: &Name, tests: &[Name]) -> bool {
    tests.iter().any(|test| {
        let rest = name.test.strip_prefix(&test.test).filter(|_| name.suite == test.suite);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || rest.starts_with(": "))
    })
}

#[cfg(test)]
mod tests {
    use Verdict::{Absent, Fail, Pass, Timeout};

    use super::*;

    fn results(results: &[(&str, Verdict)]) -> Results {
        results.iter().map(|(name, verdict)| ((*name).to_owned(), *verdict)).collect()
    }

    fn names(tests: &[&str]) -> Vec<Name> {
        tests.iter().map(|test| Name { suite: "s".into(), test: (*test).into() }).collect()
    }

    fn table(lines: &[&str]) -> Table {
        Table::parse(&lines.iter().map(|line| format!("s\t{}\n", line.replace('|', "\t"))).collect::<String>()).unwrap()
    }

    #[test]
    fn a_malformed_row_is_rejected_with_its_line() {
        let error = |text: &str| format!("{:#}", Table::parse(text).unwrap_err());
        assert_eq!(error("# x\ns\tt\tpass"), "line 2: \"s\\tt\\tpass\": 3 columns, want 5 separated by tabs");
        assert_eq!(error("s\tt\tpass\tgood\t"), "line 1: \"s\\tt\\tpass\\tgood\\t\": \"good\" is no result");
        assert_eq!(
            error("s\tt\tpass\tpass\t\ns\tt\tpass\tpass\t"),
            "line 2: \"s\\tt\\tpass\\tpass\\t\": a second row of this test"
        );
    }

    #[test]
    fn a_test_always_has_a_row_and_its_parts_only_if_they_do_not_pass() {
        let mut run = Table::default();
        run.add(
            "s",
            "A",
            &results(&[("A", Pass), ("A/w", Pass), ("A/x", Pass), ("A/y", Pass), ("A/z", Fail)]),
            &results(&[("A", Fail), ("A/x", Pass), ("A/y", Timeout)]),
        );
        run.add("s", "B", &results(&[("B", Pass)]), &results(&[]));
        run.add("s", "C", &results(&[("C", Pass), ("C/a", Pass)]), &results(&[("C", Pass)]));
        assert_eq!(
            run,
            table(&[
                "A|pass|fail|",
                "A/y|pass|timeout|",
                "A/z|fail|absent|",
                "B|pass|absent|",
                "C|pass|pass|",
                "C/a|pass|absent|"
            ])
        );
        assert_eq!(run.0[&names(&["B"])[0]].husk, Absent);
    }

    #[test]
    fn a_changed_a_new_and_a_missing_row_are_each_reported() {
        let before =
            table(&["A|pass|fail|why", "A/y|pass|fail|why", "B|pass|pass|", "C: z|fail|fail|why", "C|fail|fail|why"]);
        let run = table(&["A|pass|pass|", "B|pass|fail|", "B/x|pass|fail|"]);
        assert_eq!(before.changes(&before, &names(&["A", "B", "C"])), Vec::<String>::new());
        // C was not run.
        assert_eq!(
            before.changes(&run, &names(&["A", "B"])),
            [
                "s A: now runc pass, husk pass; was runc pass, husk fail",
                "s B: now runc pass, husk fail; was runc pass, husk pass",
                "s B/x: now runc pass, husk fail; the table has no such row",
                "s A/y: was runc pass, husk fail; now passes or is gone",
            ]
        );
        let gone = table(&["A|pass|fail|", "A/y|pass|fail|", "B|pass|pass|"]);
        assert_eq!(
            before.changes(&gone, &names(&["A", "B", "C"])),
            [
                "s C: was runc fail, husk fail; now passes or is gone",
                "s C: z: was runc fail, husk fail; now passes or is gone"
            ]
        );
    }

    #[test]
    fn a_test_that_varies_is_neither_compared_nor_updated() {
        let before = table(&["A|pass|fail|varies: slow", "B|pass|pass|varies: slow"]);
        let run = table(&["A|pass|pass|", "A/x|pass|fail|", "B|pass|timeout|"]);
        let tests = names(&["A", "B"]);
        assert_eq!(before.changes(&run, &tests), Vec::<String>::new());
        assert_eq!(before.updated(&run, &tests), before);
        assert_eq!(before.without_reason(), Vec::<&Name>::new());
    }

    #[test]
    fn an_update_keeps_reasons_and_the_rows_of_tests_that_were_not_run() {
        let before = table(&["A|pass|fail|why", "A/y|pass|fail|why", "AB|pass|pass|", "C|fail|fail|other"]);
        let run = table(&["A|pass|timeout|", "A/z|pass|fail|"]);
        let after = before.updated(&run, &names(&["A"]));
        assert_eq!(after, table(&["A|pass|timeout|why", "A/z|pass|fail|", "AB|pass|pass|", "C|fail|fail|other"]));
        assert_eq!(after.without_reason(), names(&["A/z"]).iter().collect::<Vec<_>>());
        assert_eq!(after.differences().len(), 2);
        assert_eq!(before.updated(&table(&["C|pass|pass|"]), &names(&["C"])).0[&names(&["C"])[0]].reason, "");
    }
}
