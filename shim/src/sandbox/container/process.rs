//! One process of a container as the shim keeps it: its streams, and its exit once it is known.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::stdio::StreamKind;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::guest::client::Guest;
use crate::stdio::{Input, Logger, Output, Outputs, Stdio, StdioError};

/// How long output may stand still before an exit is reported without it. A reader who takes anything at all within this time gets
/// everything before the exit is reported.
const READER_PATIENCE: Duration = Duration::from_secs(5);
/// How long an exit waits for output in all, for a reader who takes some now and then: when the process is gone, what is on its way to him is
/// about a megabyte at most, so this is one who takes less than some 100 KiB a second. He still gets everything, only not before the exit.
pub(super) const DELIVERY: Duration = Duration::from_secs(9);

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Exit {
    /// 0..255, or 128 and the signal's number.
    pub status: u32,
    /// When.
    pub at: Timestamp,
}

/// What is known of a process's end.
#[derive(Debug, Clone, PartialEq)]
enum End {
    /// Nothing yet.
    Open,
    /// How it was.
    Exited(Exit),
    /// There will be none: the process never came to be.
    Forgotten,
}

/// One process: a container's init, or an exec.
#[derive(Debug)]
pub struct Process {
    /// Empty for the init.
    pub exec_id: String,
    /// As containerd asked for.
    pub stdio: Stdio,
    pid: AtomicU32,
    starting: AtomicBool,
    /// Its end has been reported, and will be recorded.
    ending: AtomicBool,
    /// Whether containerd has been told that it was added.
    announced: watch::Sender<bool>,
    end: watch::Sender<End>,
    streams: Mutex<Streams>,
}

#[derive(Debug, Default)]
struct Streams {
    input: Option<Input>,
    outputs: Vec<Arc<Output>>,
    loggers: Vec<Logger>,
    /// A client has closed the input, perhaps before it was there: one whose own ends early asks for it before the start.
    input_closed: bool,
}

impl Process {
    /// A process that does not run yet.
    pub fn new(exec_id: &str, stdio: Stdio) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            pid: AtomicU32::new(0),
            starting: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            announced: watch::channel(false).0,
            end: watch::channel(End::Open).0,
            streams: Mutex::default(),
        }
    }

    /// Its pid in the guest; 0 before it has one.
    pub fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Its pid is known now. The first one counts: a process has one all its life.
    pub fn set_pid(&self, pid: u32) {
        // An error is that it is known already.
        let _ = self.pid.compare_exchange(0, pid, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Whether the caller is the one who starts it, and opens its streams.
    pub fn take_start(&self) -> bool {
        !self.starting.swap(true, Ordering::Relaxed)
    }

    /// Its start has failed.
    pub fn give_start_back(&self) {
        self.starting.store(false, Ordering::Relaxed);
    }

    /// Whether the caller is the first who reports its end, and sees to its record.
    pub fn take_end(&self) -> bool {
        !self.ending.swap(true, Ordering::Relaxed)
    }

    /// containerd has been told that it was added.
    pub fn announce(&self) {
        self.announced.send_replace(true);
    }

    /// Waits until containerd has been told that it was added.
    pub async fn announced(&self) {
        // The sender is in self, so it cannot be gone.
        let _ = self.announced.subscribe().wait_for(|announced| *announced).await;
    }

    /// Its exit, if it is known.
    pub fn exit(&self) -> Option<Exit> {
        match &*self.end.borrow() {
            End::Exited(exit) => Some(exit.clone()),
            End::Open | End::Forgotten => None,
        }
    }

    /// Waits for its exit, as long as it takes. None if the process was forgotten instead.
    pub async fn exited(&self) -> Option<Exit> {
        let mut end = self.end.subscribe();
        match end.wait_for(|end| *end != End::Open).await.as_deref() {
            Ok(End::Exited(exit)) => Some(exit.clone()),
            Ok(End::Open | End::Forgotten) | Err(_) => None,
        }
    }

    /// It never came to be: whoever waits for its exit shall not any longer.
    pub fn forget(&self) {
        self.detach();
        self.finish(End::Forgotten);
    }

    /// Opens its outputs and begins to copy. On an error none is left open.
    pub async fn attach_outputs(&self, guest: &Arc<Guest>, container: &str, namespace: &str) -> Result<(), StdioError> {
        let (stdout, stderr, loggers) = Outputs::open(&self.stdio, container, namespace).await?.into_parts();
        let mut streams = Streams { loggers, ..Streams::default() };
        for (sink, kind) in [(stdout, StreamKind::STREAM_KIND_STDOUT), (stderr, StreamKind::STREAM_KIND_STDERR)] {
            let output = sink.map(|sink| Output::start(guest, container, &self.exec_id, kind, sink));
            streams.outputs.extend(output.map(Arc::new));
        }
        let mut place = self.streams();
        streams.input_closed = place.input_closed;
        std::mem::replace(&mut *place, streams).abort();
        Ok(())
    }

    /// Opens its input, if it is to have any, and begins to copy.
    ///
    /// For a container's init only when the guest has it: a client's write goes through from here on, and one whose own input ends with it asks
    /// containerd at once to close this one, which must know of the task by then. nerdctl does not ask twice.
    pub fn attach_input(&self, guest: &Arc<Guest>, container: &str) -> Result<(), StdioError> {
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
    pub(super) fn attach_pretended(&self, output: Output) {
        self.streams().outputs.push(Arc::new(output));
    }

    /// Ends all copies at once, and the logging programs with them.
    pub fn detach(&self) {
        std::mem::take(&mut *self.streams()).abort();
    }

    /// Ends all copies, and gives the logging programs the time to deal with what they have got.
    pub async fn finish_output(&self) {
        let mut streams = std::mem::take(&mut *self.streams());
        let loggers = std::mem::take(&mut streams.loggers);
        streams.abort();
        futures::future::join_all(loggers.into_iter().map(Logger::end)).await;
    }

    /// Its input ends after what has been written so far.
    pub fn close_stdin(&self) {
        let mut streams = self.streams();
        streams.input_closed = true;
        if let Some(input) = &streams.input {
            input.close();
        }
    }

    /// Waits until its output has been delivered, or nobody takes it. False if some of it was not.
    pub async fn drained(&self) -> bool {
        let outputs = self.streams().outputs.clone();
        let drained = futures::future::join_all(outputs.iter().map(|output| output.drained(READER_PATIENCE)));
        tokio::time::timeout(DELIVERY, drained).await.is_ok_and(|all| all.into_iter().all(|drained| drained))
    }

    /// Records its exit; the first record counts. Its input ends here.
    pub fn record_exit(&self, exit: Exit) -> bool {
        if let Some(input) = self.streams().input.take() {
            input.abort();
        }
        self.finish(End::Exited(exit))
    }

    fn finish(&self, how: End) -> bool {
        self.end.send_if_modified(|end| {
            let open = *end == End::Open;
            if open {
                *end = how;
            }
            open
        })
    }

    fn streams(&self) -> std::sync::MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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
        for output in self.outputs {
            output.abort();
        }
    }
}
