//! A run of other projects' tests against a checked-in table: prints what differs, or writes the table.

use std::fs;
use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use crate::artifacts::repository;
use crate::table::{Name, Table, Verdict};

/// A checked-in table.
#[derive(Debug)]
pub struct Expected {
    file: &'static str,
    header: &'static str,
    command: &'static str,
    text: String,
    table: Table,
}

impl Expected {
    /// Reads `file`, a path in the repository, whose first lines are `header`. `command` compares it with a run.
    pub fn read(file: &'static str, header: &'static str, command: &'static str) -> Result<Self> {
        let path = repository().join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let table = Table::parse(&text).with_context(|| path.display().to_string())?;
        Ok(Self { file, header, command, text, table })
    }

    /// The table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Fails unless the file is as an update writes it and gives the reason for every row that does not pass.
    pub fn check(&self) -> Result<()> {
        let without = self.table.without_reason();
        ensure!(without.is_empty(), "{}: rows without a reason, or with one too many: {without:?}", self.file);
        ensure!(self.table.text(self.header) == self.text, "{}: run {} -- --update", self.file, self.command);
        Ok(())
    }

    /// Prints the differences between the runtimes in a run of these tests, each with its reason or else with what `why`
    /// says of it, and the differences from the table. With `update`, writes the table instead. A failure if a result
    /// differs from the table.
    pub fn conclude(
        &self,
        run: &Table,
        names: &[Name],
        update: bool,
        why: impl Fn(&Name) -> Option<String>,
    ) -> Result<ExitCode> {
        let mut out = std::io::stdout().lock();
        let updated = self.table.updated(run, names);
        writeln!(out, "\nDifferences between runc and husk:\n")?;
        writeln!(out, "{:10} {:72} {:8} {:8} reason", "suite", "test", "runc", "husk")?;
        for (name, row) in run.differences() {
            let known = updated.0.get(name).map(|row| row.reason.clone()).filter(|reason| !reason.is_empty());
            let reason = known.or_else(|| why(name)).unwrap_or_default();
            writeln!(out, "{:10} {:72} {:8} {:8} {reason}", name.suite, name.test, row.runc, row.husk)?;
        }
        let passed = run.0.values().filter(|row| (row.runc, row.husk) == (Verdict::Pass, Verdict::Pass)).count();
        writeln!(out, "\n{} tests; {passed} pass under both", names.len())?;

        let (file, command) = (self.file, self.command);
        let changes = self.table.changes(run, names);
        if update {
            fs::write(repository().join(file), updated.text(self.header)).with_context(|| format!("write {file}"))?;
            writeln!(out, "{file}: {} changes written", changes.len())?;
            for name in updated.without_reason() {
                let why = why(name).map(|why| format!(" ({why})")).unwrap_or_default();
                writeln!(out, "{name}: give the reason in the last column, or none if it passes under both{why}")?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        if changes.is_empty() {
            writeln!(out, "Everything is as {file} says")?;
            return Ok(ExitCode::SUCCESS);
        }
        writeln!(out, "\n{} rows differ from {file}:\n", changes.len())?;
        for change in &changes {
            writeln!(out, "  {change}")?;
        }
        for name in names.iter().filter(|name| changes.iter().any(|change| change.starts_with(&format!("{name}: ")))) {
            if let Some(why) = why(name).filter(|why| !why.is_empty()) {
                writeln!(out, "\n{name}: {why}")?;
            }
        }
        writeln!(
            out,
            "\nMend what has become worse. If the change is right, run `{command} -- --update`, with the same arguments, \
             and give a\nreason in {file} for each row that does not pass."
        )?;
        Ok(ExitCode::FAILURE)
    }
}
