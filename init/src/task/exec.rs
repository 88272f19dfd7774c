//! Execs: added, started, ended.

use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::ExecProcessRequest;

use super::container::Container;
use super::create::{streams, wanted};
use super::process::{Process, State, Stdio, Step};
use super::{Tasks, terminal};
use crate::error::{Error, Kind};
use crate::places;
use crate::reaper::{Creation, Exit};
use crate::worker::{Executed, Reply, Request};

/// Exit status of an exec that never came to run, as runc's command has it.
const NEVER_RAN: u32 = 255;

impl Tasks {
    /// Adds an exec to a container, to be started later.
    ///
    /// # Errors
    /// AlreadyExists; NotFound without the container; FailedPrecondition when its init has ended.
    pub fn add_exec(&self, request: ExecProcessRequest) -> Result<(), Error> {
        let container = self.container(&request.id)?;
        let exec = request.exec_id.as_str();
        places::check_id(exec)?;
        may_exec(&container)?;
        let terminal = request.terminal;
        let stdio = Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal };
        let (streams, ends) = streams(&stdio)?;
        let process = Process::new(&request.id, exec, stdio, streams.clone(), State::Added, Some(ends));
        container.add_exec(process.clone())?;
        let path = spec_path(&container, exec);
        if let Err(error) = std::fs::write(&path, &request.spec.value) {
            container.remove_exec(exec);
            return Err(Error::internal(format_args!("write {}", path.display()), &error));
        }
        if !terminal {
            self.streams.add(&request.id, exec, streams);
        }
        self.tell_exec_added(&process);
        Ok(())
    }

    pub(super) async fn start_exec(self: &Arc<Self>, container: &Arc<Container>, exec: &str) -> Result<i32, Error> {
        let process = container.process(exec)?;
        may_exec(container)?;
        let mut live = container.begin_exec()?;
        process.step(Step::Start)?;
        let creation = self.reaper.creation();
        let Executed { pid, ignored } = match self.run_exec(container, &process, &creation).await {
            Ok(Reply::Executed(executed)) => executed,
            other => {
                process.end(Exit { status: NEVER_RAN, at: SystemTime::now() });
                return Err(other.map_or_else(
                    |error| error,
                    |reply| Error::new(Kind::Internal, format!("exec {exec}: a worker answered {reply:?}")),
                ));
            }
        };
        for ignored in &ignored {
            tracing::info!(container = container.id, exec, "left out of the process: {ignored}");
        }
        live.started();
        let exit = creation.exit_of(pid);
        process.step(Step::Started(pid))?;
        self.tell_started(&process);
        let (tasks, container) = (self.clone(), container.clone());
        tokio::spawn(async move {
            if let Ok(exit) = exit.await {
                process.ended(exit).await;
                tasks.tell_kills(&container);
                tasks.tell_exited(&process, exit);
            }
            // The init's exit may be told from here on.
            drop(live);
        });
        Ok(pid)
    }
}

impl Tasks {
    async fn run_exec(&self, container: &Container, process: &Process, creation: &Creation) -> Result<Reply, Error> {
        let (id, path) = (container.id.clone(), spec_path(container, &process.exec));
        if !process.stdio.terminal {
            let request = Request::Exec { id, process: path, console: None };
            return self.workers.run(creation, &request, process.take_ends()).await;
        }
        let wish = terminal::wish(&id, Some(&path))?;
        let request = |console| Request::Exec { id, process: path, console: Some(console) };
        let reply = self.run_with_terminal(creation, request, &process.streams, wanted(&process.stdio), wish).await?;
        // Only now is there something to attach to.
        self.streams.add(&container.id, &process.exec, process.streams.clone());
        Ok(reply)
    }
}

/// Also into a container whose init still waits for its start: its namespaces and its root are there.
fn may_exec(container: &Container) -> Result<(), Error> {
    match container.init.state() {
        State::Created { .. } | State::Starting { .. } => Ok(()),
        _ => container.must_run("exec in"),
    }
}

/// Where an exec's process waits for its start, in the spec's JSON.
pub(super) fn spec_path(container: &Container, exec: &str) -> std::path::PathBuf {
    container.bundle().join(format!("exec-{exec}.json"))
}
