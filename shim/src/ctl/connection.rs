//! One client of `ctl.sock`: reads its lines and answers them, within the limits.

use std::io;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::ctl::limits::{Limits, SOCKET};
use crate::ctl::method;
use crate::ctl::method::{Answer, Call, DISCOVER, Kind, Method, Note, PREFIX, Running};
use crate::ctl::rpc;
use crate::ctl::rpc::{Message, RpcError};

/// Lines queued for a client; past that, their senders wait.
const LINES: usize = 4;
/// Notifications queued for a streaming call; past that, the client is not read.
const NOTES: usize = 16;

/// Serves a client until it disconnects or exceeds a limit.
pub(super) async fn serve<C: Clone + Send>(
    stream: UnixStream,
    context: C,
    methods: &'static [Method<C>],
    limits: Limits,
) {
    let (read, write) = stream.into_split();
    let (lines, queue) = mpsc::channel(LINES);
    // Writing runs apart from reading: a client that writes everything before it reads would otherwise wait for itself.
    let writer = tokio::spawn(write_lines(write, queue, limits));
    let mut client = Client { reader: Lines::new(read, limits.line), lines, context, methods, limits };
    client.serve().await;
    drop(client);
    // Queued lines are still written, each within its deadline.
    let _ = writer.await;
}

async fn write_lines(mut write: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>, limits: Limits) {
    while let Some(line) = queue.recv().await {
        match timeout(limits.stall, write.write_all(&line)).await {
            Ok(Ok(())) => {}
            // The client has disconnected.
            Ok(Err(_)) => return,
            Err(_) => {
                let stalled_ms = limits.stall.as_millis() as u64;
                tracing::warn!(stalled_ms, "a client of {SOCKET} does not read and is disconnected");
                return;
            }
        }
    }
}

/// The outcome of reading a line.
enum Read {
    Line(Vec<u8>),
    /// Longer than the limit. Where the next line begins is unknown.
    TooLong,
    End,
}

/// Reads lines, and buffers no more than the limit.
struct Lines {
    read: OwnedReadHalf,
    limit: usize,
    buffer: Vec<u8>,
    /// Bytes at the start of the buffer that hold no end of a line.
    searched: usize,
}

impl Lines {
    fn new(read: OwnedReadHalf, limit: usize) -> Self {
        Self { read, limit, buffer: Vec::new(), searched: 0 }
    }

    /// Cancel safe.
    async fn next(&mut self) -> Read {
        let mut chunk = [0; 8192];
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                self.searched = 0;
                return if line.len() > self.limit { Read::TooLong } else { Read::Line(line) };
            }
            self.searched = self.buffer.len();
            if self.searched > self.limit {
                return Read::TooLong;
            }
            match self.read.read(&mut chunk).await {
                Ok(0) => return Read::End,
                Ok(length) => self.buffer.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::debug!(%error, "lost a client of {SOCKET}");
                    return Read::End;
                }
            }
        }
    }
}

struct Client<C: 'static> {
    reader: Lines,
    lines: mpsc::Sender<Vec<u8>>,
    context: C,
    methods: &'static [Method<C>],
    limits: Limits,
}

impl<C: Clone + Send> Client<C> {
    async fn serve(&mut self) {
        while let Ok(read) = timeout(self.limits.idle, self.reader.next()).await {
            let line = match read {
                Read::Line(line) => line,
                Read::TooLong => {
                    self.answer(&Value::Null, &Err(self.too_long())).await;
                    return;
                }
                Read::End => return,
            };
            let connected = match rpc::parse(&line) {
                Ok(Message { id: Some(id), method, params }) => {
                    let answer = self.call(&method, params).await;
                    self.answer(&id, &answer).await
                }
                // Sent to a call that has ended meanwhile.
                Ok(Message { id: None, .. }) => true,
                Err((id, error)) => self.answer(&id, &Err(error)).await,
            };
            if !connected {
                return;
            }
        }
    }

    fn too_long(&self) -> RpcError {
        RpcError::new(rpc::INVALID_REQUEST, format!("a line is longer than {} bytes", self.limits.line))
    }

    /// False when the client has disconnected or reads too slowly.
    async fn answer(&self, id: &Value, answer: &Answer) -> bool {
        self.lines.send(rpc::response(id, answer)).await.is_ok()
    }

    async fn call(&mut self, name: &str, params: Value) -> Answer {
        if name == DISCOVER {
            return Ok(method::discover("husk: one virtual machine and its containers", self.methods));
        }
        let Some(method) = method::find(self.methods, name) else {
            let message = format!("no method {}: {DISCOVER} lists the methods", rpc::quoted(name));
            return Err(RpcError::new(rpc::METHOD_NOT_FOUND, message));
        };
        match &method.kind {
            Kind::Refused(message) => Err(RpcError::refused(*message)),
            Kind::Unary(run) => {
                let mut running = start(run(self.context.clone(), params));
                match timeout(self.limits.answer, running.join_next()).await {
                    Ok(ended) => outcome(ended),
                    Err(_) => {
                        let ms = self.limits.answer.as_millis();
                        Err(RpcError::internal(format!("{} returned no result within {ms} ms", method.name)))
                    }
                }
            }
            Kind::Streaming { run, .. } => {
                let (sender, notes) = mpsc::channel(NOTES);
                let call = Call { params, method: method.name, lines: self.lines.clone(), notes };
                self.attend(start(run(self.context.clone(), call)), sender).await
            }
        }
    }

    /// Reads the client while a streaming call runs.
    async fn attend(&mut self, mut running: JoinSet<Answer>, notes: mpsc::Sender<Note>) -> Answer {
        let lines = self.lines.clone();
        let mut notes = Some(notes);
        loop {
            let read = tokio::select! {
                ended = running.join_next() => return outcome(ended),
                // A call that has nothing to send would not notice.
                () = lines.closed() => return Err(method::Gone.into()),
                read = self.reader.next(), if notes.is_some() => read,
            };
            let Read::Line(line) = read else {
                // The call sees the end of its notifications. A line that is too long stays unanswered: the call may
                // still run for long.
                notes = None;
                continue;
            };
            match (rpc::parse(&line), &notes) {
                (Ok(Message { id: None, method, params }), Some(notes)) => {
                    let method = method.strip_prefix(PREFIX).unwrap_or(&method).to_owned();
                    tokio::select! {
                        // Fails when the call ends, which the other branch handles.
                        _ = notes.send(Note { method, params }) => {}
                        ended = running.join_next() => return outcome(ended),
                    }
                }
                (Ok(Message { id, .. }), _) => {
                    let busy =
                        "a streaming call runs on this connection: wait for its response or use another connection";
                    self.answer(&id.unwrap_or_default(), &Err(RpcError::new(rpc::BUSY, busy))).await;
                }
                (Err((id, error)), _) => drop(self.answer(&id, &Err(error)).await),
            }
        }
    }
}

/// Runs the call as a task: a panic stays inside it, and dropping the set aborts it.
fn start(running: Running) -> JoinSet<Answer> {
    let mut set = JoinSet::new();
    set.spawn(running);
    set
}

fn outcome(joined: Option<Result<Answer, tokio::task::JoinError>>) -> Answer {
    match joined {
        Some(Ok(answer)) => answer,
        Some(Err(error)) => Err(RpcError::internal(format!("the method failed: {error}"))),
        None => Err(RpcError::internal("the method has ended already")),
    }
}
