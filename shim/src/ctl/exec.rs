//! `compute.vm.exec`: runs a process in the VM itself and relays its streams between the guest and one client.
//!
//! The client's notifications are read even while the process reads no input, so that a resize, a signal or a
//! disconnect takes effect at once. The client may therefore send [`EXEC_INPUT_AHEAD`] bytes of input before the guest
//! takes them, and a notification reports how much the guest has taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64ct::{Base64, Encoding};
use husk_protos::STDIO_CHUNK;
use husk_protos::chain::Chain;
use husk_protos::debug::{Process, StartProcessRequest};
use husk_protos::stdio::{InputChunk, StreamKind};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::context::Context;

use crate::ctl::messages::{
    EXEC_INPUT_AHEAD, ExecEnd, ExecInputParams, ExecParams, ExecPart, ExecResizeParams, ExecSignalParams, ExecStream,
};
use crate::ctl::method::{Answer, Call, Note};
use crate::ctl::rpc;
use crate::ctl::rpc::RpcError;
use crate::guest::client::{Guest, GuestError};
use crate::host::text::is_unsafe;
use crate::sandbox::Sandbox;
use crate::vm::Vm;

/// Chunks of output on their way to the client.
const CHUNKS: usize = 4;
/// Longest id of a process, bytes. The guest's init numbers them.
const ID_MAX: usize = 64;
/// How long the rest of the output may take after the process has exited.
const LAST_OUTPUT: Duration = Duration::from_secs(10);

/// What a client sends to a running process.
#[derive(Debug, PartialEq, Eq)]
enum ExecInput {
    Data(Vec<u8>),
    End,
    Resize { rows: u16, columns: u16 },
    Signal(u32),
}

/// Runs a process until it exits or the client disconnects.
pub(super) async fn run(sandbox: Arc<Sandbox>, mut call: Call) -> Answer {
    let params: ExecParams = rpc::params(std::mem::take(&mut call.params))?;
    let vm = sandbox.vm_in_debug_mode().map_err(|error| RpcError::refused(Chain(&error).to_string()))?;
    let has_input = params.terminal || params.stdin;
    // In a task: when the client disconnects during the start, the start completes and the process is then ended.
    let starting = tokio::spawn(start(vm.clone(), params));
    let running = starting.await.map_err(|error| RpcError::internal(format!("start the process: {error}")))??;
    let mut relay = Relay::start(&running, has_input);
    let exit_code = relay.until_exit(&vm, &mut call).await?;
    relay.finish_output(&call, exit_code).await
}

/// A process that is ended when this is dropped.
struct Running {
    guest: Arc<Guest>,
    id: String,
    terminal: bool,
}

impl Running {
    fn request(&self) -> Process {
        Process { id: self.id.clone(), ..Default::default() }
    }
}

async fn start(vm: Arc<Vm>, params: ExecParams) -> Result<Running, RpcError> {
    let ExecParams { args, env, cwd, terminal, rows, columns, stdin } = params;
    let (height, width) = (rows.into(), columns.into());
    let request = StartProcessRequest { args, env, cwd, terminal, height, width, stdin, ..Default::default() };
    let guest = vm.guest.clone();
    match guest.debug.start(guest.context(), &request).await {
        // The id goes into the log.
        Ok(started) if started.id.len() <= ID_MAX && !started.id.contains(is_unsafe) => {
            Ok(Running { guest, id: started.id, terminal })
        }
        Ok(_) => Err(RpcError::internal("the guest returned an invalid id of the process")),
        Err(error) => Err(guest_error(&vm, error).await),
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (guest, process) = (self.guest.clone(), self.request());
        tokio::spawn(async move {
            // Fails when the VM has died, and the process with it.
            if let Err(error) = guest.debug.end(guest.context(), &process).await {
                tracing::debug!(process = process.id, error = %GuestError::from(error), "failed to end a process in the VM");
            }
        });
    }
}

/// The streams between a process and its client.
struct Relay<'a> {
    running: &'a Running,
    output: mpsc::Receiver<ExecPart>,
    /// How much input the guest has taken.
    taken: mpsc::Receiver<usize>,
    /// `None` when the process has no input, or its input has ended.
    input: Option<mpsc::UnboundedSender<Vec<u8>>>,
    /// Bytes of input that the guest has not taken.
    ahead: Arc<AtomicUsize>,
    /// The copies, which end with the relay.
    _tasks: JoinSet<()>,
}

