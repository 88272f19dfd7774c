//! Delete, and the end of all containers at Shutdown.

use std::fs;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use tokio::time::timeout;

use super::Tasks;
use super::container::{Container, FreezerState};
use super::process::{ProcessState, Transition};
use crate::cgroup::freezer;
use crate::error::{CallError, FailureKind};
use crate::reaper::Exit;
use crate::spawn::ChildStreams;
use crate::worker::{Reply, Request};
use crate::{cgroup, paths, roots};

/// How long processes may take to exit after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long processes may take to exit after SIGTERM when the guest shuts down.
const TERM_TIMEOUT: Duration = Duration::from_secs(3);

/// The reply to a deletion.
#[derive(Debug)]
pub(crate) struct Deleted {
    /// Zero if the process never had a PID.
    pub(crate) pid: i32,
    pub(crate) exit: Exit,
}

impl Tasks {
    /// Deletes an exec, or with an empty `exec` the container. Fails with FailedPrecondition if the process is running.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<Deleted, CallError> {
        let container = self.container(id)?;
        if exec.is_empty() { self.delete_container(&container).await } else { self.delete_exec(&container, exec) }
    }

    fn delete_exec(&self, container: &Container, exec: &str) -> Result<Deleted, CallError> {
        let process = container.process(exec)?;
        let state = process.state();
        process.apply(Transition::Delete)?;
        container.remove_exec(exec);
        self.streams.remove(&container.id, exec);
        drop(process.take_ends());
        paths::allow_missing(fs::remove_file(paths::exec_process(&container.id, exec)))
            .map_err(|e| CallError::internal(format_args!("remove the spec of exec {exec}"), &e))?;
        Ok(deleted(state))
    }

    async fn delete_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<Deleted, CallError> {
        if let ProcessState::Created { pid } = container.init.state() {
            // Like runc, delete a container that was never started.
            match self.reaper.kill(pid, libc::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(CallError::internal(format_args!("kill {}", container.id), &error)),
            }
            timeout(KILL_TIMEOUT, container.init.wait()).await.map_err(|_| {
                let what = format!("{} did not exit within {KILL_TIMEOUT:?} of SIGKILL", container.id);
                CallError::new(FailureKind::DeadlineExceeded, what)
            })?;
        }
        let state = container.init.state();
        state.after(Transition::Delete)?;
        self.remove(container).await?;
        // Last, so that a client can retry a deletion that failed halfway.
        container.init.apply(Transition::Delete)?;
        self.table().remove(&container.id);
        let deleted = deleted(state);
        self.publish_delete(container, deleted.pid, deleted.exit);
        Ok(deleted)
    }

    /// Removes everything that belongs to a container. Each step succeeds if its work was done before.
    async fn remove(&self, container: &Container) -> Result<(), CallError> {
        let id = container.id.as_str();
        let failed = |what: &str, e: io::Error| CallError::internal(format_args!("delete {id}: remove its {what}"), &e);
        self.disks.thaw(id);
        // Before the worker runs: libcontainer would remove the cgroup by a recursion over paths.
        cgroup::remove(&container.cgroup(), KILL_TIMEOUT).await.map_err(|e| failed("cgroup", e))?;
        if container.poststop_hooks && paths::state(id).exists() {
            let creation = self.reaper.creation();
            match self.workers.run(&creation, &Request::Delete { id: id.into() }, ChildStreams::default()).await? {
                Reply::Done => {}
                other => return Err(other.unexpected(&format!("delete {id}"))),
            }
        }
        paths::allow_missing(fs::remove_dir_all(paths::state(id))).map_err(|e| failed("state", e))?;
        unmount_root(id).await.map_err(|e| failed("root filesystem", e))?;
        paths::allow_missing(fs::remove_dir_all(container.bundle())).map_err(|e| failed("bundle", e))?;
        self.sockets.remove(id).map_err(|e| failed("sockets", e))?;
        for exec in container.all_execs() {
            container.remove_exec(&exec.exec);
            self.streams.remove(id, &exec.exec);
        }
        self.streams.remove(id, "");
        Ok(())
    }

    /// Ends every process of every container: SIGTERM to the inits, then SIGKILL to all processes that remain.
    pub(crate) async fn stop_all(&self) {
        // Nothing ends that waits for a frozen filesystem.
        self.disks.thaw_all();
        let containers: Vec<_> = self
            .all()
            .into_iter()
            .filter(|c| !matches!(c.init.state(), ProcessState::Stopped { .. } | ProcessState::Deleted))
            .collect();
        for container in &containers {
            match self.reaper.kill(container.init.state().pid(), libc::SIGTERM) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => {
                    tracing::error!(container = container.id, %error, "failed to send SIGTERM to a container")
                }
            }
            if container.freezer() != FreezerState::Thawed
                && let Err(error) = freezer::thaw(&container.cgroup(), KILL_TIMEOUT).await
            {
                tracing::error!(container = container.id, %error, "failed to thaw a paused container");
            }
        }
        let ended = futures::future::join_all(containers.iter().map(|container| container.init.wait()));
        if timeout(TERM_TIMEOUT, ended).await.is_err() {
            tracing::info!("some containers did not exit on SIGTERM");
        }
        // Every cgroup, because a stopped container may have left processes behind, and another may be in creation.
        for cgroup in fs::read_dir(cgroup::CONTAINERS).into_iter().flatten().flatten() {
            if cgroup.file_type().is_ok_and(|kind| kind.is_dir())
                && let Err(error) = cgroup::remove(&cgroup.path(), KILL_TIMEOUT).await
            {
                tracing::error!(cgroup = %cgroup.path().display(), %error, "failed to remove a container's cgroup");
            }
        }
    }
}

/// On a thread: unmounting may write back many files, and PID 1 must send heartbeats meanwhile.
async fn unmount_root(id: &str) -> io::Result<()> {
    if !roots::is_mounted(id) {
        return Ok(());
    }
    let id = id.to_owned();
    tokio::task::spawn_blocking(move || roots::unmount(&id)).await.map_err(io::Error::other)?
}

fn deleted(state: ProcessState) -> Deleted {
    let never_exited = Exit { status: 0, at: SystemTime::UNIX_EPOCH };
    match state {
        ProcessState::Stopped { pid, exit } => Deleted { pid, exit },
        other => Deleted { pid: other.pid(), exit: never_exited },
    }
}
