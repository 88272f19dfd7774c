//! The supervisor agent: a program of the host's that runs beside the containers, in the guest itself, and is started again when it ends. When that
//! is, and when no more, is decided in [`policy`]; its output is kept in [`log`].

mod log;
mod policy;

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::extras::{SUPERVISOR, SUPERVISOR_PID};
use husk_protos::report::SupervisorStatus;
use husk_protos::report::supervisor_status::State;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep};

use crate::cgroup;
use crate::launch::{Program, Terminal, launch};
use crate::reaper::{Exit, Reaper};
use crate::report::Reports;
use crate::spawn::Streams;

use policy::{Event, Policy, RESTARTS_MAX, Step, WINDOW};

/// Memory that reclaim leaves to the agent and what it starts (`memory.min`), bytes. What it does not use, others may.
const MEMORY_MIN: &str = "33554432";
/// After every container's, whose own may be as low as a kubelet's -997, and before PID 1's: an agent that is the leak itself can be killed for it.
const OOM_SCORE_ADJ: &str = "-999";
/// All of its environment.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Time that killed processes may take to go.
const KILL_WAIT: Duration = Duration::from_secs(10);

/// The agent's keeper.
#[derive(Debug)]
pub struct Supervisor {
    stop: watch::Sender<bool>,
    over: watch::Receiver<()>,
}

impl Supervisor {
    /// Starts the agent, and goes on doing so. With `debug`, its output is on the console as well.
    ///
    /// # Errors
    /// When there is nowhere to put its output.
    pub fn start(reaper: Arc<Reaper>, reports: Reports, debug: bool) -> io::Result<Self> {
        let log = log::Log::create()?;
        // One for all of its lives: what one leaves in it is not lost with the next.
        let (pipe, output) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        tokio::spawn(async move {
            if let Err(error) = log::keep(pipe, log, debug).await {
                tracing::error!(%error, "read the supervisor agent's output");
            }
        });
        let (stop, stopping) = watch::channel(false);
        let (alive, over) = watch::channel(());
        let monitor = Monitor { reaper, reports, output, stopping, running: None, last_end: String::new() };
        tokio::spawn(async move {
            monitor.run().await;
            drop(alive);
        });
        Ok(Self { stop, over })
    }

    /// Ends the agent with all that it has started: asks, and then insists.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        // Nothing is ever sent: the sender's end is the news.
        while self.over.clone().changed().await.is_ok() {}
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
        let (mut policy, mut step) = Policy::new();
        while step != Step::Done {
            let event = self.take(step, policy.restarts()).await;
            step = policy.next(event, began.elapsed()).unwrap_or(step);
        }
        self.report(State::STOPPED, policy.restarts(), Duration::ZERO);
    }

    /// Does what is to be done, until something happens.
    async fn take(&mut self, step: Step, restarts: usize) -> Event {
        match step {
            Step::Start if *self.stopping.borrow() => Event::Stop,
            Step::Start => match self.start().await {
                Ok(running) => {
                    self.running = Some(running);
                    Event::Started
                }
                Err(error) => {
                    self.clean_up(format!("could not be started: {error}")).await;
                    Event::StartFailed
                }
            },
            Step::Watch => {
                self.report(State::RUNNING, restarts, Duration::ZERO);
                self.ended_or(stop(self.stopping.clone()), Event::Stop).await
            }
            Step::Wait(wait) => {
                tracing::warn!(restarts, wait_ms = wait.as_millis() as u64, "the supervisor agent {}", self.last_end);
                self.report(State::WAITING, restarts, wait);
                tokio::select! {
                    () = sleep(wait) => Event::Elapsed,
                    () = stop(self.stopping.clone()) => Event::Stop,
                }
            }
            Step::GiveUp => {
                tracing::error!(
                    restarts,
                    "the supervisor agent {}, and is not started again: that was {RESTARTS_MAX} times within {} s",
                    self.last_end,
                    WINDOW.as_secs()
                );
                self.report(State::GAVE_UP, restarts, Duration::ZERO);
                stop(self.stopping.clone()).await;
                Event::Stop
            }
            Step::Terminate(grace) => {
                let pid = self.running.as_ref().map_or(0, |running| running.pid);
                match self.reaper.kill(pid, libc::SIGTERM) {
                    Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                    Err(error) => tracing::error!(%error, "ask the supervisor agent to end"),
                }
                self.ended_or(sleep(grace), Event::Elapsed).await
            }
            Step::Kill => {
                tracing::warn!("the supervisor agent did not end on SIGTERM and is killed");
                if let Err(error) = cgroup::kill(cgroup::SUPERVISOR.as_ref()) {
                    tracing::error!(%error, "kill the supervisor agent");
                }
                self.ended_or(sleep(KILL_WAIT), Event::Ended).await
            }
            Step::Done => Event::Stop,
        }
    }

    /// Waits for the agent's end, or for something else.
    async fn ended_or(&mut self, other: impl Future<Output = ()>, otherwise: Event) -> Event {
        let Some(running) = &mut self.running else { return Event::Ended };
        let exit = tokio::select! {
            biased;
            exit = &mut running.exit => exit,
            () = other => return otherwise,
        };
        let how = exit.map_or_else(|_| "has ended".to_owned(), |exit| format!("ended with status {}", exit.status));
        self.clean_up(how).await;
        Event::Ended
    }

    async fn start(&self) -> io::Result<Running> {
        let named = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"));
        // Whatever mode it was given: an agent that cannot be executed is of no use to anybody.
        fs::set_permissions(SUPERVISOR, Permissions::from_mode(0o755)).map_err(|e| named(SUPERVISOR, e))?;
        cgroup::make_protected(cgroup::SUPERVISOR, MEMORY_MIN).map_err(|e| named("make its cgroup", e))?;
        let program = Program {
            args: &[SUPERVISOR.to_owned()],
            env: &[PATH.to_owned()],
            cwd: "/",
            group: cgroup::SUPERVISOR.as_ref(),
            oom_score_adj: OOM_SCORE_ADJ,
            terminal: Terminal::None,
        };
        let output = || self.output.try_clone().map(Some);
        let streams = Streams { stdout: output()?, stderr: output()?, ..Default::default() };
        let (pid, exit) = launch(&self.reaper, &program, streams).await.map_err(io::Error::other)?;
        // Without it the agent runs as well.
        if let Err(error) = write_pid(pid) {
            tracing::error!(%error, "write {SUPERVISOR_PID}");
        }
        Ok(Running { pid, exit })
    }

    /// It does not run any more, and neither does what it has left behind.
    async fn clean_up(&mut self, how: String) {
        self.running = None;
        self.last_end = how;
        match fs::remove_file(SUPERVISOR_PID) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::error!(%error, "remove {SUPERVISOR_PID}"),
            _ => {}
        }
        if let Err(error) = cgroup::remove(cgroup::SUPERVISOR.as_ref(), KILL_WAIT).await {
            tracing::error!(%error, "end what the supervisor agent has left behind");
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

/// Comes back when the guest ends.
async fn stop(mut stopping: watch::Receiver<bool>) {
    // An error says that the keeper is gone, and so is the guest.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// As a whole or not at all: whoever looks for it may do so at any moment.
fn write_pid(pid: i32) -> io::Result<()> {
    let beside = Path::new(SUPERVISOR_PID).with_extension("new");
    fs::write(&beside, format!("{pid}\n"))?;
    fs::rename(beside, SUPERVISOR_PID)
}
