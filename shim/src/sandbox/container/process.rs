//! One process of a container: its streams and its exit.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::lock::lock;
use husk_protos::stdio::StreamKind;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use super::order::Stage;
use crate::guest::client::Guest;
use crate::stdio::{Input, Logger, Output, Outputs, Stdio, StdioError};

/// How long a reader may stall before the exit is published without the rest of the output. A reader that accepts any
/// output within this time receives all of it before the exit is published.
const READER_PATIENCE: Duration = Duration::from_secs(5);
/// How long an exit waits for the output in total. At most about 1 MiB is under way when the process exits, so only a
/// reader slower than about 100 KiB/s exceeds it. That reader receives the rest of the output after the exit.
const DELIVERY: Duration = Duration::from_secs(9);
/// Time limit for recording a process's exit: the delivery of its output, and some margin.
pub(crate) const EXIT_RECORDED: Duration = Duration::from_secs(10);
const _: () = assert!(DELIVERY.as_secs() < EXIT_RECORDED.as_secs());

/// How and when a process exited.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Exit {
    /// 0 to 255; for a signal, 128 plus its number.
    pub(crate) status: u32,
    pub(crate) at: Timestamp,
}

#[derive(Debug, Clone, PartialEq)]
enum ExitState {
    /// No exit is recorded yet.
    Pending,
    Exited(Exit),
    /// There will be no exit: the process was never created.
    Discarded,
}

/// One process: a container's init process, or an exec.
#[derive(Debug)]
pub(crate) struct Process {
    /// Empty for the init process.
    pub(crate) exec_id: String,
    /// The streams that containerd requested.
    pub(crate) stdio: Stdio,
    /// The PID of the container's holder.
    holder: u32,
    guest_pid: AtomicU32,
    /// How far the guest has reported its life.
    stage: Mutex<Stage>,
    starting: AtomicBool,
    /// The process has been killed, and its exit is awaited.
    killed: AtomicBool,
    /// The exit has been reported and will be recorded.
    exiting: watch::Sender<bool>,
    /// The exit is to be recorded as soon as what represents the process on the host has ended.
    ending: watch::Sender<bool>,
    /// Closed when that has ended. `None` if nothing represents the process.
    represented: Mutex<Option<watch::Receiver<()>>>,
    /// Whether the ExecAdded event has been passed to the publisher.
    announced: watch::Sender<bool>,
    exit: watch::Sender<ExitState>,
    streams: Mutex<Streams>,
}

#[derive(Debug, Default)]
struct Streams {
    input: Option<Input>,
    /// Stdout and stderr, each if there is one.
    outputs: [Option<Arc<Output>>; 2],
    loggers: Vec<Logger>,
    /// A client has closed the input. A client whose own input ends early does that before the process starts.
    input_closed: bool,
}

