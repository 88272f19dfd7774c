//! The streams that a request names, and opening its outputs.

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};

use crate::stdio::destination::{Destination, input_fifo};
use crate::stdio::error::StdioError;
use crate::stdio::logger::Logger;
use crate::stdio::sink::Sink;

/// containerd's addresses for the standard streams of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    /// The source of its input; empty for none.
    pub(crate) stdin: String,
    /// The destination of its output; empty for none.
    pub(crate) stdout: String,
    /// The destination of its error output; empty for none. Unused with a terminal.
    pub(crate) stderr: String,
    /// Use one pseudo-terminal instead of three pipes.
    pub(crate) terminal: bool,
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
    /// The three addresses for the request to the guest, stdin first: `address` for each stream that is connected,
    /// empty for the others. A terminal's output is always connected: unread, it would stall the process.
    pub(crate) fn in_guest(&self, address: &str) -> [String; 3] {
        let stdout = self.terminal || !self.stdout.is_empty();
        let stderr = !self.terminal && !self.stderr.is_empty();
        let streams = [!self.stdin.is_empty(), stdout, stderr];
        streams.map(|connected| if connected { address.to_owned() } else { String::new() })
    }

    /// Checks the three addresses without opening them.
    ///
    /// # Errors
    /// The first unsupported or malformed address.
    pub(crate) fn check(&self) -> Result<(), StdioError> {
        input_fifo(&self.stdin)?;
        self.destinations().map(drop)
    }

    fn destinations(&self) -> Result<(Destination, Destination), StdioError> {
        let stderr = if self.terminal { "" } else { &self.stderr };
        Ok((Destination::parse("stdout", &self.stdout)?, Destination::parse("stderr", stderr)?))
    }
}

/// The open outputs of a process.
#[derive(Debug, Default)]
pub(crate) struct Outputs {
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    loggers: Vec<Logger>,
}

impl Outputs {
    /// Opens the outputs in `stdio` for a process of `container` in `namespace`.
    ///
    /// # Errors
    /// The first output that cannot be opened. The others are closed again.
    pub(crate) async fn open(stdio: &Stdio, container: &str, namespace: &str) -> Result<Self, StdioError> {
        let (stdout, stderr) = stdio.destinations()?;
        let mut outputs = Self::default();
        // One logging program for both streams if both name the same.
        let both = stdout == stderr;
        for (field, destination) in [("stdout", stdout), ("stderr", stderr)] {
            let sink = match destination {
                // An unread terminal would stall the process.
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

    /// The sinks of stdout and stderr, and the logging programs behind them.
    pub(crate) fn into_parts(self) -> (Option<Sink>, Option<Sink>, Vec<Logger>) {
        (self.stdout, self.stderr, self.loggers)
    }
}
