//! `compute.vm.exec`: a process in the VM itself, relayed between its streams in the guest and the lines of one client.
//!
//! The client's notifications are always taken, so that a resize, a signal or the client's end is heard also while the process does not read:
//! of the input there may be [`AHEAD`] bytes that have not been passed on, and the client is told of those that have.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64ct::{Base64, Encoding};
use husk_protos::STDIO_CHUNK;
use husk_protos::debug::{Process, StartProcessRequest};
use husk_protos::stdio::{InputChunk, StreamKind};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::context::Context;

use crate::ctl::rpc;
use crate::ctl::rpc::RpcError;
use crate::ctl::{Answer, Call, Note};
use crate::guest::client::{Guest, GuestError};
use crate::sandbox::Sandbox;
use crate::vm::Vm;

/// Bytes of input that a client may send before they are passed on.
pub const AHEAD: usize = 256 * 1024;
/// Chunks of output on their way to the client.
const CHUNKS: usize = 4;
/// How long the last of the output may take to come when the process has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(10);
/// Most characters of a guest's refusal that are repeated.
const GUEST_WORDS: usize = 1000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    cwd: String,
    #[serde(default)]
    terminal: bool,
    #[serde(default)]
    rows: u16,
    #[serde(default)]
    columns: u16,
    #[serde(default)]
    stdin: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    #[serde(default)]
    data: String,
    #[serde(default)]
    end: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    rows: u16,
    columns: u16,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signal {
    signal: u32,
}

/// What a client asks of a process that runs.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    Input(Vec<u8>),
    EndOfInput,
    Resize { rows: u16, columns: u16 },
    Signal(u32),
}

/// Runs it to its end, or to the client's.
pub async fn run(sandbox: Arc<Sandbox>, mut call: Call) -> Answer {
    let params: Params = rpc::params(std::mem::take(&mut call.params))?;
    let vm = sandbox.vm_in_debug_mode()?;
    let has_input = params.terminal || params.stdin;
    // On its own, so that a process that is just being started is ended also if the client goes now.
    let starting = tokio::spawn(start(vm.clone(), params));
    let running = starting.await.map_err(RpcError::internal)??;
    relay(&vm, &running, has_input, call).await
}

/// A process that is ended when this is dropped.
struct Running {
    guest: Arc<Guest>,
    id: String,
    terminal: bool,
}

async fn start(vm: Arc<Vm>, params: Params) -> Result<Running, RpcError> {
    let Params { args, env, cwd, terminal, rows, columns, stdin } = params;
    let (height, width) = (rows.into(), columns.into());
    let request = StartProcessRequest { args, env, cwd, terminal, height, width, stdin, ..Default::default() };
    let guest = vm.guest.clone();
    match guest.debug.start(guest.context(), &request).await {
        Ok(started) => Ok(Running { guest, id: started.id, terminal }),
        Err(error) => Err(lost_or(&vm, error).await),
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (guest, process) = (self.guest.clone(), Process { id: std::mem::take(&mut self.id), ..Default::default() });
        tokio::spawn(async move {
            // A guest that has gone has taken it along.
            if let Err(error) = guest.debug.end(guest.context(), &process).await {
                tracing::debug!(process = process.id, %error, "end a process in the VM");
            }
        });
    }
}