impl<'a> Relay<'a> {
    fn start(running: &'a Running, has_input: bool) -> Self {
        let (guest, id) = (&running.guest, &running.id);
        let mut tasks = JoinSet::new();
        let (chunks, output) = mpsc::channel(CHUNKS);
        let streams = [
            (StreamKind::STREAM_KIND_STDOUT, ExecStream::Stdout),
            (StreamKind::STREAM_KIND_STDERR, ExecStream::Stderr),
        ];
        // A terminal has one output stream.
        for (kind, stream) in &streams[..if running.terminal { 1 } else { 2 }] {
            tasks.spawn(copy_output(guest.clone(), id.clone(), *kind, *stream, chunks.clone()));
        }
        let (report_taken, taken) = mpsc::channel(CHUNKS);
        let ahead = Arc::new(AtomicUsize::new(0));
        // Bounded by `ahead`.
        let (input, waiting) = mpsc::unbounded_channel();
        if has_input {
            tasks.spawn(copy_input(guest.clone(), id.clone(), waiting, ahead.clone(), report_taken));
        }
        Self { running, output, taken, input: has_input.then_some(input), ahead, _tasks: tasks }
    }

    /// Relays until the process exits. Returns its exit status.
    async fn until_exit(&mut self, vm: &Vm, call: &mut Call) -> Result<u8, RpcError> {
        let process = self.running.request();
        let wait = self.running.guest.debug.wait(Context::default(), &process);
        tokio::pin!(wait);
        loop {
            tokio::select! {
                exited = &mut wait => return match exited {
                    Ok(exited) => Ok(u8::try_from(exited.exit_status).unwrap_or(u8::MAX)),
                    Err(error) => Err(guest_error(vm, error).await),
                },
                Some(chunk) = self.output.recv() => call.notify(&chunk).await?,
                Some(taken) = self.taken.recv() => call.notify(&ExecPart::Taken { taken }).await?,
                note = call.note() => match note {
                    Some(note) => self.apply(exec_input(&note)?).await?,
                    // Nobody reads the response.
                    None => return Err(RpcError::internal("the client has closed its side of the connection")),
                },
            }
        }
    }

    async fn apply(&mut self, input: ExecInput) -> Result<(), RpcError> {
        let guest = &self.running.guest;
        match input {
            ExecInput::Data(data) => {
                let before = self.ahead.fetch_add(data.len(), Ordering::Relaxed);
                if before + data.len() > EXEC_INPUT_AHEAD {
                    let message = format!("more than {EXEC_INPUT_AHEAD} bytes of input that the process has not taken");
                    return Err(RpcError::new(rpc::INVALID_PARAMS, message));
                }
                // Input for a process that has none, or has closed it, is discarded without an error.
                if let Some(input) = &self.input {
                    let _ = input.send(data);
                }
            }
            ExecInput::End => self.input = None,
            ExecInput::Resize { rows, columns } => {
                let size = Process { height: rows.into(), width: columns.into(), ..self.running.request() };
                log_failure("resize", guest.debug.resize(guest.context(), &size).await);
            }
            ExecInput::Signal(signal) => {
                let signal = Process { signal, ..self.running.request() };
                log_failure("signal", guest.debug.signal(guest.context(), &signal).await);
            }
        }
        Ok(())
    }

    /// Sends the rest of the output of a process that has exited.
    async fn finish_output(&mut self, call: &Call, exit_code: u8) -> Answer {
        loop {
            match timeout(LAST_OUTPUT, self.output.recv()).await {
                Ok(Some(chunk)) => call.notify(&chunk).await?,
                Ok(None) => return rpc::result(ExecEnd { exit_code }),
                Err(_) => {
                    let seconds = LAST_OUTPUT.as_secs();
                    return Err(RpcError::internal(format!(
                        "the process has exited with {exit_code}, but its output has not ended within {seconds} s"
                    )));
                }
            }
        }
    }
}

/// The process may have exited meanwhile. Its exit, which comes next, is the better explanation.
fn log_failure(action: &str, done: ttrpc::Result<Process>) {
    if let Err(error) = done {
        tracing::debug!(action, error = %GuestError::from(error), "failed to act on a process in the VM");
    }
}

fn exec_input(note: &Note) -> Result<ExecInput, RpcError> {
    let invalid = |message: String| RpcError::new(rpc::INVALID_PARAMS, message);
    match note.method.as_str() {
        "exec.input" => match rpc::params(note.params.clone())? {
            ExecInputParams { end: true, data } if data.is_empty() => Ok(ExecInput::End),
            ExecInputParams { end: true, .. } => Err(invalid("exec.input takes data or end, not both".to_owned())),
            ExecInputParams { data, .. } => {
                let data = Base64::decode_vec(&data).map_err(|error| invalid(format!("exec.input: data: {error}")))?;
                Ok(ExecInput::Data(data))
            }
        },
        "exec.resize" => rpc::params(note.params.clone())
            .map(|ExecResizeParams { rows, columns }| ExecInput::Resize { rows, columns }),
        "exec.signal" => rpc::params(note.params.clone()).map(|ExecSignalParams { signal }| ExecInput::Signal(signal)),
        other => {
            Err(invalid(format!("no notification {}: use exec.input, exec.resize or exec.signal", rpc::quoted(other))))
        }
    }
}