impl Process {
    /// A process that has not started.
    pub(crate) fn new(exec_id: &str, stdio: Stdio, holder: u32) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            holder,
            guest_pid: AtomicU32::new(0),
            stage: Mutex::default(),
            starting: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            exiting: watch::channel(false).0,
            ending: watch::channel(false).0,
            represented: Mutex::default(),
            announced: watch::channel(false).0,
            exit: watch::channel(ExitState::Pending).0,
            streams: Mutex::default(),
        }
    }

    /// The PID that containerd gets: that of the container's holder, or 0 while the process does not run.
    pub(crate) fn pid(&self) -> u32 {
        self.pid_for(self.guest_pid())
    }

    /// The PID that containerd gets in place of one that the guest reports.
    pub(crate) fn pid_for(&self, guest_pid: u32) -> u32 {
        if guest_pid == 0 { 0 } else { self.holder }
    }

    /// The PID in the guest; 0 while it is not known.
    pub(crate) fn guest_pid(&self) -> u32 {
        self.guest_pid.load(Ordering::Relaxed)
    }

    /// Sets the PID in the guest. Only the first call has an effect: the PID never changes.
    pub(crate) fn set_guest_pid(&self, pid: u32) {
        // Fails if the PID is set already.
        let _ = self.guest_pid.compare_exchange(0, pid, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// How far the guest has reported its life.
    pub(super) fn stage(&self) -> MutexGuard<'_, Stage> {
        lock(&self.stage)
    }

    /// Claims the start for the caller, who then opens the streams. Returns false if another call has claimed it.
    pub(crate) fn claim_start(&self) -> bool {
        !self.starting.swap(true, Ordering::Relaxed)
    }

    /// Releases the claim after a failed start.
    pub(crate) fn release_start(&self) {
        self.starting.store(false, Ordering::Relaxed);
    }

    /// Notes that the process has been killed. Returns false if that was noted before.
    pub(crate) fn note_kill(&self) -> bool {
        !self.killed.swap(true, Ordering::Relaxed)
    }

    /// Claims the exit for the caller, who then records it. Returns false if it was claimed before.
    pub(crate) fn claim_exit(&self) -> bool {
        self.exiting.send_if_modified(|exiting| !std::mem::replace(exiting, true))
    }

    /// Waits until the exit has been reported, or the process is discarded. The record of the exit may follow much
    /// later, after the last output.
    pub(crate) async fn exit_reported(&self) {
        let mut exiting = self.exiting.subscribe();
        tokio::select! {
            // Cannot fail: self holds the sender.
            _ = exiting.wait_for(|exiting| *exiting) => {}
            _ = self.exited() => {}
        }
    }

    /// Says that something on the host represents the process. The exit is not recorded before the returned value is
    /// dropped, which has to follow [`Self::ending`].
    pub(crate) fn represent(&self) -> watch::Sender<()> {
        let (representing, represented) = watch::channel(());
        *lock(&self.represented) = Some(represented);
        representing
    }

    /// Waits until the exit is to be recorded, or the process is discarded.
    pub(crate) async fn ending(&self) {
        let mut ending = self.ending.subscribe();
        tokio::select! {
            // Cannot fail: self holds the sender.
            _ = ending.wait_for(|ending| *ending) => {}
            _ = self.exited() => {}
        }
    }

    /// Ends what represents the process on the host, and waits for that.
    pub(crate) async fn end_representation(&self) {
        self.ending.send_replace(true);
        let represented = lock(&self.represented).take();
        if let Some(mut represented) = represented {
            // Ends with an error when the other side is dropped; nothing is ever sent.
            let _ = represented.changed().await;
        }
    }

    /// Marks the ExecAdded event as published.
    pub(crate) fn set_announced(&self) {
        self.announced.send_replace(true);
    }

    /// Waits until the ExecAdded event has been published.
    pub(crate) async fn announced(&self) {
        // Cannot fail: self holds the sender.
        let _ = self.announced.subscribe().wait_for(|announced| *announced).await;
    }

    /// The exit, if it is recorded.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match &*self.exit.borrow() {
            ExitState::Exited(exit) => Some(exit.clone()),
            ExitState::Pending | ExitState::Discarded => None,
        }
    }

    /// Waits for the exit without a time limit. Returns `None` if the process is discarded.
    pub(crate) async fn exited(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(|exit| *exit != ExitState::Pending).await.as_deref() {
            Ok(ExitState::Exited(exit)) => Some(exit.clone()),
            Ok(ExitState::Pending | ExitState::Discarded) | Err(_) => None,
        }
    }

    /// Marks the process as never created, or as deleted. Callers that wait for its exit return.
    pub(crate) fn discard(&self) {
        self.detach();
        self.finish(ExitState::Discarded);
    }

    /// Opens the outputs and starts to copy. If one fails, none stays open.
    pub(crate) async fn attach_outputs(
        &self,
        guest: &Arc<Guest>,
        container: &str,
        namespace: &str,
    ) -> Result<(), StdioError> {
        let (stdout, stderr, loggers) = Outputs::open(&self.stdio, container, namespace).await?.into_parts();
        let start = |sink: Option<_>, kind| {
            sink.map(|sink| Arc::new(Output::start(guest, container, &self.exec_id, kind, sink)))
        };
        let outputs = [start(stdout, StreamKind::STREAM_KIND_STDOUT), start(stderr, StreamKind::STREAM_KIND_STDERR)];
        let mut streams = Streams { outputs, loggers, ..Streams::default() };
        let mut current = self.streams();
        streams.input_closed = current.input_closed;
        std::mem::replace(&mut *current, streams).abort();
        Ok(())
    }

    /// Opens the input, if the process has one, and starts to copy.
    ///
    /// For a container's init process, call it only after the guest has created the task. The client's writes succeed
    /// from then on, and a client whose own input ends with them calls CloseIO at once; containerd must know the task
    /// by then. nerdctl does not retry.
    pub(crate) fn attach_input(&self, guest: &Arc<Guest>, container: &str) -> Result<(), StdioError> {
        if self.stdio.stdin.is_empty() {
            return Ok(());
        }
        let input = Input::start(guest, container, &self.exec_id, &self.stdio.stdin)?;
        let mut streams = self.streams();
        if streams.input_closed {
            input.close();
        }
        streams.input = Some(input);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn attach_fake(&self, output: Output) {
        self.streams().outputs[0] = Some(Arc::new(output));
    }

    /// Stops all copies and the logging programs at once.
    pub(crate) fn detach(&self) {
        std::mem::take(&mut *self.streams()).abort();
    }

    /// Stops all copies and gives the logging programs time to process what they have received.
    pub(crate) async fn finish_output(&self) {
        let mut streams = std::mem::take(&mut *self.streams());
        let loggers = std::mem::take(&mut streams.loggers);
        streams.abort();
        futures::future::join_all(loggers.into_iter().map(Logger::end)).await;
    }

    /// Closes the input after everything that has been written so far.
    pub(crate) fn close_stdin(&self) {
        let mut streams = self.streams();
        streams.input_closed = true;
        if let Some(input) = &streams.input {
            input.close();
        }
    }

    /// The process has exited. This many bytes of its stdout and stderr precede the exit.
    pub(crate) fn expect_output(&self, bytes: [u64; 2]) {
        for (output, bytes) in self.streams().outputs.iter().zip(bytes) {
            if let Some(output) = output {
                output.expect(bytes);
            }
        }
    }

    /// Waits until the output has been delivered or the reader is given up. Returns false if output is missing.
    pub(crate) async fn drained(&self) -> bool {
        self.drained_within(READER_PATIENCE).await
    }

    /// Like [`Self::drained`], with another patience.
    pub(crate) async fn drained_within(&self, patience: Duration) -> bool {
        let outputs = self.streams().outputs.clone();
        let drained = futures::future::join_all(outputs.iter().flatten().map(|output| output.drained(patience)));
        tokio::time::timeout(DELIVERY, drained).await.is_ok_and(|all| all.into_iter().all(|drained| drained))
    }

    /// Records the exit and closes the input, a terminal's when the process is deleted. Only the first call has an effect;
    /// later ones return false.
    pub(crate) fn record_exit(&self, exit: Exit) -> bool {
        let mut streams = self.streams();
        match &streams.input {
            Some(input) if self.stdio.terminal => input.discard(),
            Some(input) => {
                input.abort();
                streams.input = None;
            }
            None => {}
        }
        drop(streams);
        self.finish(ExitState::Exited(exit))
    }

    fn finish(&self, new: ExitState) -> bool {
        self.exit.send_if_modified(|state| {
            let pending = *state == ExitState::Pending;
            if pending {
                *state = new;
            }
            pending
        })
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        lock(&self.streams)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.detach();
    }
}

impl Streams {
    fn abort(self) {
        if let Some(input) = self.input {
            input.abort();
        }
        for output in self.outputs.into_iter().flatten() {
            output.abort();
        }
    }
}
