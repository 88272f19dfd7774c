//! QMP, QEMU's control protocol (QEMU's docs/interop/qmp-spec): one JSON object per line, replies matched by id, events
//! in between.
//!
//! QEMU is trusted no more than its guest: lines are bounded, and each command has a deadline.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, oneshot};

use crate::host::text::clean;

/// Most bytes in one line. The one longer reply, query-qmp-schema's, is never requested.
const MAX_LINE: usize = 64 * 1024;
/// Events that may wait for their reader; further ones are dropped and logged.
const MAX_EVENTS: usize = 64;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// QEMU rejected the command.
    #[error("{command}: {class}: {description}")]
    Rejected {
        command: String,
        /// QEMU's class of the error.
        class: String,
        /// QEMU's explanation.
        description: String,
    },
    /// QEMU did not reply in time.
    #[error("{command}: no reply within {} ms", deadline.as_millis())]
    Deadline { command: String, deadline: Duration },
    /// QEMU closed the connection.
    #[error("connection closed")]
    Closed,
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// An event that QEMU reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// Such as `SHUTDOWN`.
    pub(super) name: String,
    pub(super) data: Value,
}

#[derive(Deserialize)]
struct Rejection {
    class: String,
    desc: String,
}

impl Rejection {
    fn of(&self, command: &str) -> QmpError {
        QmpError::Rejected { command: command.to_owned(), class: clean(&self.class), description: clean(&self.desc) }
    }
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "return")]
    reply: Option<Value>,
    error: Option<Rejection>,
    id: Option<u64>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, Rejection>>>>>;

/// A connection with negotiated capabilities.
pub(super) struct Qmp {
    writer: tokio::sync::Mutex<(OwnedWriteHalf, u64)>,
    pending: Pending,
}

impl Qmp {
    /// Performs the greeting on a connected socket. Events go to the receiver.
    pub(super) async fn handshake(
        socket: UnixStream,
        deadline: Duration,
    ) -> Result<(Self, mpsc::Receiver<Event>), QmpError> {
        let (reader, writer) = socket.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = tokio::time::timeout(deadline, read_line(&mut reader))
            .await
            .map_err(|_| QmpError::Deadline { command: "greeting".into(), deadline })??;
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

    /// Runs a command and returns its reply.
    pub(super) async fn execute(&self, command: &str, arguments: Value, deadline: Duration) -> Result<Value, QmpError> {
        self.exchange(command, arguments, None, deadline).await
    }

    /// Gives QEMU a descriptor under a name that later commands can use. QEMU has its own copy then.
    pub(super) async fn give(&self, name: &str, fd: BorrowedFd<'_>, deadline: Duration) -> Result<(), QmpError> {
        self.execute_with("getfd", json!({"fdname": name}), fd, deadline).await.map(|_| ())
    }

    /// Runs a command that takes a descriptor, of which QEMU has its own copy then.
    pub(super) async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        self.exchange(command, arguments, Some(fd), deadline).await
    }

    async fn exchange(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let exchange = async {
            let (sender, reply) = oneshot::channel();
            let _waiting = {
                let mut writer = self.writer.lock().await;
                writer.1 += 1;
                let id = writer.1;
                lock(&self.pending).insert(id, sender);
                let waiting = Waiting { pending: &self.pending, id };
                let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
                line.push('\n');
                let sent = match fd {
                    Some(fd) => send(&writer.0, line.as_bytes(), fd).await?,
                    None => 0,
                };
                writer.0.write_all(&line.as_bytes()[sent..]).await?;
                waiting
            };
            match reply.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(rejection)) => Err(rejection.of(command)),
                Err(_) => Err(QmpError::Closed),
            }
        };
        tokio::time::timeout(deadline, exchange)
            .await
            .map_err(|_| QmpError::Deadline { command: command.to_owned(), deadline })?
    }
}

/// A command that waits for its reply. A QEMU that never replies must not leave it behind.
struct Waiting<'a> {
    pending: &'a Pending,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(self.pending).remove(&self.id);
    }
}

/// Sends the beginning of a line together with a descriptor (SCM_RIGHTS), and returns the number of bytes that it sent.
async fn send(writer: &OwnedWriteHalf, line: &[u8], fd: BorrowedFd<'_>) -> std::io::Result<usize> {
    let socket: &UnixStream = writer.as_ref();
    let rights = [fd.as_raw_fd()];
    let send = || {
        let (data, rights) = ([IoSlice::new(line)], [ControlMessage::ScmRights(&rights)]);
        let sent = sendmsg::<()>(socket.as_fd().as_raw_fd(), &data, &rights, MsgFlags::MSG_NOSIGNAL, None);
        Ok(sent?)
    };
    socket.async_io(Interest::WRITABLE, send).await
}

