//! A process's standard streams on the host: where containerd wants them, and the copies between there and the guest's streams.

use std::path::{Path, PathBuf};

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};

mod copy;
mod destination;
mod logger;
mod sink;

pub use copy::{Input, Output};
use destination::Destination;
pub use logger::Logger;
use sink::Sink;

/// What containerd wants to be done with the standard streams of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Where its input comes from; empty for nowhere.
    pub stdin: String,
    /// Where its output goes; empty for nowhere.
    pub stdout: String,
    /// Where its errors go; empty for nowhere. A terminal has none.
    pub stderr: String,
    /// One pseudo-terminal instead of three pipes.
    pub terminal: bool,
}

impl From<&CreateTaskRequest> for Stdio {
    fn from(request: &CreateTaskRequest) -> Self {
        Self {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        }
    }
}

impl From<&ExecProcessRequest> for Stdio {
    fn from(request: &ExecProcessRequest) -> Self {
        Self {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        }
    }
}

impl Stdio {
    /// What stands in a request to the guest for each stream, stdin first: `word` for one that is carried, or nothing. A terminal's output
    /// always is: unread, it would stall the process.
    pub fn in_guest(&self, word: &str) -> [String; 3] {
        let stdout = self.terminal || !self.stdout.is_empty();
        let stderr = !self.terminal && !self.stderr.is_empty();
        [!self.stdin.is_empty(), stdout, stderr].map(|carried| if carried { word.to_owned() } else { String::new() })
    }

    /// Checks that all three are of kinds that husk knows, before anything is made.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), Error> {
        fifo_path("stdin", &self.stdin)?;
        self.destinations().map(drop)
    }

    fn destinations(&self) -> Result<(Destination, Destination), Error> {
        let stderr = if self.terminal { "" } else { &self.stderr };
        Ok((Destination::parse("stdout", &self.stdout)?, Destination::parse("stderr", stderr)?))
    }
}

/// A process's outputs, opened.
#[derive(Debug, Default)]
pub struct Outputs {
    /// None if the process is to have none.
    stdout: Option<Sink>,
    /// The same.
    stderr: Option<Sink>,
    /// The programs that take them.
    loggers: Vec<Logger>,
}

impl Outputs {
    /// Opens what containerd wants, for the process of a container of a namespace.
    ///
    /// # Errors
    /// What cannot be had. Nothing is left of it then.
    pub async fn open(stdio: &Stdio, container: &str, namespace: &str) -> Result<Self, Error> {
        let (stdout, stderr) = stdio.destinations()?;
        let mut outputs = Self::default();
        // One program for both, as long as both are the same.
        let both = stdout == stderr;
        for (field, destination) in [("stdout", stdout), ("stderr", stderr)] {
            let sink = match destination {
                // What is written to a terminal that nobody reads from would stall the process.
                Destination::Nowhere => (stdio.terminal && field == "stdout").then_some(Sink::Nowhere),
                Destination::Path(path) => Some(Sink::open(field, &path).await?),
                Destination::File(path) => Some(Sink::append(field, &path).await?),
                Destination::Binary { .. } if both && field == "stderr" => continue,
                Destination::Binary { path, args } => {
                    let (logger, [out, err]) = Logger::start(field, &path, args, container, namespace).await?;
                    outputs.loggers.push(logger);
                    let (own, other) = if field == "stdout" { (out, err) } else { (err, out) };
                    if both {
                        outputs.stderr = Some(other);
                    }
                    Some(own)
                }
            };
            if field == "stdout" {
                outputs.stdout = sink;
            } else {
                outputs.stderr = sink;
            }
        }
        Ok(outputs)
    }

    /// The two sinks, and the programs behind them.
    pub fn into_parts(self) -> (Option<Sink>, Option<Sink>, Vec<Logger>) {
        (self.stdout, self.stderr, self.loggers)
    }
}

/// Why a standard stream cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is of a kind that husk does not know.
    #[error("{field} {value:?}: {} supported, {scheme}:// is not", if *field == "stdin" { "only fifos are" } else { "fifos, file:// and binary:// are" })]
    Scheme {
        /// stdin, stdout or stderr.
        field: &'static str,
        /// The whole address.
        value: String,
        /// What stands before `://`.
        scheme: String,
    },
    /// The address cannot be understood.
    #[error("{field} {value:?} {problem}")]
    Address {
        /// stdin, stdout or stderr.
        field: &'static str,
        /// The whole address.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The fifo or the file cannot be opened.
    #[error("{field}: open {}: {source}", path.display())]
    Open {
        /// stdin, stdout or stderr.
        field: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The logging program does not run.
    #[error("{field}: logging program {}: {problem}", path.display())]
    Logger {
        /// stdout or stderr.
        field: &'static str,
        /// Its path.
        path: PathBuf,
        /// What it has done, or not.
        problem: String,
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
    fn addresses_of_input() {
        let table = [
            ("/run/a/stdin", Ok("/run/a/stdin")),
            ("fifo:///run/a", Ok("/run/a")),
            ("file:///tmp/in", Err("stdin \"file:///tmp/in\": only fifos are supported, file:// is not")),
        ];
        for (value, wanted) in table {
            let got = fifo_path("stdin", value).map_err(|error| error.to_string());
            assert_eq!(got, wanted.map(Path::new).map_err(str::to_owned), "{value}");
        }
    }
}
