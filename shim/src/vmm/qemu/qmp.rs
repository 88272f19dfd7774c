//! QMP, QEMU's control protocol (QEMU's docs/interop/qmp-spec): one JSON object a line, answers by id, events in between.
//!
//! QEMU is trusted as little as the guest it runs: lines are bounded, and each command has a deadline.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, oneshot};

/// Most bytes in one line; QEMU's longest answers (query-qmp-schema) are not asked for.
const MAX_LINE: usize = 64 * 1024;
/// Events that wait for their reader; further ones are dropped, and logged.
const MAX_EVENTS: usize = 64;

/// Why a command got no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU answered that it won't.
    #[error("{command}: {class}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// No answer in time.
    #[error("{command}: no answer within {} ms", deadline.as_millis())]
    Deadline {
        /// The command.
        command: String,
        /// How long it was waited for.
        deadline: Duration,
    },
    /// QEMU has closed the connection.
    #[error("connection closed")]
    Closed,
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// Something that QEMU reports unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its name, such as `SHUTDOWN`.
    pub name: String,
    /// Its data.
    pub data: Value,
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    id: Option<u64>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, Refusal>>>>>;

/// A connection on which the capabilities have been negotiated.
pub struct Qmp {
    writer: tokio::sync::Mutex<(OwnedWriteHalf, u64)>,
    pending: Pending,
}

impl Qmp {
    /// Takes a connected socket through the greeting. Events go to the receiver.
    pub async fn handshake(socket: UnixStream, deadline: Duration) -> Result<(Self, mpsc::Receiver<Event>), Error> {
        let (reader, writer) = socket.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = tokio::time::timeout(deadline, read_line(&mut reader))
            .await
            .map_err(|_| Error::Deadline { command: "greeting".into(), deadline })??;
        let greeting: Value = serde_json::from_slice(&greeting).map_err(std::io::Error::from)?;
        if greeting.get("QMP").is_none() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "no QMP greeting").into());
        }
        let pending = Pending::default();
        let (events, receiver) = mpsc::channel(MAX_EVENTS);
        tokio::spawn(read_loop(reader, pending.clone(), events));
        let qmp = Self { writer: tokio::sync::Mutex::new((writer, 0)), pending };
        qmp.execute("qmp_capabilities", json!({}), deadline).await?;
        Ok((qmp, receiver))
    }

    /// Runs one command and returns its answer.
    pub async fn execute(&self, command: &str, arguments: Value, deadline: Duration) -> Result<Value, Error> {
        let exchange = async {
            let (sender, answer) = oneshot::channel();
            {
                let mut writer = self.writer.lock().await;
                writer.1 += 1;
                let id = writer.1;
                self.pending.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(id, sender);
                let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
                line.push('\n');
                writer.0.write_all(line.as_bytes()).await?;
            }
            match answer.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(refusal)) => {
                    Err(Error::Refused { command: command.to_owned(), class: refusal.class, description: refusal.desc })
                }
                Err(_) => Err(Error::Closed),
            }
        };
        tokio::time::timeout(deadline, exchange)
            .await
            .map_err(|_| Error::Deadline { command: command.to_owned(), deadline })?
    }
}

async fn read_loop(mut reader: impl AsyncBufRead + Unpin, pending: Pending, events: mpsc::Sender<Event>) {
    loop {
        let line = match read_line(&mut reader).await {
            Ok(line) => line,
            Err(Error::Closed) => break,
            Err(error) => {
                tracing::warn!(%error, "QMP connection failed");
                break;
            }
        };
        let line: Line = match serde_json::from_slice(&line) {
            Ok(line) => line,
            Err(error) => {
                tracing::warn!(%error, "QMP line is no message");
                break;
            }
        };
        if let Some(name) = line.event {
            if events.try_send(Event { name, data: line.data }).is_err() {
                tracing::debug!("QMP event dropped: nobody reads them");
            }
            continue;
        }
        let waiting =
            line.id.and_then(|id| pending.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(&id));
        let Some(waiting) = waiting else { continue };
        let result = match line.error {
            Some(refusal) => Err(refusal),
            None => Ok(line.answer.unwrap_or_default()),
        };
        // A caller whose deadline has passed no longer listens.
        let _ = waiting.send(result);
    }
    // Dropping the senders tells everybody who still waits.
    pending.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
}

async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Result<Vec<u8>, Error> {
    let mut line = Vec::new();
    loop {
        let buffer = reader.fill_buf().await?;
        if buffer.is_empty() {
            return Err(Error::Closed);
        }
        let (part, complete) = match buffer.iter().position(|&byte| byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (buffer.len(), false),
        };
        if line.len() + part > MAX_LINE {
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                format!("QMP line is longer than {MAX_LINE} bytes"),
            )
            .into());
        }
        line.extend_from_slice(&buffer[..part]);
        reader.consume(part);
        if complete {
            return Ok(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    const SECOND: Duration = Duration::from_secs(1);

    /// Plays QEMU: for each line received, sends the next of `answers`.
    async fn play(mut socket: UnixStream, answers: &[&str]) -> UnixStream {
        socket.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").await.unwrap();
        for answer in answers {
            let mut byte = [0];
            while byte[0] != b'\n' {
                socket.read_exact(&mut byte).await.unwrap();
            }
            socket.write_all(answer.as_bytes()).await.unwrap();
        }
        socket
    }

    #[tokio::test]
    async fn answers_find_their_callers_and_events_their_reader() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(play(
            theirs,
            &[
                "{\"return\": {}, \"id\": 1}\r\n",
                "{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true}}\r\n{\"return\": {\"running\": true}, \"id\": 2}\r\n",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 3}\r\n",
            ],
        ));
        let (qmp, mut events) = Qmp::handshake(ours, SECOND).await.unwrap();
        assert_eq!(qmp.execute("query-status", json!({}), SECOND).await.unwrap(), json!({"running": true}));
        assert_eq!(events.recv().await.unwrap(), Event { name: "SHUTDOWN".into(), data: json!({"guest": true}) });
        let refused = qmp.execute("stop", json!({}), SECOND).await.unwrap_err();
        assert_eq!(refused.to_string(), "stop: GenericError: no");
        drop(qemu.await.unwrap());
        assert!(matches!(qmp.execute("cont", json!({}), SECOND).await, Err(Error::Closed | Error::Io(_))));
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let flood = tokio::spawn(async move {
            let chunk = [b'x'; 4096];
            while theirs.write_all(&chunk).await.is_ok() {}
        });
        let error = Qmp::handshake(ours, SECOND).await.err().unwrap();
        assert!(error.to_string().contains("longer than"), "{error}");
        flood.await.unwrap();
    }

    #[tokio::test]
    async fn a_silent_qemu_is_not_waited_for_longer_than_the_deadline() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Qmp::handshake(ours, Duration::from_millis(20)).await.err().unwrap();
        assert!(matches!(error, Error::Deadline { .. }));
    }
}