async fn read_loop(mut reader: impl AsyncBufRead + Unpin, pending: Pending, events: mpsc::Sender<Event>) {
    loop {
        let line = match read_line(&mut reader).await {
            Ok(line) => line,
            Err(QmpError::Closed) => break,
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "QMP connection failed");
                break;
            }
        };
        let line: Line = match serde_json::from_slice(&line) {
            Ok(line) => line,
            Err(error) => {
                tracing::warn!(%error, "QMP line is not a message");
                break;
            }
        };
        if let Some(name) = line.event {
            if events.try_send(Event { name, data: line.data }).is_err() {
                tracing::debug!("QMP event dropped: too many events wait for their reader");
            }
            continue;
        }
        let Some(caller) = line.id.and_then(|id| lock(&pending).remove(&id)) else { continue };
        let result = match line.error {
            Some(rejection) => Err(rejection),
            None => Ok(line.reply.unwrap_or_default()),
        };
        // Fails after the caller's deadline.
        let _ = caller.send(result);
    }
    // Dropping the senders ends the calls that still wait.
    lock(&pending).clear();
}

/// Reads what a hostile QEMU sends while this many commands wait. Returns the replies that arrive. For the fuzz target.
pub(super) async fn replies(bytes: &[u8], commands: u64) -> Vec<Result<Value, QmpError>> {
    let (pending, (events, mut queued)) = (Pending::default(), mpsc::channel(MAX_EVENTS));
    let wait = |id| {
        let (sender, reply) = oneshot::channel();
        lock(&pending).insert(id, sender);
        reply
    };
    let waiting: Vec<_> = (1..=commands).map(wait).collect();
    read_loop(bytes, pending.clone(), events).await;
    assert!(lock(&pending).is_empty(), "a command waits for a connection that is closed");
    let mut replies = Vec::new();
    for reply in waiting {
        replies.push(match reply.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(rejection)) => Err(rejection.of("command")),
            Err(_) => Err(QmpError::Closed),
        });
    }
    let mut count = 0;
    while queued.recv().await.is_some() {
        count += 1;
    }
    assert!(count <= MAX_EVENTS, "{count} events wait");
    replies
}

async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Result<Vec<u8>, QmpError> {
    let mut line = Vec::new();
    loop {
        let buffer = reader.fill_buf().await?;
        if buffer.is_empty() {
            return Err(QmpError::Closed);
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

    /// Plays QEMU: sends the next of `replies` for each received line.
    async fn play(mut socket: UnixStream, replies: &[&str]) -> UnixStream {
        socket.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").await.unwrap();
        for reply in replies {
            let mut byte = [0];
            while byte[0] != b'\n' {
                socket.read_exact(&mut byte).await.unwrap();
            }
            socket.write_all(reply.as_bytes()).await.unwrap();
        }
        socket
    }

    #[tokio::test]
    async fn replies_reach_their_callers_and_events_their_reader() {
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
        let rejected = qmp.execute("stop", json!({}), SECOND).await.unwrap_err();
        assert_eq!(rejected.to_string(), "stop: GenericError: no");
        drop(qemu.await.unwrap());
        assert!(matches!(qmp.execute("cont", json!({}), SECOND).await, Err(QmpError::Closed | QmpError::Io(_))));
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_rejected() {
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
    async fn commands_that_qemu_does_not_answer_leave_nothing_behind() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(play(theirs, &["{\"return\": {}, \"id\": 1}\r\n"]));
        let (qmp, _events) = Qmp::handshake(ours, SECOND).await.unwrap();
        let _silent = qemu.await.unwrap();
        for _ in 0..3 {
            let unanswered = qmp.execute("query-status", json!({}), Duration::from_millis(5)).await;
            assert!(matches!(unanswered, Err(QmpError::Deadline { .. })));
        }
        assert!(lock(&qmp.pending).is_empty());
    }

    #[tokio::test]
    async fn a_silent_qemu_fails_the_greeting_at_the_deadline() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Qmp::handshake(ours, Duration::from_millis(20)).await.err().unwrap();
        assert!(matches!(error, QmpError::Deadline { .. }));
    }
}
