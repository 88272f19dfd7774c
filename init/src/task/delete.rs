//! Delete, and the end of everything: Shutdown.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::Tasks;
use super::container::{Container, Freezer};
use super::exec::spec_path;
use super::process::{State, Step};
use crate::cgroup::freezer;
use crate::error::{Error, Kind};
use crate::reaper::Exit;
use crate::worker::client::Streams;
use crate::worker::{Reply, Request};
use crate::{cgroup, places};

/// Time that killed processes may take to go.
const KILL_WAIT: Duration = Duration::from_secs(10);
/// Time that processes have to end on SIGTERM when the guest shuts down.
const TERM_WAIT: Duration = Duration::from_secs(3);

/// What a delete answers.
#[derive(Debug)]
pub struct Deleted {
    /// Of the process, zero if it never had one.
    pub pid: i32,
    /// How it ended.
    pub exit: Exit,
}

impl Tasks {
    /// Forgets a process that has ended: an exec; or the init, with the container and all that belongs to it.
    ///
    /// # Errors
    /// FailedPrecondition when it runs.
    pub async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<Deleted, Error> {
        let container = self.container(id)?;
        if exec.is_empty() { self.delete_container(&container).await } else { self.delete_exec(&container, exec) }
    }

    fn delete_exec(&self, container: &Container, exec: &str) -> Result<Deleted, Error> {
        let process = container.process(exec)?;
        let before = process.state();
        process.step(Step::Delete)?;
        container.remove_exec(exec);
        self.streams.remove(&container.id, exec);
        drop(process.take_ends());
        remove_file(&spec_path(container, exec))
            .map_err(|e| Error::internal(format_args!("remove the spec of exec {exec}"), &e))?;
        Ok(deleted(before))
    }

    async fn delete_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<Deleted, Error> {
        if let State::Created { pid } = container.init.state() {
            // A container that was never started may be deleted as it is, with runc too.
            match self.reaper.kill(pid, libc::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(Error::internal(format_args!("kill {}", container.id), &error)),
            }
            timeout(KILL_WAIT, container.init.wait()).await.map_err(|_| {
                Error::new(Kind::DeadlineExceeded, format!("{} is there {KILL_WAIT:?} after its kill", container.id))
            })?;
        }
        let before = container.init.state();
        before.after(Step::Delete)?;
        self.remove(container).await?;
        // Only now, so that a delete that failed on the way can be asked for again.
        container.init.step(Step::Delete)?;
        self.table().remove(&container.id);
        let deleted = deleted(before);
        self.tell_deleted(container, deleted.pid, deleted.exit);
        Ok(deleted)
    }

    /// Removes all that a container has. Each step may find its work done.
    async fn remove(&self, container: &Container) -> Result<(), Error> {
        let id = container.id.as_str();
        let failed = |what: &str, e: io::Error| Error::internal(format_args!("delete {id}: remove its {what}"), &e);
        // Before the hooks, as libcontainer would, whose walk is a recursion over paths.
        cgroup::remove(&container.group(), KILL_WAIT).await.map_err(|e| failed("cgroup", e))?;
        if container.poststop_hooks && places::state(id).exists() {
            let creation = self.reaper.creation();
            match self.workers.run(&creation, &Request::Delete { id: id.into() }, Streams::default()).await? {
                Reply::Done => {}
                other => return Err(Error::new(Kind::Internal, format!("delete {id}: a worker answered {other:?}"))),
            }
        }
        remove_folder(&places::state(id)).map_err(|e| failed("state", e))?;
        remove_folder(&container.bundle()).map_err(|e| failed("bundle", e))?;
        for exec in container.all_execs() {
            container.remove_exec(&exec.exec);
            self.streams.remove(id, &exec.exec);
        }
        self.streams.remove(id, "");
        Ok(())
    }

    /// Ends every process of every container: asks, and then insists.
    pub async fn stop_all(&self) {
        let containers: Vec<_> = self
            .all()
            .into_iter()
            .filter(|c| !matches!(c.init.state(), State::Stopped { .. } | State::Deleted))
            .collect();
        for container in &containers {
            match self.reaper.kill(container.init.state().pid(), libc::SIGTERM) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => tracing::error!(container = container.id, %error, "ask a container to end"),
            }
            if container.freezer() != Freezer::Thawed
                && let Err(error) = freezer::thaw(&container.group(), KILL_WAIT).await
            {
                tracing::error!(container = container.id, %error, "let a paused container end");
            }
        }
        let ended = futures::future::join_all(containers.iter().map(|container| container.init.wait()));
        if timeout(TERM_WAIT, ended).await.is_err() {
            tracing::info!("some containers did not end on SIGTERM");
        }
        // Also what a container that has ended left behind, or one that is being made.
        for container in fs::read_dir(cgroup::CONTAINERS).into_iter().flatten().flatten() {
            if container.file_type().is_ok_and(|kind| kind.is_dir())
                && let Err(error) = cgroup::remove(&container.path(), KILL_WAIT).await
            {
                tracing::error!(cgroup = %container.path().display(), %error, "end what is left");
            }
        }
    }
}

fn deleted(state: State) -> Deleted {
    let never = Exit { status: 0, at: std::time::SystemTime::UNIX_EPOCH };
    match state {
        State::Stopped { pid, exit } => Deleted { pid, exit },
        other => Deleted { pid: other.pid(), exit: never },
    }
}

/// Removes a folder with all in it, if it is there.
pub(super) fn remove_folder(path: &Path) -> io::Result<()> {
    missing_is_fine(fs::remove_dir_all(path))
}

fn remove_file(path: &Path) -> io::Result<()> {
    missing_is_fine(fs::remove_file(path))
}

fn missing_is_fine(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}
