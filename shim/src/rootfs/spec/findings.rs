//! Problems of a spec, and notes about what was changed.

use std::fmt;
use std::path::Path;

/// A field of a spec that a VM cannot honour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpecProblem {
    /// The field, as a path from the spec's root.
    pub(crate) field: String,
    /// The field's value, if there is one to show.
    pub(crate) value: Option<String>,
    /// The reason.
    pub(crate) why: String,
}

impl fmt::Display for SpecProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} {value:?}: {}", self.field, self.why),
            None => write!(f, "{}: {}", self.field, self.why),
        }
    }
}

/// All problems of a spec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub(crate) struct SpecProblems(pub(crate) Vec<SpecProblem>);

/// Collects problems and notes while a spec is rewritten.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) problems: Vec<SpecProblem>,
    pub(super) notes: Vec<String>,
}

impl Findings {
    pub(super) fn reject(&mut self, field: impl Into<String>, value: Option<&str>, why: impl Into<String>) {
        self.problems.push(SpecProblem { field: field.into(), value: value.map(Into::into), why: why.into() });
    }

    pub(super) fn reject_path(&mut self, field: impl Into<String>, value: &Path, why: impl Into<String>) {
        self.reject(field, Some(&value.to_string_lossy()), why);
    }

    pub(super) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}
