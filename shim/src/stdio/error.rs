//! Why a standard stream cannot be opened, and why its copy ends early.

use std::path::PathBuf;

use crate::guest::client::GuestError;

/// Why a standard stream cannot be opened. `field` is stdin, stdout or stderr.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// husk does not support addresses of this kind.
    #[error("{field} {value:?}: {} supported, {scheme}:// is not", supported(field))]
    Scheme {
        /// The stream.
        field: &'static str,
        /// The whole address.
        value: String,
        /// The part before `://`.
        scheme: String,
    },
    /// The address is malformed.
    #[error("{field} {value:?} {problem}")]
    Address {
        /// The stream.
        field: &'static str,
        /// The whole address.
        value: String,
        /// The mistake in it.
        problem: &'static str,
    },
    /// The fifo or file cannot be opened.
    #[error("{field}: open {}", path.display())]
    Open {
        /// The stream.
        field: &'static str,
        /// The fifo or file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The logging program did not start, or did not become ready.
    #[error("{field}: logging program {}: {problem}", path.display())]
    Logger {
        /// The stream.
        field: &'static str,
        /// The program.
        path: PathBuf,
        /// What failed.
        problem: String,
    },
}

fn supported(field: &str) -> &'static str {
    match field {
        "stdin" => "only fifos are",
        _ => "fifos, file:// and binary:// are",
    }
}

/// Why a copy ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("read fifo")]
    Read(#[source] std::io::Error),
}
