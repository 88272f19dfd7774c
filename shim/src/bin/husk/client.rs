//! A client of a sandbox's `ctl.sock`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use husk_shim::ctl::SOCKET;
use husk_shim::ctl::rpc;
use husk_shim::ctl::rpc::{BUSY, Reply, RpcError};
use husk_shim::host::socket;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Longest line that is accepted from a shim: part of it may come from a guest.
pub(crate) const LINE_MAX: u64 = 4 << 20;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The shim cannot be reached.
    #[error("{0}")]
    Unreachable(String),
    /// The shim returned an error.
    #[error(transparent)]
    Rejected(RpcError),
    /// The connection closed before the response arrived.
    #[error("the shim closed the connection")]
    Closed,
    /// A message from the shim is not what this version expects.
    #[error("the shim's answer is not understood: {0}")]
    Malformed(String),
    /// The output that the call produced could not be written.
    #[error(transparent)]
    Output(#[from] io::Error),
}

impl CallError {
    /// The shim did not process the call, so that the disk is the only source left.
    pub(crate) fn is_silence(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Closed | Self::Malformed(_) => true,
            Self::Rejected(error) => error.code == BUSY,
            Self::Output(_) => false,
        }
    }
}

fn unreachable(error: &io::Error) -> CallError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            CallError::Unreachable("its shim does not answer in time".to_owned())
        }
        _ => CallError::Unreachable(format!("its shim's {SOCKET}: {error}")),
    }
}

/// A connection to one shim.
pub(crate) struct Client {
    write: UnixStream,
    read: BufReader<UnixStream>,
    calls: u64,
}

impl Client {
    /// Connects to the shim whose sandbox has this folder. `answer` is the deadline for the result of a unary method.
    pub(crate) fn connect(folder: &Path, answer: Duration) -> Result<Self, CallError> {
        let connect = || {
            let write = socket::connect(folder, SOCKET)?;
            write.set_read_timeout(Some(answer))?;
            write.set_write_timeout(Some(answer))?;
            let read = BufReader::new(write.try_clone()?);
            Ok(Self { write, read, calls: 0 })
        };
        connect().map_err(|error| unreachable(&error))
    }

    /// Calls a unary method.
    pub(crate) fn call<R: DeserializeOwned>(&mut self, method: &str, params: &impl Serialize) -> Result<R, CallError> {
        self.send(method, params)?;
        loop {
            if let Reply::Response(response) = self.receive()? {
                return decode(response.map_err(CallError::Rejected)?);
            }
        }
    }

    /// Calls a streaming method and passes each notification to `take`. After the call has begun there is no deadline.
    pub(crate) fn stream<N: DeserializeOwned, R: DeserializeOwned>(
        &mut self,
        method: &str,
        params: &impl Serialize,
        mut take: impl FnMut(N) -> io::Result<()>,
    ) -> Result<R, CallError> {
        self.send(method, params)?;
        self.read.get_ref().set_read_timeout(None).map_err(|error| unreachable(&error))?;
        loop {
            match self.receive()? {
                Reply::Notification(params) => take(decode(params)?)?,
                Reply::Response(response) => return decode(response.map_err(CallError::Rejected)?),
            }
        }
    }

    /// Begins a streaming call to which the caller sends notifications too. Returns the connection on which the call
    /// continues.
    pub(crate) fn open(mut self, method: &str, params: &impl Serialize) -> Result<UnixStream, CallError> {
        self.send(method, params)?;
        Ok(self.write)
    }

    fn send(&mut self, method: &str, params: &impl Serialize) -> Result<(), CallError> {
        self.calls += 1;
        let request = rpc::request(self.calls, method, params);
        self.write.write_all(&request).map_err(|error| unreachable(&error))
    }

    fn receive(&mut self) -> Result<Reply, CallError> {
        let mut line = Vec::new();
        (&mut self.read).take(LINE_MAX).read_until(b'\n', &mut line).map_err(|error| unreachable(&error))?;
        if line.last() != Some(&b'\n') {
            return Err(CallError::Closed);
        }
        reply(&line)
    }
}

/// Reads a line from the shim.
pub(crate) fn reply(line: &[u8]) -> Result<Reply, CallError> {
    rpc::reply(line).map_err(|error| CallError::Malformed(error.to_string()))
}

/// Reads the parameters of a notification, or a result.
pub(crate) fn decode<T: DeserializeOwned>(value: Value) -> Result<T, CallError> {
    serde_json::from_value(value).map_err(|error| CallError::Malformed(error.to_string()))
}
