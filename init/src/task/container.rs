//! A container: its init, its execs, and the order in which their exits are reported.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::lock::lock;
use tokio::sync::watch;
use tokio::time::timeout;

use super::process::{Process, ProcessState};
use crate::cgroup::oom::Kills;
use crate::error::{CallError, FailureKind};
use crate::worker::Created;
use crate::{cgroup, paths};

/// How long the init's exit waits for execs that are not reaped yet. The kernel has already killed them.
const EXEC_EXITS_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// As in the Create request.
    pub(crate) terminal: bool,
    pub(crate) init: Arc<Process>,
    /// Whether the kernel kills all of the container's processes when its init exits.
    pub(crate) own_pid_namespace: bool,
    /// Whether the start runs hooks and therefore needs a worker.
    pub(crate) start_hooks: bool,
    /// Whether the deletion runs hooks and therefore needs a worker.
    pub(crate) poststop_hooks: bool,
    pub(crate) oom_kills: Kills,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    activity: watch::Sender<Activity>,
}

/// The conditions that a pause, an exec and the init's exit wait for.
#[derive(Debug, Default, Clone, Copy)]
struct Activity {
    /// Execs that are starting or running. They delay the report of the init's exit.
    execs: usize,
    /// Execs that are starting. They delay a freeze, which would stop them halfway.
    starting: usize,
    /// The init has exited: no exec may begin.
    init_exited: bool,
    freezer: FreezerState,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FreezerState {
    #[default]
    Thawed,
    Freezing,
    Frozen,
    Thawing,
}

impl FreezerState {
    /// The state's name in error messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Thawed => "running",
            Self::Freezing => "being paused",
            Self::Frozen => "paused",
            Self::Thawing => "being resumed",
        }
    }
}

impl Container {
    pub(crate) fn new(init: Arc<Process>, created: &Created, oom_kills: Kills) -> Arc<Self> {
        Arc::new(Self {
            id: init.container.clone(),
            terminal: init.stdio.terminal,
            init,
            own_pid_namespace: created.own_pid_namespace,
            start_hooks: created.start_hooks,
            poststop_hooks: created.poststop_hooks,
            oom_kills,
            execs: Mutex::default(),
            activity: watch::Sender::default(),
        })
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        paths::bundle(&self.id)
    }

    pub(crate) fn cgroup(&self) -> PathBuf {
        cgroup::of(&self.id)
    }

    /// Looks up a process; the empty ID is the init.
    pub(crate) fn process(&self, exec: &str) -> Result<Arc<Process>, CallError> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs().get(exec).cloned().ok_or_else(|| {
            CallError::new(FailureKind::NotFound, format!("process {exec} does not exist in {}", self.id))
        })
    }

    pub(crate) fn add_exec(&self, process: Arc<Process>) -> Result<(), CallError> {
        let mut execs = self.execs();
        if execs.contains_key(&process.exec) {
            let what = format!("exec {} already exists in {}", process.exec, self.id);
            return Err(CallError::new(FailureKind::AlreadyExists, what));
        }
        execs.insert(process.exec.clone(), process);
        Ok(())
    }

    pub(crate) fn remove_exec(&self, exec: &str) {
        self.execs().remove(exec);
    }

    pub(crate) fn all_execs(&self) -> Vec<Arc<Process>> {
        self.execs().values().cloned().collect()
    }

    pub(crate) fn freezer(&self) -> FreezerState {
        self.activity.borrow().freezer
    }

    /// Moves the freezer from one state to the next. Fails with FailedPrecondition if it is in another state than
    /// `from`.
    pub(crate) fn set_freezer(&self, verb: &str, from: FreezerState, to: FreezerState) -> Result<(), CallError> {
        let mut previous = from;
        self.activity.send_if_modified(|activity| {
            previous = activity.freezer;
            let matches = previous == from;
            if matches {
                activity.freezer = to;
            }
            matches
        });
        if previous == from { Ok(()) } else { Err(self.wrong_state(verb, previous.name())) }
    }

    pub(crate) async fn wait_for_starting_execs(&self) {
        // Cannot fail: self owns the sender.
        let _ = self.activity.subscribe().wait_for(|activity| activity.starting == 0).await;
    }

    /// Fails with FailedPrecondition unless the container is running and not paused.
    pub(crate) fn require_running(&self, verb: &str) -> Result<(), CallError> {
        let state = self.init.state();
        match self.freezer() {
            FreezerState::Thawed if matches!(state, ProcessState::Running { .. }) => Ok(()),
            freezer if matches!(state, ProcessState::Running { .. }) => Err(self.wrong_state(verb, freezer.name())),
            _ => Err(self.wrong_state(verb, state.name())),
        }
    }

    /// Fails with FailedPrecondition if the init has exited.
    pub(crate) fn require_not_stopped(&self, verb: &str) -> Result<(), CallError> {
        match self.init.state() {
            state @ (ProcessState::Stopped { .. } | ProcessState::Deleted) => Err(self.wrong_state(verb, state.name())),
            _ => Ok(()),
        }
    }

    fn wrong_state(&self, verb: &str, state: &str) -> CallError {
        CallError::new(FailureKind::FailedPrecondition, format!("cannot {verb} {}: it is {state}", self.id))
    }

    /// Registers an exec before its start: its exit, and with it the init's, may arrive before the reply to the start.
    /// Fails with FailedPrecondition if the init has exited or the container is paused.
    pub(crate) fn begin_exec(self: &Arc<Self>) -> Result<ActiveExec, CallError> {
        let mut conflict = None;
        self.activity.send_if_modified(|activity| {
            conflict = match activity.freezer {
                _ if activity.init_exited => Some("stopped"),
                FreezerState::Thawed => None,
                other => Some(other.name()),
            };
            activity.execs += usize::from(conflict.is_none());
            activity.starting += usize::from(conflict.is_none());
            conflict.is_none()
        });
        match conflict {
            None => Ok(ActiveExec { container: self.clone(), starting: true }),
            Some(state) => Err(self.wrong_state("exec in", state)),
        }
    }

    /// After the init's exit: rejects new execs and waits until the exits of all others have been reported. In a shared
    /// PID namespace, execs outlive the init; they are killed.
    pub(crate) async fn drain_execs(&self) {
        self.activity.send_modify(|activity| activity.init_exited = true);
        if !self.own_pid_namespace
            && let Err(error) = cgroup::kill(&self.cgroup())
        {
            tracing::error!(container = self.id, %error, "failed to kill the processes that outlived the init");
        }
        let mut activity = self.activity.subscribe();
        if timeout(EXEC_EXITS_TIMEOUT, activity.wait_for(|activity| activity.execs == 0)).await.is_err() {
            tracing::error!(container = self.id, "failed to report the exits of all execs before the init's");
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        lock(&self.execs)
    }
}

