//! Errors of the state, and the rule for valid identifiers.

use std::io;
use std::path::{Path, PathBuf};

use husk_protos::chain::Chain;

use super::life::InvalidTransition;

/// containerd's own limit (pkg/identifiers).
const MAX_IDENTIFIER: usize = 76;

/// Why the state cannot be read, written or undone.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// containerd rejects this id too.
    #[error(
        "{what} {value:?}: must be 1 to {MAX_IDENTIFIER} letters and digits, with single '.', '_' or '-' between them"
    )]
    Identifier {
        /// Which id.
        what: &'static str,
        /// The id as received, cut to a bounded length.
        value: String,
    },
    /// The sandbox's directory exists already.
    #[error("create {}: already exists: a sandbox with this name is running or was not deleted", .0.display())]
    Exists(PathBuf),
    /// There is no such sandbox.
    #[error("open {}: no such sandbox", .0.display())]
    NotFound(PathBuf),
    /// The file is damaged, or another version of husk wrote it.
    #[error("read {}: {why}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file operation failed.
    #[error("{what} {}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// Its file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The VM cannot enter this state from its present one.
    #[error(transparent)]
    Transition(#[from] InvalidTransition),
    /// Some steps could not be undone and stay in the journal. All others are undone.
    #[error("undo: {}", .0.iter().map(|failure| Chain(failure).to_string()).collect::<Vec<_>>().join("; "))]
    Undo(Vec<UndoFailure>),
}

/// A step that could not be undone.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct UndoFailure {
    /// The step, described for an operator.
    pub step: String,
    /// The system's error.
    pub source: io::Error,
}

/// Checks an id against containerd's rule for identifiers. The rule also prevents path traversal.
///
/// # Errors
/// [`StateError::Identifier`], which calls the id `what`.
pub(crate) fn check_identifier(what: &'static str, id: &str) -> Result<(), StateError> {
    let well_formed =
        id.split(['.', '_', '-']).all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()));
    if well_formed && id.len() <= MAX_IDENTIFIER {
        Ok(())
    } else {
        // The value may come from anywhere: bound its length.
        Err(StateError::Identifier { what, value: id.chars().take(2 * MAX_IDENTIFIER).collect() })
    }
}

/// The error of a file operation, for `map_err`.
pub(crate) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_path_buf();
    move |source| StateError::Io { what, path, source }
}
