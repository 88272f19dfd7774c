//! Processes that an operator starts in the guest itself. A process ends together with its children.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use nix::errno::Errno;
use tokio::sync::watch;
use tokio::time::timeout;

use super::environment::environment;
use crate::cgroup;
use crate::error::{CallError, FailureKind};
use crate::io::{ProcessStreams, Size, StreamSet, Streams, TerminalSpec, terminal_pair};
use crate::launch::{ControllingTerminal, Program, launch};
use crate::reaper::{Exit, Reaper};
use crate::spawn::ChildStreams;

/// Time for a process with a terminal to exit after the hang-up.
const HANG_UP: Duration = Duration::from_secs(2);
/// Time for processes to exit after SIGKILL.
const KILL: Duration = Duration::from_secs(5);
/// The container ID under which the streams of these processes are registered.
const NO_CONTAINER: &str = "";

/// A process to start.
#[derive(Debug)]
pub(super) struct ProcessSpec {
    /// The program and its arguments.
    pub(super) args: Vec<String>,
    /// Additions to the default environment.
    pub(super) env: Vec<String>,
    /// Working directory; `/` when empty.
    pub(super) cwd: String,
    /// Size of its terminal, if it gets one.
    pub(super) terminal: Option<Size>,
    /// Whether it gets a stdin. A terminal always includes one.
    pub(super) stdin: bool,
}

#[derive(Debug)]
struct Process {
    pid: i32,
    group: PathBuf,
    terminal: bool,
    streams: Arc<ProcessStreams>,
    exit: watch::Receiver<Option<Exit>>,
}

/// All processes, by ID.
#[derive(Debug)]
pub(super) struct Processes {
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    next: AtomicU64,
    table: Mutex<HashMap<String, Arc<Process>>>,
}

impl Processes {
    /// Registers the streams of the processes in `streams`.
    pub(super) fn new(reaper: Arc<Reaper>, streams: Arc<Streams>) -> Self {
        Self { reaper, streams, next: AtomicU64::new(1), table: Mutex::default() }
    }