/// An exec that the report of the init's exit waits for. Dropped when the exec's own exit was reported, or its start
/// failed.
#[derive(Debug)]
pub(crate) struct ActiveExec {
    container: Arc<Container>,
    starting: bool,
}

impl ActiveExec {
    /// The process exists: the container may be frozen.
    pub(crate) fn started(&mut self) {
        if std::mem::take(&mut self.starting) {
            self.container.activity.send_modify(|activity| activity.starting -= 1);
        }
    }
}

impl Drop for ActiveExec {
    fn drop(&mut self) {
        self.started();
        self.container.activity.send_modify(|activity| activity.execs -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::ProcessStreams;
    use crate::task::process::{ProcessState, StdioRequest};

    fn container() -> (tempfile::TempDir, Arc<Container>) {
        let (streams, _) = ProcessStreams::new(Default::default()).unwrap();
        let init = Process::new("c", "", StdioRequest::default(), streams, ProcessState::Running { pid: 5 }, None);
        let created =
            Created { pid: 5, own_pid_namespace: true, start_hooks: false, poststop_hooks: false, ignored: vec![] };
        let cgroup = tempfile::tempdir().unwrap();
        let oom_kills = Kills::of(cgroup.path()).unwrap();
        (cgroup, Container::new(init, &created, oom_kills))
    }

    #[tokio::test(start_paused = true)]
    async fn the_init_exit_waits_for_running_execs_and_blocks_new_ones() {
        let (_cgroup, container) = container();
        let exec = container.begin_exec().unwrap();
        let drained = tokio::spawn({
            let container = container.clone();
            async move { container.drain_execs().await }
        });
        tokio::task::yield_now().await;
        assert!(!drained.is_finished());
        assert_eq!(container.begin_exec().unwrap_err().kind, FailureKind::FailedPrecondition);
        drop(exec);
        drained.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_waits_for_starting_execs_and_blocks_new_ones() {
        let (_cgroup, container) = container();
        let mut exec = container.begin_exec().unwrap();
        container.set_freezer("pause", FreezerState::Thawed, FreezerState::Freezing).unwrap();
        let second = container.set_freezer("pause", FreezerState::Thawed, FreezerState::Freezing).unwrap_err();
        assert_eq!(second.message, "cannot pause c: it is being paused");
        assert_eq!(container.begin_exec().unwrap_err().message, "cannot exec in c: it is being paused");
        let waits = tokio::spawn({
            let container = container.clone();
            async move { container.wait_for_starting_execs().await }
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        exec.started();
        waits.await.unwrap();
        drop(exec);
        assert_eq!(container.activity.borrow().execs, 0);
    }
}
