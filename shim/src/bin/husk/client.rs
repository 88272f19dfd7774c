//! A client of a sandbox's `ctl.sock`: JSON-RPC 2.0, one message a line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use husk_shim::ctl::SOCKET;
use husk_shim::host::socket;
use serde_json::{Value, json};

/// Longest line that is taken from a shim: what has passed through it may be a guest's.
pub const LINE: u64 = 4 << 20;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Nobody answers.
    #[error("{0}")]
    Silent(String),
    /// The answer is no.
    #[error("{message}")]
    Refused {
        /// JSON-RPC's.
        code: i64,
        /// The shim's words.
        message: String,
    },
    /// The connection ended before the answer came.
    #[error("the shim closed the connection")]
    Closed,
    /// What came cannot be understood.
    #[error("the shim's answer cannot be understood: {0}")]
    Garbled(String),
    /// What was to be done with a notification failed.
    #[error("{0}")]
    Taker(#[from] io::Error),
}

impl Problem {
    /// Whether there may be an answer elsewhere: nobody has said no, or only for want of a place.
    pub fn is_silence(&self) -> bool {
        let busy = matches!(self, Self::Refused { code, .. } if *code == husk_shim::ctl::rpc::BUSY);
        busy || matches!(self, Self::Silent(_) | Self::Closed | Self::Garbled(_))
    }
}

fn silent(error: &io::Error) -> Problem {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            Problem::Silent("its shim does not answer in time".to_owned())
        }
        _ => Problem::Silent(format!("its shim's {SOCKET}: {error}")),
    }
}

/// A connection to one shim.
pub struct Client {
    write: UnixStream,
    read: BufReader<UnixStream>,
    calls: u64,
}

impl Client {
    /// Connects to the shim whose sandbox has this folder. `answer` is how long it may take for what it answers at once.
    pub fn connect(folder: &Path, answer: Duration) -> Result<Self, Problem> {
        let connect = || {
            let write = socket::connect(folder, SOCKET)?;
            write.set_read_timeout(Some(answer))?;
            write.set_write_timeout(Some(answer))?;
            let read = BufReader::new(write.try_clone()?);
            Ok(Self { write, read, calls: 0 })
        };
        connect().map_err(|error| silent(&error))
    }

    /// Calls a method that answers at once.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, Problem> {
        self.begin(method, params)?;
        loop {
            if let Step::Answer(answer) = self.next()? {
                return answer;
            }
        }
    }

    /// Calls a streaming method; `take` gets the parameters of each notification. What has begun may take as long as it likes.
    pub fn stream(
        &mut self,
        method: &str,
        params: Value,
        mut take: impl FnMut(Value) -> io::Result<()>,
    ) -> Result<Value, Problem> {
        self.begin(method, params)?;
        self.read.get_ref().set_read_timeout(None).map_err(|error| silent(&error))?;
        loop {
            match self.next()? {
                Step::Notification(params) => take(params)?,
                Step::Answer(answer) => return answer,
            }
        }
    }

    /// Begins a streaming call to which its caller sends notifications too: the connection, on which it goes on.
    pub fn open(mut self, method: &str, params: Value) -> Result<UnixStream, Problem> {
        self.begin(method, params)?;
        Ok(self.write)
    }

    fn begin(&mut self, method: &str, params: Value) -> Result<(), Problem> {
        self.calls += 1;
        let request = json!({"jsonrpc": "2.0", "id": self.calls, "method": method, "params": params});
        self.write.write_all(format!("{request}\n").as_bytes()).map_err(|error| silent(&error))
    }

    fn next(&mut self) -> Result<Step, Problem> {
        let mut line = Vec::new();
        (&mut self.read).take(LINE).read_until(b'\n', &mut line).map_err(|error| silent(&error))?;
        if line.last() != Some(&b'\n') {
            return Err(Problem::Closed);
        }
        step(&line)
    }
}

/// What a line of a shim's says.
///
/// # Errors
/// When it cannot be understood.
pub fn step(line: &[u8]) -> Result<Step, Problem> {
    let mut message: Value = serde_json::from_slice(line).map_err(|error| Problem::Garbled(error.to_string()))?;
    if message.get("method").is_some() {
        return Ok(Step::Notification(message["params"].take()));
    }
    Ok(Step::Answer(match message.get_mut("error").map(Value::take) {
        Some(error) => Err(Problem::Refused {
            code: error["code"].as_i64().unwrap_or_default(),
            message: error["message"].as_str().unwrap_or("without a reason").to_owned(),
        }),
        None => Ok(message["result"].take()),
    }))
}

/// A line of a shim's.
pub enum Step {
    /// Its parameters.
    Notification(Value),
    /// The end of the call.
    Answer(Result<Value, Problem>),
}
