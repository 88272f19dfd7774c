//! The error of a boot step.

use std::io;

/// A boot step that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub(crate) struct BootError {
    step: String,
    source: io::Error,
}

/// Adds the name of the boot step to an error.
pub(super) trait NameStep<T> {
    fn step(self, name: impl FnOnce() -> String) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> NameStep<T> for Result<T, E> {
    fn step(self, name: impl FnOnce() -> String) -> Result<T, BootError> {
        self.map_err(|source| BootError { step: name(), source: source.into() })
    }
}
