//! Create: makes the streams, has a worker create the container, and records it. A failure leaves nothing behind.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;

use super::container::Container;
use super::process::{Process, ProcessState, StdioRequest};
use super::{Tasks, streams, terminal};
use crate::cgroup::oom::Kills;
use crate::error::{CallError, FailureKind};
use crate::io::ProcessStreams;
use crate::reaper::{Creation, Exit};
use crate::spawn::ChildStreams;
use crate::worker::{Created, Reply, Request};
use crate::{cgroup, paths};

/// How long the processes of a failed create may take to exit after SIGKILL.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);

impl Tasks {
    /// Creates a container from its bundle and returns the PID of its init. If this fails, only the bundle remains.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<i32, CallError> {
        let id = request.id.as_str();
        paths::check_id(id)?;
        check(&request)?;
        let reservation = self.reserve(id)?;
        let terminal = request.terminal;
        let stdio = StdioRequest { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal };
        let (streams, ends) = streams::create(&stdio)?;

        let creation = self.reaper.creation();
        let prepared = async {
            let namespace = self.disks.making_namespace().await;
            let created = self.run_create(id, &stdio, &creation, &streams, ends).await?;
            drop(namespace);
            for ignored in &created.ignored {
                tracing::warn!(container = id, "ignored part of the spec: {ignored}");
            }
            let oom_kills = Kills::of(&cgroup::of(id))
                .map_err(|e| CallError::internal(format_args!("watch the OOM kills of {id}"), &e))?;
            Ok((created, oom_kills))
        };
        let (created, oom_kills) = match prepared.await {
            Ok(prepared) => prepared,
            Err(error) => {
                clean_up(id).await;
                return Err(error);
            }
        };

        let exit = creation.exit_of(created.pid);
        let state = ProcessState::Created { pid: created.pid };
        let init = Process::new(id, "", stdio, streams.clone(), state, None);
        let container = Container::new(init, &created, oom_kills);
        reservation.fill(container.clone());
        self.streams.add(id, "", streams);
        // Before the task below can report the exit.
        self.publish_create(&container);
        tokio::spawn(self.clone().report_exit(container, exit));
        Ok(created.pid)
    }

    async fn run_create(
        &self,
        id: &str,
        stdio: &StdioRequest,
        creation: &Creation,
        streams: &ProcessStreams,
        ends: ChildStreams,
    ) -> Result<Created, CallError> {
        let bundle = paths::bundle(id);
        let reply = if stdio.terminal {
            let spec = terminal::read_spec(id, None)?;
            let request = |console| Request::Create { id: id.into(), bundle, console: Some(console) };
            self.run_with_terminal(creation, request, streams, streams::requested(stdio), spec).await?
        } else {
            self.workers.run(creation, &Request::Create { id: id.into(), bundle, console: None }, ends).await?
        };
        match reply {
            Reply::Created(created) => Ok(created),
            other => Err(other.unexpected(&format!("create {id}"))),
        }
    }

    /// Reports the init's exit, after those of its execs.
    async fn report_exit(self: Arc<Self>, container: Arc<Container>, exit: tokio::sync::oneshot::Receiver<Exit>) {
        if let Ok(exit) = self.publish_oom_kills_until(exit, &container).await {
            container.drain_execs().await;
            container.init.exited(exit).await;
            self.publish_oom_kills(&container);
            self.publish_exit(&container.init, exit);
        }
    }
}

fn check(request: &CreateTaskRequest) -> Result<(), CallError> {
    let unsupported =
        |what: &str| Err(CallError::new(FailureKind::Unimplemented, format!("create {}: {what}", request.id)));
    if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
        return unsupported("checkpoints are not implemented");
    }
    if !request.rootfs.is_empty() {
        return unsupported("the guest mounts no rootfs: the host must provide it in the share");
    }
    if Path::new(&request.bundle) != paths::bundle(&request.id) {
        let what = format!("{:?} is not the bundle of {}", request.bundle, request.id);
        return Err(CallError::new(FailureKind::InvalidArgument, what));
    }
    Ok(())
}

/// Removes what a failed create left behind. libcontainer cleans up after some failures, but not if its worker was
/// killed.
async fn clean_up(id: &str) {
    if let Err(error) = cgroup::remove(&cgroup::of(id), CLEANUP_TIMEOUT).await {
        tracing::error!(container = id, %error, "failed to remove the cgroup of a failed create");
    }
    if let Err(error) = paths::allow_missing(fs::remove_dir_all(paths::state(id))) {
        tracing::error!(container = id, %error, "failed to remove the state of a failed create");
    }
}
