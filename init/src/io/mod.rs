//! The standard streams of processes: pipes or a terminal, and the clients attached to them.
//!
//! A stream has at most one client at a time; a second one is rejected while the first one's connection lives. When a
//! client disconnects, the pipe stays open and buffers the process's output up to its capacity. The next client
//! continues there.

mod input;
mod output;
pub(crate) mod raw;
pub(crate) mod service;
mod slot;
mod terminal;

pub(crate) use terminal::{Size, TerminalSpec, pair as terminal_pair};

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::connections::Connections;
use husk_protos::lock::lock;
use husk_protos::streams::PIPE_SIZE;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::error::{CallError, FailureKind};
use crate::spawn::ChildStreams;
use slot::Slot;

/// Time for the process of an open stream to appear: longer than a worker may take to create it.
const PROCESS_WAIT: Duration = Duration::from_secs(60);

/// The streams that a process has. The others are /dev/null.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamSet {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
}

/// PID 1's ends of a process's streams.
#[derive(Debug)]
pub(crate) struct ProcessStreams {
    stdin: Slot,
    stdout: Slot,
    stderr: Slot,
    terminal: Option<terminal::Terminal>,
    exited: watch::Sender<bool>,
}

impl ProcessStreams {
    /// Creates the pipes. Returns PID 1's ends and the process's ends.
    ///
    /// # Errors
    /// When descriptors run out.
    pub(crate) fn new(set: StreamSet) -> io::Result<(Arc<Self>, ChildStreams)> {
        let mut theirs = ChildStreams::default();
        let (mut stdin, mut stdout, mut stderr) = (Slot::absent(), Slot::absent(), Slot::absent());
        if set.stdin {
            let (read, write) = pipe()?;
            (stdin, theirs.stdin) = (Slot::idle(write)?, Some(read));
        }
        for (present, ours, theirs) in
            [(set.stdout, &mut stdout, &mut theirs.stdout), (set.stderr, &mut stderr, &mut theirs.stderr)]
        {
            if present {
                let (read, write) = pipe()?;
                (*ours, *theirs) = (Slot::idle(read)?, Some(write));
            }
        }
        let exited = watch::Sender::new(false);
        Ok((Arc::new(Self { stdin, stdout, stderr, terminal: None, exited }), theirs))
    }

    /// Streams for a process with a terminal, which [`Self::open_terminal`] opens.
    pub(crate) fn terminal() -> Arc<Self> {
        let [stdin, stdout, stderr] = [(); 3].map(|()| Slot::absent());
        let terminal = Some(terminal::Terminal::default());
        Arc::new(Self { stdin, stdout, stderr, terminal, exited: watch::Sender::new(false) })
    }

    /// Opens the terminal with the master of its pty. The streams in `set` use copies of the master.
    ///
    /// # Errors
    /// When descriptors run out, or `master` is not a pty.
    pub(crate) fn open_terminal(&self, master: OwnedFd, spec: TerminalSpec, set: StreamSet) -> io::Result<()> {
        let Some(terminal) = &self.terminal else { return Err(io::ErrorKind::InvalidInput.into()) };
        for (slot, present) in [(&self.stdin, set.stdin), (&self.stdout, set.stdout)] {
            if present {
                slot.open(master.try_clone()?)?;
            }
        }
        terminal.open(master, spec)
    }

    /// Sets the size of the terminal, if there is one.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(crate) fn resize(&self, size: Size) -> io::Result<()> {
        self.terminal.as_ref().map_or(Ok(()), |terminal| terminal.resize(size))
    }

    /// Records that the process has exited: its pipes now contain the rest of its output.
    pub(crate) fn exited(&self) {
        for output in [&self.stdout, &self.stderr] {
            output.exited(self.terminal.is_some());
        }
        self.exited.send_replace(true);
    }

    /// How many bytes of stdout and stderr their clients have when they have all that the process wrote before its exit.
    pub(crate) fn bytes_at_exit(&self) -> [u64; 2] {
        [&self.stdout, &self.stderr].map(Slot::at_exit)
    }

    /// Closes stdin, once no client is attached to it. Idempotent.
    pub(crate) fn close_stdin(&self) {
        self.stdin.close();
    }
}

/// A pipe with room for what one system call moves.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE as i32))?;
    Ok((read, write))
}

/// The streams of all processes, by container ID and exec ID.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    table: Mutex<HashMap<(String, String), Arc<ProcessStreams>>>,
    added: Notify,
    /// The host's. It closes one when it has everything that it wants from there.
    pub(crate) connections: Connections,
}

impl Streams {
    /// Adds a process's streams and wakes the clients that wait for them.
    pub(crate) fn add(&self, container: &str, exec: &str, streams: Arc<ProcessStreams>) {
        self.table().insert((container.into(), exec.into()), streams);
        self.added.notify_waiters();
    }

    /// Removes a process's streams. Attached clients continue to the end.
    pub(crate) fn remove(&self, container: &str, exec: &str) {
        self.table().remove(&(container.into(), exec.into()));
    }

    /// Returns the streams of a process. Waits for a process that is still being created.
    ///
    /// # Errors
    /// NotFound when the process does not appear within [`PROCESS_WAIT`].
    pub(crate) async fn find(&self, container: &str, exec: &str) -> Result<Arc<ProcessStreams>, CallError> {
        let key = (container.to_owned(), exec.to_owned());
        let found = async {
            loop {
                // Register before checking: a process added in between would be missed.
                let added = self.added.notified();
                if let Some(streams) = self.table().get(&key) {
                    return streams.clone();
                }
                added.await;
            }
        };
        timeout(PROCESS_WAIT, found).await.map_err(|_| {
            let what = if exec.is_empty() { container.to_owned() } else { format!("{exec} in {container}") };
            CallError::new(FailureKind::NotFound, format!("{what} did not appear within {PROCESS_WAIT:?}"))
        })
    }

    fn table(&self) -> MutexGuard<'_, HashMap<(String, String), Arc<ProcessStreams>>> {
        lock(&self.table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_may_be_opened_before_its_process_exists() {
        let streams = Arc::new(Streams::default());
        let waiting = tokio::spawn({
            let streams = streams.clone();
            async move { streams.find("c", "e").await.map(drop) }
        });
        tokio::task::yield_now().await;
        let (ours, _theirs) = ProcessStreams::new(StreamSet::default()).unwrap();
        streams.add("c", "", ours.clone());
        streams.add("c", "e", ours);
        assert_eq!(waiting.await.unwrap(), Ok(()));
        assert_eq!(streams.find("c", "other").await.unwrap_err().kind, FailureKind::NotFound);
    }
}