/// Copies an output stream until it ends, or until all output of the process itself has arrived: its children may keep
/// the stream open.
async fn copy_output(
    guest: Arc<Guest>,
    id: String,
    kind: StreamKind,
    stream: ExecStream,
    client: mpsc::Sender<ExecPart>,
) {
    let copied: Result<(), GuestError> = async {
        let mut output = guest.output("", &id, kind).await?;
        while let Some(chunk) = output.recv().await? {
            // A guest may send a larger chunk than a line should hold.
            for part in chunk.data.chunks(STDIO_CHUNK) {
                if client.send(ExecPart::Output { stream, data: Base64::encode_string(part) }).await.is_err() {
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
        tracing::warn!(process = id, ?stream, error = %Chain(&error), "the output of a process in the VM ended early");
    }
}

/// Copies the client's input to the process, reports what the guest has taken, and closes the process's stdin at its
/// end.
async fn copy_input(
    guest: Arc<Guest>,
    id: String,
    mut client: mpsc::UnboundedReceiver<Vec<u8>>,
    ahead: Arc<AtomicUsize>,
    report_taken: mpsc::Sender<usize>,
) {
    let copied: Result<(), GuestError> = async {
        let mut input = guest.input("", &id).await?;
        while let Some(data) = client.recv().await {
            for part in data.chunks(STDIO_CHUNK) {
                input.send(&InputChunk { data: part.to_vec(), ..Default::default() }).await?;
            }
            ahead.fetch_sub(data.len(), Ordering::Relaxed);
            if report_taken.send(data.len()).await.is_err() {
                return Ok(());
            }
        }
        input.close_and_recv().await?;
        Ok(())
    }
    .await;
    if let Err(error) = copied {
        tracing::debug!(process = id, error = %Chain(&error), "the input of a process in the VM ended early");
    }
}

/// The error of a call to the guest: the guest's own message, or the VM's cause of death if the call was lost with the
/// VM.
async fn guest_error(vm: &Vm, error: ttrpc::Error) -> RpcError {
    let error = GuestError::from(error);
    if let GuestError::Call(ttrpc::Error::RpcStatus(status)) = &error {
        let message = status.message.clone();
        match status.code() {
            Code::NOT_FOUND => return RpcError::new(rpc::NO_SUCH_PROGRAM, message),
            Code::FAILED_PRECONDITION => return RpcError::new(rpc::NOT_EXECUTABLE, message),
            Code::INVALID_ARGUMENT => return RpcError::new(rpc::INVALID_PARAMS, message),
            Code::UNKNOWN | Code::CANCELLED | Code::UNAVAILABLE => {}
            _ => return RpcError::internal(message),
        }
    }
    match vm.died_under_call().await {
        Some(cause) => RpcError::refused(format!("the VM has died: {cause}")),
        None => RpcError::internal(Chain(&error).to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn notifications_are_understood_or_rejected() {
        let table: &[(&str, Value, Result<ExecInput, &str>)] = &[
            ("exec.input", json!({"data": "AAH/Cg=="}), Ok(ExecInput::Data(vec![0, 1, 255, 10]))),
            ("exec.input", json!({"end": true}), Ok(ExecInput::End)),
            ("exec.input", json!({"end": true, "data": "AA=="}), Err("exec.input takes data or end, not both")),
            ("exec.input", json!({"data": "?"}), Err("exec.input: data: ")),
            ("exec.input", json!({"date": ""}), Err("params: unknown field `date`")),
            ("exec.resize", json!({"rows": 24, "columns": 80}), Ok(ExecInput::Resize { rows: 24, columns: 80 })),
            ("exec.resize", json!({"rows": 24}), Err("params: missing field `columns`")),
            ("exec.resize", json!({"rows": 70000, "columns": 1}), Err("params: invalid value")),
            ("exec.signal", json!({"signal": 15}), Ok(ExecInput::Signal(15))),
            ("exec.stop", json!({}), Err("no notification \"exec.stop\": use exec.input, exec.resize or exec.signal")),
        ];
        for (method, params, expected) in table {
            let input = exec_input(&Note { method: (*method).to_owned(), params: params.clone() });
            match (&input, expected) {
                (Ok(input), Ok(expected)) => assert_eq!(input, expected),
                (Err(error), Err(begins)) => {
                    assert_eq!(error.code, rpc::INVALID_PARAMS);
                    assert!(error.message.starts_with(begins), "{error}");
                }
                _ => panic!("{method} {params}: {input:?}"),
            }
        }
    }
}
