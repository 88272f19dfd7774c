//! A problem with a key of the configuration, an annotation, or a field of an annotation.

use std::fmt;

/// One problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key, the annotation or the field.
    pub key: String,
    /// The value as it was written, if there is one to show.
    pub value: Option<String>,
    /// The reason, and the values that are allowed.
    pub why: String,
}

/// Most characters of a value that [`Problem::quoted`] shows.
const SHOWN: usize = 80;

impl Problem {
    /// A problem with a value that is shown in quotation marks, as far as it is short.
    pub(crate) fn quoted(key: impl Into<String>, value: &str, why: impl Into<String>) -> Self {
        let shown: String = value.chars().take(SHOWN).collect();
        Self { key: key.into(), value: Some(format!("{shown:?}")), why: why.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} = {value}: {}", self.key, self.why),
            None => write!(f, "{}: {}", self.key, self.why),
        }
    }
}

/// All problems in one line.
pub(crate) fn join(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
