//! Why a standard stream cannot be opened.

use std::path::PathBuf;

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