async fn relay(vm: &Arc<Vm>, running: &Running, has_input: bool, mut call: Call) -> Answer {
    let (guest, id) = (&running.guest, &running.id);
    let process = || Process { id: id.clone(), ..Default::default() };
    // What is done for the process beside the calls; it ends with the relay.
    let mut tasks = JoinSet::new();
    let (chunks, mut output) = mpsc::channel(CHUNKS);
    let kinds = [(StreamKind::STREAM_KIND_STDOUT, "stdout"), (StreamKind::STREAM_KIND_STDERR, "stderr")];
    for (kind, name) in &kinds[..if running.terminal { 1 } else { 2 }] {
        tasks.spawn(copy_output(guest.clone(), id.clone(), *kind, name, chunks.clone()));
    }
    drop(chunks);
    let (tell_taken, mut taken) = mpsc::channel(CHUNKS);
    let ahead = Arc::new(AtomicUsize::new(0));
    // Bounded by `ahead`.
    let (input, waiting) = mpsc::unbounded_channel();
    let mut input = has_input.then_some(input);
    if has_input {
        tasks.spawn(copy_input(guest.clone(), id.clone(), waiting, ahead.clone(), tell_taken));
    }

    let asked = process();
    let wait = guest.debug.wait(Context::default(), &asked);
    tokio::pin!(wait);
    let exit_code = loop {
        tokio::select! {
            ended = &mut wait => match ended {
                Ok(ended) => break ended.exit_status.min(255),
                Err(error) => return Err(lost_or(vm, error).await),
            },
            Some(chunk) = output.recv() => call.notify(&chunk).await?,
            Some(taken) = taken.recv() => call.notify(&json!({"taken": taken})).await?,
            note = call.note() => {
                // Nobody is there any more who would hear of its end.
                let Some(note) = note else { return Err(RpcError::internal("the client has ended its side")) };
                match wish(&note)? {
                    Wish::Input(data) => {
                        let before = ahead.fetch_add(data.len(), Ordering::Relaxed);
                        if before + data.len() > AHEAD {
                            let why = format!("more than {AHEAD} bytes of input that have not been taken");
                            return Err(RpcError::new(rpc::INVALID_PARAMS, why));
                        }
                        // A process without input, or one that has closed it, is not told either.
                        if let Some(input) = &input {
                            let _ = input.send(data);
                        }
                    }
                    Wish::EndOfInput => input = None,
                    Wish::Resize { rows, columns } => {
                        let size = Process { height: rows.into(), width: columns.into(), ..process() };
                        note_failure("resize", guest.debug.resize(guest.context(), &size).await);
                    }
                    Wish::Signal(signal) => {
                        let signal = Process { signal, ..process() };
                        note_failure("signal", guest.debug.signal(guest.context(), &signal).await);
                    }
                }
            }
        }
    };
    loop {
        match timeout(LAST_OUTPUT, output.recv()).await {
            Ok(Some(chunk)) => call.notify(&chunk).await?,
            Ok(None) => return Ok(json!({"exit_code": exit_code})),
            Err(_) => {
                let seconds = LAST_OUTPUT.as_secs();
                return Err(RpcError::internal(format!(
                    "it has ended with {exit_code}, but its output has not in {seconds} s"
                )));
            }
        }
    }
}

/// It may have ended meanwhile: its end comes next, and says more.
fn note_failure(what: &str, done: ttrpc::Result<Process>) {
    if let Err(error) = done {
        tracing::debug!(what, %error, "a process in the VM");
    }
}

/// What a notification asks for.
fn wish(note: &Note) -> Result<Wish, RpcError> {
    let wrong = |why: String| RpcError::new(rpc::INVALID_PARAMS, why);
    match note.method.as_str() {
        "exec.input" => match rpc::params(note.params.clone())? {
            Input { end: true, data } if data.is_empty() => Ok(Wish::EndOfInput),
            Input { end: true, .. } => Err(wrong("exec.input has either data or its end".to_owned())),
            Input { data, .. } => {
                let data = Base64::decode_vec(&data).map_err(|error| wrong(format!("exec.input: data: {error}")))?;
                Ok(Wish::Input(data))
            }
        },
        "exec.resize" => {
            rpc::params(note.params.clone()).map(|Resize { rows, columns }| Wish::Resize { rows, columns })
        }
        "exec.signal" => rpc::params(note.params.clone()).map(|Signal { signal }| Wish::Signal(signal)),
        other => Err(wrong(format!("{}: there are exec.input, exec.resize and exec.signal", rpc::quoted(other)))),
    }
}

