//! A container: its init, its execs, and what order their ends are told in.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::process::{Process, State};
use crate::cgroup::oom::Kills;
use crate::error::{Error, Kind};
use crate::{cgroup, places};

/// Time that the init's exit is held back for execs that are not reaped yet. The kernel has killed them by then.
const EXECS_WAIT: Duration = Duration::from_secs(10);

/// A container and its processes.
#[derive(Debug)]
pub struct Container {
    /// As containerd gave it.
    pub id: String,
    /// As Create said it.
    pub terminal: bool,
    /// Its first process.
    pub init: Arc<Process>,
    /// The kernel ends all of its processes with its init.
    pub own_pid_namespace: bool,
    /// Start has to go through a worker.
    pub start_hooks: bool,
    /// Delete has to go through a worker.
    pub poststop_hooks: bool,
    /// What the kernel killed of it for want of memory.
    pub kills: Kills,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    live: watch::Sender<Live>,
}

/// What of a container its other parts have to wait for.
#[derive(Debug, Default, Clone, Copy)]
struct Live {
    /// Execs between the beginning of their start and their exit. They keep the init's exit from being told.
    execs: usize,
    /// Those of them whose start is under way. They keep the container from being frozen, in which they would not come through.
    starting: usize,
    /// The init has ended: no exec may begin any more.
    closed: bool,
    freezer: Freezer,
}

/// Whether a container's processes may run.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Freezer {
    /// They may.
    #[default]
    Thawed,
    /// They are being stopped.
    Freezing,
    /// They are stopped.
    Frozen,
    /// They are being let go.
    Thawing,
}

impl Freezer {
    /// As it stands in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Thawed => "running",
            Self::Freezing => "being paused",
            Self::Frozen => "paused",
            Self::Thawing => "being resumed",
        }
    }
}

impl Container {
    /// A container that was just created.
    pub fn new(init: Arc<Process>, created: &crate::worker::Created, kills: Kills) -> Arc<Self> {
        Arc::new(Self {
            id: init.container.clone(),
            terminal: init.stdio.terminal,
            init,
            own_pid_namespace: created.own_pid_namespace,
            start_hooks: created.start_hooks,
            poststop_hooks: created.poststop_hooks,
            kills,
            execs: Mutex::default(),
            live: watch::Sender::default(),
        })
    }

    /// Folder of its config.json.
    pub fn bundle(&self) -> PathBuf {
        places::bundle(&self.id)
    }

    /// Its cgroup.
    pub fn group(&self) -> PathBuf {
        cgroup::of(&self.id)
    }

    /// A process by its id; the empty one is the init.
    ///
    /// # Errors
    /// NotFound.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, Error> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs()
            .get(exec)
            .cloned()
            .ok_or_else(|| Error::new(Kind::NotFound, format!("process does not exist {exec} in {}", self.id)))
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// AlreadyExists.
    pub fn add_exec(&self, process: Arc<Process>) -> Result<(), Error> {
        let mut execs = self.execs();
        if execs.contains_key(&process.exec) {
            return Err(Error::new(Kind::AlreadyExists, format!("exec {} in {} exists", process.exec, self.id)));
        }
        execs.insert(process.exec.clone(), process);
        Ok(())
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec: &str) {
        self.execs().remove(exec);
    }

    /// All execs, at this moment.
    pub fn all_execs(&self) -> Vec<Arc<Process>> {
        self.execs().values().cloned().collect()
    }

    /// Whether its processes may run.
    pub fn freezer(&self) -> Freezer {
        self.live.borrow().freezer
    }

    /// Moves the freezer from one state to the next.
    ///
    /// # Errors
    /// FailedPrecondition when it is in another state.
    pub fn switch(&self, verb: &str, from: Freezer, to: Freezer) -> Result<(), Error> {
        let mut was = from;
        self.live.send_if_modified(|live| {
            was = live.freezer;
            let switches = was == from;
            if switches {
                live.freezer = to;
            }
            switches
        });
        if was == from { Ok(()) } else { Err(self.refuse(verb, was.name())) }
    }

    /// Waits until no exec is between its start's beginning and its end.
    pub async fn execs_started(&self) {
        // The sender lives in self: the wait cannot fail.
        let _ = self.live.subscribe().wait_for(|live| live.starting == 0).await;
    }

    /// Refuses what only a container can that runs and is not paused.
    ///
    /// # Errors
    /// FailedPrecondition.
    pub fn must_run(&self, verb: &str) -> Result<(), Error> {
        let state = self.init.state();
        match self.freezer() {
            Freezer::Thawed if matches!(state, State::Running { .. }) => Ok(()),
            freezer if matches!(state, State::Running { .. }) => Err(self.refuse(verb, freezer.name())),
            _ => Err(self.refuse(verb, state.name())),
        }
    }