    /// Starts a process and returns its ID and PID.
    ///
    /// # Errors
    /// Those of [`launch`].
    pub(super) async fn start(&self, spec: ProcessSpec) -> Result<(String, i32), CallError> {
        if spec.args.is_empty() {
            return Err(CallError::new(FailureKind::InvalidArgument, "args must name a program"));
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let group = Path::new(cgroup::DEBUG).join(format!("exec-{id}"));
        std::fs::create_dir(&group).map_err(|e| CallError::internal("create a process's cgroup", &e))?;
        match self.start_in(&group, &spec).await {
            Ok((process, exit)) => {
                let pid = process.pid;
                self.streams.add(NO_CONTAINER, &id, process.streams.clone());
                self.table().insert(id.clone(), process.clone());
                tokio::spawn(await_exit(process, exit));
                Ok((id, pid))
            }
            Err(error) => {
                remove(&group).await;
                Err(error)
            }
        }
    }

    async fn start_in(&self, group: &Path, spec: &ProcessSpec) -> Result<(Arc<Process>, ExitRelay), CallError> {
        let failed = |e: std::io::Error| CallError::internal("create a process's streams", &e);
        let pipes = StreamSet { stdin: spec.stdin, stdout: true, stderr: true };
        let (streams, ends) = match spec.terminal {
            None => ProcessStreams::new(pipes).map_err(failed)?,
            Some(size) => {
                let streams = ProcessStreams::terminal();
                let (master, peer) = terminal_pair().map_err(failed)?;
                let open = StreamSet { stdin: true, stdout: true, stderr: false };
                streams.open_terminal(master, TerminalSpec { size: Some(size), owner: 0 }, open).map_err(failed)?;
                let copy = || peer.try_clone().map(Some).map_err(failed);
                let ends = ChildStreams { stdin: copy()?, stdout: copy()?, stderr: Some(peer), gate: None };
                (streams, ends)
            }
        };
        let terminal = spec.terminal.is_some();
        let program = Program {
            args: &spec.args,
            env: &environment(&spec.env),
            cwd: if spec.cwd.is_empty() { "/" } else { &spec.cwd },
            group,
            oom_score_adj: "0",
            terminal: if terminal { ControllingTerminal::Stdin } else { ControllingTerminal::None },
        };
        let (pid, reaped) = launch(&self.reaper, &program, ends).await?;
        let (finished, exit) = watch::channel(None);
        let process = Process { pid, group: group.to_owned(), terminal, streams, exit };
        Ok((Arc::new(process), ExitRelay { reaped, finished }))
    }

    /// Waits for the exit of the process and its children, and returns its exit status.
    ///
    /// # Errors
    /// NotFound.
    pub(super) async fn wait(&self, id: &str) -> Result<u32, CallError> {
        let mut exit = self.find(id)?.exit.clone();
        let exited = exit.wait_for(Option::is_some).await;
        let status = exited.ok().and_then(|exit| exit.map(|exit| exit.status));
        status.ok_or_else(|| CallError::new(FailureKind::Internal, format!("the exit of process {id} is unknown")))
    }

    /// # Errors
    /// NotFound.
    pub(super) fn resize(&self, id: &str, size: Size) -> Result<(), CallError> {
        let process = self.find(id)?;
        process
            .streams
            .resize(size)
            .map_err(|e| CallError::internal(format_args!("resize the terminal of process {id}"), &e))
    }

    /// Sends a signal to the process group.
    ///
    /// # Errors
    /// NotFound, also after the exit; InvalidArgument for an invalid signal number.
    pub(super) fn signal(&self, id: &str, signal: u32) -> Result<(), CallError> {
        let process = self.find(id)?;
        // 0 sends no signal, and 64 is the last one (signal(7)).
        let signal = i32::try_from(signal).ok().filter(|signal| (1..=64).contains(signal));
        let signal = signal.ok_or_else(|| CallError::new(FailureKind::InvalidArgument, "signal must be 1 to 64"))?;
        match self.reaper.kill_group(process.pid, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(CallError::new(FailureKind::NotFound, format!("process {id} has exited"))),
            Err(error) => Err(CallError::internal(format_args!("send signal {signal} to process {id}"), &error)),
        }
    }

    /// Removes a process, and ends it if it still runs.
    ///
    /// # Errors
    /// DeadlineExceeded when it survives SIGKILL.
    pub(super) async fn end(&self, id: &str) -> Result<(), CallError> {
        let Some(process) = self.table().remove(id) else { return Ok(()) };
        self.streams.remove(NO_CONTAINER, id);
        let mut exit = process.exit.clone();
        if process.terminal && exit.borrow().is_none() {
            // Send what a hang-up of the terminal sends. A real hang-up would have to wait for clients that are still
            // attached. SIGCONT: a stopped process does not handle SIGHUP.
            for signal in [libc::SIGHUP, libc::SIGCONT] {
                // Fails when the process has just exited.
                let _ = self.reaper.kill_group(process.pid, signal);
            }
            if timeout(HANG_UP, exit.wait_for(Option::is_some)).await.is_ok() {
                return Ok(());
            }
        }
        cgroup::kill(&process.group).map_err(|e| CallError::internal(format_args!("kill process {id}"), &e))?;
        match timeout(KILL + KILL, exit.wait_for(Option::is_some)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(CallError::new(
                FailureKind::DeadlineExceeded,
                format!("process {id} still runs {:?} after SIGKILL", KILL + KILL),
            )),
        }
    }

    fn find(&self, id: &str) -> Result<Arc<Process>, CallError> {
        let found = self.table().get(id).cloned();
        found.ok_or_else(|| CallError::new(FailureKind::NotFound, format!("no process {id:?}")))
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        lock(&self.table)
    }
}

/// Passes a process's exit on from the reaper to those who wait for it.
struct ExitRelay {
    reaped: tokio::sync::oneshot::Receiver<Exit>,
    finished: watch::Sender<Option<Exit>>,
}

/// Waits for a process's exit and kills its remaining children before it announces the exit: an operator's command that
/// has ended must not keep running.
async fn await_exit(process: Arc<Process>, exit: ExitRelay) {
    // Cannot fail: the reaper lives as long as the guest and delivers every exit.
    let Ok(reaped) = exit.reaped.await else { return };
    process.streams.exited();
    remove(&process.group).await;
    exit.finished.send_replace(Some(reaped));
}

async fn remove(group: &Path) {
    if let Err(error) = cgroup::remove(group, KILL).await {
        tracing::warn!(error = %Chain(&error), "failed to remove a process's cgroup");
    }
}
