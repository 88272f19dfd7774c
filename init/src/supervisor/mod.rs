//! The supervisor agent: a program that the host adds to the guest. It runs beside the containers and is restarted when
//! it exits. [`policy`] decides when; [`log`] stores its output.

mod log;
mod policy;

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::extras::{SUPERVISOR, SUPERVISOR_PID};
use husk_protos::report::SupervisorStatus;
use husk_protos::report::supervisor_status::State;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep};

use crate::cgroup;
use crate::fd::set_nonblocking;
use crate::launch::{ControllingTerminal, Program, launch};
use crate::reaper::{Exit, Reaper};
use crate::report::Reports;
use crate::spawn::ChildStreams;

use policy::{Action, AgentEvent, Policy, RESTARTS_MAX, WINDOW};

/// Memory of the agent and its children that reclaim does not touch (`memory.min`), bytes. Unused memory stays
/// available to others.
const MEMORY_MIN: &str = "33554432";
/// The agent is killed after all containers, whose value may be as low as a kubelet's -997, but before PID 1: it may be
/// what leaks.
const OOM_SCORE_ADJ: &str = "-999";
/// The agent's complete environment.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Time for killed processes to exit.
const KILL_WAIT: Duration = Duration::from_secs(10);

/// Runs the agent.
#[derive(Debug)]
pub(crate) struct Supervisor {
    stop: watch::Sender<bool>,
    finished: watch::Receiver<()>,
}

impl Supervisor {
    /// Starts the agent and keeps it running. In debug mode, its output also goes to the console.
    ///
    /// # Errors
    /// When the log file or the output pipe cannot be created.
    pub(crate) fn start(reaper: Arc<Reaper>, reports: Reports, debug: bool) -> io::Result<Self> {
        let log = log::LogFile::create()?;
        // All runs share one pipe: output that is still in it at an exit is not lost.
        let (pipe, output) = pipe2(OFlag::O_CLOEXEC)?;
        set_nonblocking(&pipe)?;
        tokio::spawn(async move {
            if let Err(error) = log::copy(pipe, log, debug).await {
                tracing::error!(error = %Chain(&error), "failed to read the supervisor agent's output");
            }
        });
        let (stop, stopping) = watch::channel(false);
        let (running, finished) = watch::channel(());
        let monitor = Monitor { reaper, reports, output, stopping, running: None, last_end: String::new() };
        tokio::spawn(async move {
            monitor.run().await;
            drop(running);
        });
        Ok(Self { stop, finished })
    }

    /// Terminates the agent and its children, and kills those that remain.
    pub(crate) async fn stop(&self) {
        self.stop.send_replace(true);
        // Nothing is ever sent: dropping the sender is the signal.
        while self.finished.clone().changed().await.is_ok() {}
    }
}

struct Running {
    pid: i32,
    exit: oneshot::Receiver<Exit>,
}

struct Monitor {
    reaper: Arc<Reaper>,
    reports: Reports,
    output: OwnedFd,
    stopping: watch::Receiver<bool>,
    running: Option<Running>,
    last_end: String,
}

impl Monitor {
    async fn run(mut self) {
        let began = Instant::now();
        let (mut policy, mut action) = Policy::new();
        while action != Action::Finish {
            let event = self.perform(action, policy.restarts()).await;
            action = policy.next(event, began.elapsed()).unwrap_or(action);
        }
        self.report(State::STOPPED, policy.restarts(), Duration::ZERO);
    }

