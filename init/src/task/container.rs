//! A container: its init, its execs, and what order their ends are told in.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::process::Process;
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
    pub poststart_hooks: bool,
    /// Delete has to go through a worker.
    pub poststop_hooks: bool,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    live: watch::Sender<Live>,
}

/// What of a container keeps its init's exit from being told.
#[derive(Debug, Default, Clone, Copy)]
struct Live {
    /// Execs between the beginning of their start and their exit.
    execs: usize,
    /// The init has ended: no exec may begin any more.
    closed: bool,
}

impl Container {
    /// A container that was just created.
    pub fn new(init: Arc<Process>, created: &crate::worker::Created) -> Arc<Self> {
        Arc::new(Self {
            id: init.container.clone(),
            terminal: init.stdio.terminal,
            init,
            own_pid_namespace: created.own_pid_namespace,
            poststart_hooks: created.poststart_hooks,
            poststop_hooks: created.poststop_hooks,
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

    /// An exec begins: counted before its start, because its exit may come before the start's answer, and the init's with it.
    ///
    /// # Errors
    /// FailedPrecondition when the init has ended.
    pub fn begin_exec(self: &Arc<Self>) -> Result<LiveExec, Error> {
        let begun = self.live.send_if_modified(|live| {
            live.execs += usize::from(!live.closed);
            !live.closed
        });
        if begun {
            Ok(LiveExec(self.clone()))
        } else {
            Err(Error::new(Kind::FailedPrecondition, format!("cannot exec in {}: its init has ended", self.id)))
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
pub struct LiveExec(Arc<Container>);

impl Drop for LiveExec {
    fn drop(&mut self) {
        self.0.live.send_modify(|live| live.execs -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::ProcessStreams;
    use crate::task::process::{State, Stdio};

    #[tokio::test(start_paused = true)]
    async fn the_inits_exit_waits_for_its_execs_and_no_new_one_begins() {
        let (streams, _) = ProcessStreams::new(Default::default()).unwrap();
        let init = Process::new("c", "", Stdio::default(), streams, State::Running { pid: 5 }, None);
        let created = crate::worker::Created {
            pid: 5,
            own_pid_namespace: true,
            poststart_hooks: false,
            poststop_hooks: false,
            ignored: vec![],
        };
        let container = Container::new(init, &created);
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
}