    /// Refuses what cannot be done with a container whose init has ended.
    ///
    /// # Errors
    /// FailedPrecondition.
    pub fn must_be_there(&self, verb: &str) -> Result<(), Error> {
        match self.init.state() {
            state @ (State::Stopped { .. } | State::Deleted) => Err(self.refuse(verb, state.name())),
            _ => Ok(()),
        }
    }

    fn refuse(&self, verb: &str, state: &str) -> Error {
        Error::new(Kind::FailedPrecondition, format!("cannot {verb} {}: it is {state}", self.id))
    }

    /// An exec begins: counted before its start, because its exit may come before the start's answer, and the init's with it.
    ///
    /// # Errors
    /// FailedPrecondition when the init has ended, or the container is paused.
    pub fn begin_exec(self: &Arc<Self>) -> Result<LiveExec, Error> {
        let mut refused = None;
        self.live.send_if_modified(|live| {
            refused = match live.freezer {
                _ if live.closed => Some("stopped"),
                Freezer::Thawed => None,
                other => Some(other.name()),
            };
            live.execs += usize::from(refused.is_none());
            live.starting += usize::from(refused.is_none());
            refused.is_none()
        });
        match refused {
            None => Ok(LiveExec { container: self.clone(), starting: true }),
            Some(state) => Err(self.refuse("exec in", state)),
        }
    }

    /// The init has ended: refuses further execs, and waits until the exits of those that were there have been told. Execs that outlive the
    /// init, because they share another's pid namespace, are killed.
    pub async fn settle_execs(&self) {
        self.live.send_modify(|live| live.closed = true);
        if !self.own_pid_namespace
            && let Err(error) = cgroup::kill(&self.group())
        {
            tracing::error!(container = self.id, %error, "kill what outlived the init");
        }
        let mut live = self.live.subscribe();
        if timeout(EXECS_WAIT, live.wait_for(|live| live.execs == 0)).await.is_err() {
            tracing::error!(container = self.id, "the init's exit is told before those of its execs");
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// An exec that the init's exit has to wait for. Dropped when its own exit was told, or its start has failed.
#[derive(Debug)]
pub struct LiveExec {
    container: Arc<Container>,
    starting: bool,
}

impl LiveExec {
    /// Its process is there: a freeze may come.
    pub fn started(&mut self) {
        if std::mem::take(&mut self.starting) {
            self.container.live.send_modify(|live| live.starting -= 1);
        }
    }
}

impl Drop for LiveExec {
    fn drop(&mut self) {
        self.started();
        self.container.live.send_modify(|live| live.execs -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::ProcessStreams;
    use crate::task::process::{State, Stdio};

    fn container() -> (tempfile::TempDir, Arc<Container>) {
        let (streams, _) = ProcessStreams::new(Default::default()).unwrap();
        let init = Process::new("c", "", Stdio::default(), streams, State::Running { pid: 5 }, None);
        let created = crate::worker::Created {
            pid: 5,
            own_pid_namespace: true,
            start_hooks: false,
            poststop_hooks: false,
            ignored: vec![],
        };
        let group = tempfile::tempdir().unwrap();
        let kills = Kills::of(group.path()).unwrap();
        (group, Container::new(init, &created, kills))
    }

    #[tokio::test(start_paused = true)]
    async fn the_inits_exit_waits_for_its_execs_and_no_new_one_begins() {
        let (_group, container) = container();
        let exec = container.begin_exec().unwrap();
        let settled = tokio::spawn({
            let container = container.clone();
            async move { container.settle_execs().await }
        });
        tokio::task::yield_now().await;
        assert!(!settled.is_finished());
        assert_eq!(container.begin_exec().unwrap_err().kind, Kind::FailedPrecondition);
        drop(exec);
        settled.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_freeze_waits_for_execs_that_are_starting_and_keeps_others_away() {
        let (_group, container) = container();
        let mut exec = container.begin_exec().unwrap();
        container.switch("pause", Freezer::Thawed, Freezer::Freezing).unwrap();
        let twice = container.switch("pause", Freezer::Thawed, Freezer::Freezing).unwrap_err();
        assert_eq!(twice.message, "cannot pause c: it is being paused");
        assert_eq!(container.begin_exec().unwrap_err().message, "cannot exec in c: it is being paused");
        let waits = tokio::spawn({
            let container = container.clone();
            async move { container.execs_started().await }
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        exec.started();
        waits.await.unwrap();
        drop(exec);
        assert_eq!(container.live.borrow().execs, 0);
    }
}
