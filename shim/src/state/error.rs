//! Why state cannot be read, written or undone, and which identifiers are valid.

use std::io;
use std::path::{Path, PathBuf};

use super::life::Illegal;

/// containerd's own limit (pkg/identifiers).
const MAX_IDENTIFIER: usize = 76;

/// Why the state could not be read, written or undone.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An id that containerd itself would not accept.
    #[error(
        "{what} {value:?}: must be 1 to {MAX_IDENTIFIER} letters and digits, with single '.', '_' or '-' between them"
    )]
    Identifier {
        /// Which id.
        what: &'static str,
        /// As it was given.
        value: String,
    },
    /// The sandbox's folder is there already.
    #[error("create {}: it exists already, so a sandbox of this name runs, or ended without being deleted", .0.display())]
    Exists(PathBuf),
    /// There is no such sandbox.
    #[error("open {}: no such sandbox", .0.display())]
    NotFound(PathBuf),
    /// Not written by this version of husk, or damaged.
    #[error("read {}: {why}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file operation failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The VM cannot be in the one state after the other.
    #[error("{0}")]
    Vm(#[from] Illegal),
    /// Some steps could not be undone. They stay in the journal, the others are done.
    #[error("undo: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Undo(Vec<UndoFailure>),
}

/// A step that could not be undone.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct UndoFailure {
    /// The step, as an operator reads it.
    pub step: String,
    /// Why.
    pub source: io::Error,
}

/// Checks an id by containerd's rule for identifiers, which also keeps it from being a path with tricks.
///
/// # Errors
/// [`StateError::Identifier`], naming it as `what`.
pub fn check_identifier(what: &'static str, id: &str) -> Result<(), StateError> {
    let well_formed =
        id.split(['.', '_', '-']).all(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric()));
    if well_formed && id.len() <= MAX_IDENTIFIER {
        Ok(())
    } else {
        // Bounded, because the value may come from anywhere.
        Err(StateError::Identifier { what, value: id.chars().take(2 * MAX_IDENTIFIER).collect() })
    }
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_path_buf();
    move |source| StateError::Io { what, path, source }
}