/// Passes output on until its end, or until all is there that the process itself has written.
async fn copy_output(guest: Arc<Guest>, id: String, kind: StreamKind, name: &'static str, to: mpsc::Sender<Value>) {
    let copied: Result<(), GuestError> = async {
        let mut stream = guest.output("", &id, kind).await?;
        while let Some(chunk) = stream.recv().await? {
            // What a guest sends as one may be larger than a line should be.
            for part in chunk.data.chunks(STDIO_CHUNK) {
                let chunk = json!({"stream": name, "data": Base64::encode_string(part)});
                if to.send(chunk).await.is_err() {
                    return Ok(());
                }
            }
            if chunk.exited {
                break;
            }
        }
        Ok(())
    }
    .await;
    if let Err(error) = copied {
        tracing::warn!(process = id, stream = name, %error, "output of a process in the VM ended early");
    }
}

/// Passes input on, and tells how much has been. Its end becomes the process's.
async fn copy_input(
    guest: Arc<Guest>,
    id: String,
    mut from: mpsc::UnboundedReceiver<Vec<u8>>,
    ahead: Arc<AtomicUsize>,
    tell: mpsc::Sender<usize>,
) {
    let copied: Result<(), GuestError> = async {
        let mut stream = guest.input("", &id).await?;
        while let Some(data) = from.recv().await {
            for part in data.chunks(STDIO_CHUNK) {
                stream.send(&InputChunk { data: part.to_vec(), ..Default::default() }).await?;
            }
            ahead.fetch_sub(data.len(), Ordering::Relaxed);
            if tell.send(data.len()).await.is_err() {
                return Ok(());
            }
        }
        stream.close_and_recv().await?;
        Ok(())
    }
    .await;
    if let Err(error) = copied {
        tracing::debug!(process = id, %error, "input of a process in the VM ended early");
    }
}

/// The error of a call to the guest: what the VM died of, if it did, else the guest's refusal.
async fn lost_or(vm: &Vm, error: ttrpc::Error) -> RpcError {
    if let ttrpc::Error::RpcStatus(status) = &error {
        let words: String = status.message.chars().take(GUEST_WORDS).collect();
        match status.code() {
            Code::NOT_FOUND => return RpcError::new(rpc::NO_SUCH_PROGRAM, words),
            Code::FAILED_PRECONDITION => return RpcError::new(rpc::NOT_EXECUTABLE, words),
            Code::INVALID_ARGUMENT => return RpcError::new(rpc::INVALID_PARAMS, words),
            Code::UNKNOWN | Code::CANCELLED | Code::UNAVAILABLE => {}
            _ => return RpcError::internal(words),
        }
    }
    match vm.died_under_call().await {
        Some(cause) => RpcError::refused(format!("the VM has died: {cause}")),
        None => RpcError::internal(GuestError::Call(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_are_understood_or_refused() {
        let table: &[(&str, Value, Result<Wish, &str>)] = &[
            ("exec.input", json!({"data": "AAH/Cg=="}), Ok(Wish::Input(vec![0, 1, 255, 10]))),
            ("exec.input", json!({"end": true}), Ok(Wish::EndOfInput)),
            ("exec.input", json!({"end": true, "data": "AA=="}), Err("exec.input has either data or its end")),
            ("exec.input", json!({"data": "?"}), Err("exec.input: data: ")),
            ("exec.input", json!({"date": ""}), Err("params: unknown field `date`")),
            ("exec.resize", json!({"rows": 24, "columns": 80}), Ok(Wish::Resize { rows: 24, columns: 80 })),
            ("exec.resize", json!({"rows": 24}), Err("params: missing field `columns`")),
            ("exec.resize", json!({"rows": 70000, "columns": 1}), Err("params: invalid value")),
            ("exec.signal", json!({"signal": 15}), Ok(Wish::Signal(15))),
            ("exec.stop", json!({}), Err("\"exec.stop\": there are exec.input, exec.resize and exec.signal")),
        ];
        for (method, params, wanted) in table {
            let got = wish(&Note { method: (*method).to_owned(), params: params.clone() });
            match (&got, wanted) {
                (Ok(got), Ok(wanted)) => assert_eq!(got, wanted),
                (Err(error), Err(begins)) => {
                    assert_eq!(error.code, rpc::INVALID_PARAMS);
                    assert!(error.message.starts_with(begins), "{error}");
                }
                _ => panic!("{method} {params}: {got:?}"),
            }
        }
    }
}
