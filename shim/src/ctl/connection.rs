//! One client of `ctl.sock`: its lines are read and answered, within the limits.

use std::io;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::ctl::method;
use crate::ctl::method::{Answer, Call, DISCOVER, Kind, Method, Note, PREFIX, Running};
use crate::ctl::rpc;
use crate::ctl::rpc::{Message, RpcError};
use crate::ctl::{Limits, SOCKET};

/// Lines on their way to a client; those who make them wait past that.
const LINES: usize = 4;
/// Notifications on their way to a streaming call; past that, nothing more is read from the client.
const NOTES: usize = 16;

/// Serves a client until it goes, or has to.
pub(super) async fn serve<C: Clone + Send>(
    stream: UnixStream,
    context: C,
    methods: &'static [Method<C>],
    limits: Limits,
) {
    let (read, write) = stream.into_split();
    let (lines, queue) = mpsc::channel(LINES);
    // Apart from the reading: a client that does not read until it has written shall not wait for itself.
    let writer = tokio::spawn(write_lines(write, queue, limits));
    let mut client = Client { reader: Lines::new(read, limits.line), lines, context, methods, limits };
    client.serve().await;
    drop(client);
    // What was queued is still written; not for longer than the deadline of each line.
    let _ = writer.await;
}

async fn write_lines(mut write: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>, limits: Limits) {
    while let Some(line) = queue.recv().await {
        match timeout(limits.stall, write.write_all(&line)).await {
            Ok(Ok(())) => {}
            // It has gone.
            Ok(Err(_)) => return,
            Err(_) => {
                let stalled_ms = limits.stall.as_millis() as u64;
                tracing::warn!(stalled_ms, "a client of {SOCKET} does not read, and is dropped");
                return;
            }
        }
    }
}

/// What came of the wait for a line.
enum Read {
    Line(Vec<u8>),
    /// Longer than the limit; where the next one begins is not known.
    TooLong,
    End,
}

/// Reads lines, and keeps no more of them than the limit.
struct Lines {
    read: OwnedReadHalf,
    limit: usize,
    buffer: Vec<u8>,
    /// Bytes of the buffer that have been looked at and hold no line's end.
    seen: usize,
}

impl Lines {
    fn new(read: OwnedReadHalf, limit: usize) -> Self {
        Self { read, limit, buffer: Vec::new(), seen: 0 }
    }

    /// May be dropped while it waits, and called again.
    async fn next(&mut self) -> Read {
        let mut chunk = [0; 8192];
        loop {
            if let Some(end) = self.buffer[self.seen..].iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(self.seen + end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                self.seen = 0;
                return if line.len() > self.limit { Read::TooLong } else { Read::Line(line) };
            }
            self.seen = self.buffer.len();
            if self.seen > self.limit {
                return Read::TooLong;
            }
            match self.read.read(&mut chunk).await {
                Ok(0) => return Read::End,
                Ok(length) => self.buffer.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::debug!(%error, "a client of {SOCKET} is lost");
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
            let went_on = match rpc::parse(&line) {
                Ok(Message { id: Some(id), method, params }) => {
                    let answer = self.call(&method, params).await;
                    self.answer(&id, &answer).await
                }
                // For a call that has ended meanwhile.
                Ok(Message { id: None, .. }) => true,
                Err((id, error)) => self.answer(&id, &Err(error)).await,
            };
            if !went_on {
                return;
            }
        }
    }

    fn too_long(&self) -> RpcError {
        RpcError::new(rpc::INVALID_REQUEST, format!("a line is longer than {} bytes", self.limits.line))
    }

    /// False when the client takes nothing any more.
    async fn answer(&self, id: &Value, answer: &Answer) -> bool {
        self.lines.send(rpc::response(id, answer)).await.is_ok()
    }

    async fn call(&mut self, name: &str, params: Value) -> Answer {
        if name == DISCOVER {
            return Ok(method::discover("husk: one virtual machine and its containers", self.methods));
        }
        let Some(method) = method::find(self.methods, name) else {
            let message = format!("there is no method {}; {DISCOVER} lists those that there are", rpc::quoted(name));
            return Err(RpcError::new(rpc::METHOD_NOT_FOUND, message));
        };
        match &method.kind {
            Kind::Elsewhere(words) => Err(RpcError::refused(*words)),
            Kind::Unary(run) => {
                let mut running = start(run(self.context.clone(), params));
                match timeout(self.limits.answer, running.join_next()).await {
                    Ok(ended) => outcome(ended),
                    Err(_) => {
                        let ms = self.limits.answer.as_millis();
                        Err(RpcError::internal(format!("{} has no answer after {ms} ms", method.name)))
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

    /// Reads on while a streaming call runs.
    async fn attend(&mut self, mut running: JoinSet<Answer>, notes: mpsc::Sender<Note>) -> Answer {
        let lines = self.lines.clone();
        let mut notes = Some(notes);
        loop {
            let read = tokio::select! {
                ended = running.join_next() => return outcome(ended),
                // It would not end by itself if it has nothing to say.
                () = lines.closed() => return Err(method::Gone.into()),
                read = self.reader.next(), if notes.is_some() => read,
            };
            let Read::Line(line) = read else {
                // The call learns that no more comes. What is too long cannot be answered any more: the call may go on for long.
                notes = None;
                continue;
            };
            match (rpc::parse(&line), &notes) {
                (Ok(Message { id: None, method, params }), Some(notes)) => {
                    let method = method.strip_prefix(PREFIX).unwrap_or(&method).to_owned();
                    tokio::select! {
                        // It may have ended, and take nothing.
                        _ = notes.send(Note { method, params }) => {}
                        ended = running.join_next() => return outcome(ended),
                    }
                }
                (Ok(Message { id, .. }), _) => {
                    let busy = "a streaming call runs on this connection: use another one, or wait for its response";
                    self.answer(&id.unwrap_or_default(), &Err(RpcError::new(rpc::BUSY, busy))).await;
                }
                (Err((id, error)), _) => drop(self.answer(&id, &Err(error)).await),
            }
        }
    }
}

/// As a task, so that its panic is its own; it is aborted when the set is dropped.
fn start(running: Running) -> JoinSet<Answer> {
    let mut set = JoinSet::new();
    set.spawn(running);
    set
}

fn outcome(ended: Option<Result<Answer, tokio::task::JoinError>>) -> Answer {
    match ended {
        Some(Ok(answer)) => answer,
        Some(Err(error)) => Err(RpcError::internal(format!("the method ended: {error}"))),
        None => Err(RpcError::internal("the method has ended already")),
    }
}