    /// Performs an action and returns the event that ends it.
    async fn perform(&mut self, action: Action, restarts: usize) -> AgentEvent {
        match action {
            Action::Start if *self.stopping.borrow() => AgentEvent::Stop,
            Action::Start => match self.start().await {
                Ok(running) => {
                    self.running = Some(running);
                    AgentEvent::Started
                }
                Err(error) => {
                    self.clean_up(format!("failed to start: {}", Chain(&error))).await;
                    AgentEvent::StartFailed
                }
            },
            Action::Watch => {
                self.report(State::RUNNING, restarts, Duration::ZERO);
                self.exit_or(stopped(self.stopping.clone()), AgentEvent::Stop).await
            }
            Action::Pause(pause) => {
                tracing::warn!(restarts, wait_ms = pause.as_millis() as u64, "the supervisor agent {}", self.last_end);
                self.report(State::WAITING, restarts, pause);
                tokio::select! {
                    () = sleep(pause) => AgentEvent::Elapsed,
                    () = stopped(self.stopping.clone()) => AgentEvent::Stop,
                }
            }
            Action::GiveUp => {
                tracing::error!(
                    restarts,
                    "the supervisor agent {}; giving up after {RESTARTS_MAX} restarts within {} s",
                    self.last_end,
                    WINDOW.as_secs()
                );
                self.report(State::GAVE_UP, restarts, Duration::ZERO);
                stopped(self.stopping.clone()).await;
                AgentEvent::Stop
            }
            Action::Terminate(grace) => {
                let pid = self.running.as_ref().map_or(0, |running| running.pid);
                match self.reaper.kill(pid, libc::SIGTERM) {
                    Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                    Err(error) => tracing::error!(%error, "failed to send SIGTERM to the supervisor agent"),
                }
                self.exit_or(sleep(grace), AgentEvent::Elapsed).await
            }
            Action::Kill => {
                tracing::warn!("the supervisor agent did not exit on SIGTERM; killing it");
                if let Err(error) = cgroup::kill(cgroup::SUPERVISOR.as_ref()) {
                    tracing::error!(error = %Chain(&error), "failed to kill the supervisor agent");
                }
                self.exit_or(sleep(KILL_WAIT), AgentEvent::Exited).await
            }
            Action::Finish => AgentEvent::Stop,
        }
    }

    /// Waits for the agent's exit. If `other` finishes first, returns `event`.
    async fn exit_or(&mut self, other: impl Future<Output = ()>, event: AgentEvent) -> AgentEvent {
        let Some(running) = &mut self.running else { return AgentEvent::Exited };
        let exit = tokio::select! {
            biased;
            exit = &mut running.exit => exit,
            () = other => return event,
        };
        let how = exit.map_or_else(|_| "exited".to_owned(), |exit| format!("exited with status {}", exit.status));
        self.clean_up(how).await;
        AgentEvent::Exited
    }

    async fn start(&self) -> io::Result<Running> {
        let named = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("{what}: {}", Chain(&e)));
        // Regardless of the mode in the extras: an agent that is not executable is useless.
        fs::set_permissions(SUPERVISOR, Permissions::from_mode(0o755)).map_err(|e| named(SUPERVISOR, e))?;
        cgroup::make_protected(cgroup::SUPERVISOR, MEMORY_MIN).map_err(|e| named("create its cgroup", e))?;
        let program = Program {
            args: &[SUPERVISOR.to_owned()],
            env: &[PATH.to_owned()],
            cwd: "/",
            group: cgroup::SUPERVISOR.as_ref(),
            oom_score_adj: OOM_SCORE_ADJ,
            terminal: ControllingTerminal::None,
        };
        let output = || self.output.try_clone().map(Some);
        let streams = ChildStreams { stdout: output()?, stderr: output()?, ..Default::default() };
        let (pid, exit) = launch(&self.reaper, &program, streams).await.map_err(io::Error::other)?;
        // Not fatal: the agent runs without the file.
        if let Err(error) = write_pid(pid) {
            tracing::error!(error = %Chain(&error), "failed to write {SUPERVISOR_PID}");
        }
        Ok(Running { pid, exit })
    }

    /// Records how the agent ended, and removes its PID file and the processes that it has left behind.
    async fn clean_up(&mut self, how: String) {
        self.running = None;
        self.last_end = how;
        match fs::remove_file(SUPERVISOR_PID) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(error = %Chain(&error), "failed to remove {SUPERVISOR_PID}");
            }
            _ => {}
        }
        if let Err(error) = cgroup::remove(cgroup::SUPERVISOR.as_ref(), KILL_WAIT).await {
            tracing::error!(error = %Chain(&error), "failed to kill the supervisor agent's remaining processes");
        }
    }

    fn report(&self, state: State, restarts: usize, wait: Duration) {
        self.reports.supervisor(SupervisorStatus {
            state: state.into(),
            pid: self.running.as_ref().map_or(0, |running| running.pid as u32),
            restarts: restarts as u32,
            last_end: self.last_end.clone(),
            wait_ms: wait.as_millis() as u64,
            ..Default::default()
        });
    }
}

/// Returns when the guest shuts down.
async fn stopped(mut stopping: watch::Receiver<bool>) {
    // An error means that the Supervisor is gone, and with it the guest.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Writes the PID file atomically: others may read it at any moment.
fn write_pid(pid: i32) -> io::Result<()> {
    let temporary = Path::new(SUPERVISOR_PID).with_extension("new");
    fs::write(&temporary, format!("{pid}\n"))?;
    fs::rename(temporary, SUPERVISOR_PID)
}
