//! A process's standard streams on the host: the fifos that containerd made, and the copies between them and the guest's streams.

use std::path::{Path, PathBuf};

mod copy;

pub use copy::{Input, Output};

/// What containerd wants to be done with the standard streams of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Where its input comes from; empty for nowhere.
    pub stdin: String,
    /// Where its output goes; empty for nowhere.
    pub stdout: String,
    /// Where its errors go; empty for nowhere.
    pub stderr: String,
    /// One pseudo-terminal instead of three pipes.
    pub terminal: bool,
}

/// Why a standard stream cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is of a kind that husk does not know.
    #[error("{field} {value:?}: only fifos are supported, not {scheme}://")]
    Scheme {
        /// stdin, stdout or stderr.
        field: &'static str,
        /// The whole address.
        value: String,
        /// What stands before `://`.
        scheme: String,
    },
    /// The fifo cannot be opened.
    #[error("{field}: open fifo {}: {source}", path.display())]
    Open {
        /// stdin, stdout or stderr.
        field: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// The path of a fifo from containerd's address of it: a bare path, or `fifo://` and a path.
fn fifo_path<'a>(field: &'static str, value: &'a str) -> Result<&'a Path, Error> {
    match value.split_once("://") {
        None => Ok(Path::new(value)),
        Some(("fifo", path)) => Ok(Path::new(path)),
        Some((scheme, _)) => Err(Error::Scheme { field, value: value.to_owned(), scheme: scheme.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_fifos() {
        let table = [
            ("/run/a/stdout", Ok("/run/a/stdout")),
            ("fifo:///run/a", Ok("/run/a")),
            (
                "binary:///usr/bin/logger?x=y",
                Err("stdout \"binary:///usr/bin/logger?x=y\": only fifos are supported, not binary://"),
            ),
            ("file:///tmp/log", Err("stdout \"file:///tmp/log\": only fifos are supported, not file://")),
        ];
        for (value, expected) in table {
            let got = fifo_path("stdout", value);
            match expected {
                Ok(path) => assert_eq!(got.unwrap(), Path::new(path), "{value}"),
                Err(text) => assert_eq!(got.unwrap_err().to_string(), text),
            }
        }
    }
}
