//! Create: pipes, a worker, a record; or nothing at all.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;

use super::container::Container;
use super::process::{Process, State, Stdio};
use super::{Tasks, terminal};
use crate::cgroup::oom::Kills;
use crate::error::{Error, Kind};
use crate::io::{ProcessStreams, StreamSet};
use crate::worker::client::Streams;
use crate::worker::{Reply, Request};
use crate::{cgroup, places};

/// Time that the rest of a failed create may take to die.
const CLEANUP: Duration = Duration::from_secs(10);

impl Tasks {
    /// Makes a container from its bundle and answers its init's pid.
    ///
    /// # Errors
    /// What is wrong with the request or its spec; nothing is left of the container then, but its bundle.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<i32, Error> {
        let id = request.id.as_str();
        places::check_id(id)?;
        check(&request)?;
        let reservation = self.reserve(id)?;
        let terminal = request.terminal;
        let stdio = Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal };
        let bundle = places::bundle(id);
        let (streams, ends) = streams(&stdio)?;

        let creation = self.reaper.creation();
        let asked = if terminal {
            let wish = terminal::wish(id, None)?;
            let request = |console| Request::Create { id: id.into(), bundle, console: Some(console) };
            self.run_with_terminal(&creation, request, &streams, wanted(&stdio), wish).await
        } else {
            self.workers.run(&creation, &Request::Create { id: id.into(), bundle, console: None }, ends).await
        };
        let created = match asked {
            Ok(Reply::Created(created)) => created,
            Ok(other) => {
                clean(id).await;
                return Err(Error::new(Kind::Internal, format!("create {id}: a worker answered {other:?}")));
            }
            Err(error) => {
                clean(id).await;
                return Err(error);
            }
        };
        for ignored in &created.ignored {
            tracing::info!(container = id, "left out of the spec: {ignored}");
        }

        let kills = match Kills::of(&cgroup::of(id)) {
            Ok(kills) => kills,
            Err(error) => {
                clean(id).await;
                return Err(Error::internal(format_args!("watch the memory of {id}"), &error));
            }
        };
        let mut exit = creation.exit_of(created.pid);
        let init = Process::new(id, "", stdio, streams.clone(), State::Created { pid: created.pid }, None);
        let container = Container::new(init, &created, kills);
        reservation.fill(container.clone());
        self.streams.add(id, "", streams);
        // Told before anybody can see an exit.
        self.tell_created(&container);
        let tasks = self.clone();
        tokio::spawn(async move {
            if let Ok(exit) = tasks.tell_kills_until(&mut exit, &container).await {
                container.settle_execs().await;
                container.init.ended(exit).await;
                tasks.tell_kills(&container);
                tasks.tell_exited(&container.init, exit);
            }
        });
        Ok(created.pid)
    }
}

fn check(request: &CreateTaskRequest) -> Result<(), Error> {
    let unsupported = |what: &str| Err(Error::new(Kind::Unimplemented, format!("create {}: {what}", request.id)));
    if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
        return unsupported("checkpoints are not implemented");
    }
    if !request.rootfs.is_empty() {
        return unsupported("the root file system has to be in the share already");
    }
    if Path::new(&request.bundle) != places::bundle(&request.id) {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("{:?} is not the bundle of {}", request.bundle, request.id),
        ));
    }
    Ok(())
}

/// A stream is wanted where the request names one.
pub(super) fn wanted(stdio: &Stdio) -> StreamSet {
    StreamSet { stdin: !stdio.stdin.is_empty(), stdout: !stdio.stdout.is_empty(), stderr: !stdio.stderr.is_empty() }
}

/// A process's streams and its own ends of them, which for a terminal come with it.
pub(super) fn streams(stdio: &Stdio) -> Result<(Arc<ProcessStreams>, Streams), Error> {
    if stdio.terminal {
        return Ok((ProcessStreams::terminal(), Streams::default()));
    }
    ProcessStreams::new(wanted(stdio)).map_err(|e| Error::internal("make pipes", &e))
}

/// Removes what a failed create may have left. libcontainer does it for some failures; a worker that was killed cannot.
async fn clean(id: &str) {
    if let Err(error) = cgroup::remove(&cgroup::of(id), CLEANUP).await {
        tracing::error!(container = id, %error, "remove the cgroup of a failed create");
    }
    if let Err(error) = super::delete::remove_folder(&places::state(id)) {
        tracing::error!(container = id, %error, "remove the state of a failed create");
    }
}
