//! Exec: adds a process to a container, starts it and reports its exit.

use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::ExecProcessRequest;

use super::container::{ActiveExec, Container};
use super::process::{Process, ProcessState, StdioRequest, Transition};
use super::{Tasks, streams, terminal};
use crate::error::CallError;
use crate::paths;
use crate::reaper::{Creation, Exit};
use crate::worker::{Executed, Reply, Request};

/// Exit status of an exec that failed to start, as reported by runc's command.
const START_FAILED: u32 = 255;

impl Tasks {
    /// Adds an exec to a container. A later call starts it.
    pub(crate) fn add_exec(&self, request: ExecProcessRequest) -> Result<(), CallError> {
        let container = self.container(&request.id)?;
        let exec = request.exec_id.as_str();
        paths::check_id(exec)?;
        require_ready(&container)?;
        let terminal = request.terminal;
        let stdio = StdioRequest { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal };
        let (streams, ends) = streams::create(&stdio)?;
        let process = Process::new(&request.id, exec, stdio, streams.clone(), ProcessState::Added, Some(ends));
        container.add_exec(process.clone())?;
        let path = paths::exec_process(&container.id, exec);
        if let Err(error) = std::fs::write(&path, &request.spec.value) {
            container.remove_exec(exec);
            return Err(CallError::internal(format_args!("write {}", path.display()), &error));
        }
        if !terminal {
            self.streams.add(&request.id, exec, streams);
        }
        self.publish_exec_added(&process);
        Ok(())
    }

    pub(super) async fn start_exec(self: &Arc<Self>, container: &Arc<Container>, exec: &str) -> Result<i32, CallError> {
        let process = container.process(exec)?;
        require_ready(container)?;
        let mut active = container.begin_exec()?;
        process.apply(Transition::Start)?;
        let creation = self.reaper.creation();
        let Executed { pid, ignored } = self
            .run_exec(container, &process, &creation)
            .await
            .inspect_err(|_| process.end(Exit { status: START_FAILED, at: SystemTime::now() }))?;
        for ignored in &ignored {
            tracing::info!(container = container.id, exec, "ignored part of the process: {ignored}");
        }
        active.started();
        let exit = creation.exit_of(pid);
        process.apply(Transition::Started(pid))?;
        self.publish_start(&process);
        tokio::spawn(self.clone().report_exec_exit(container.clone(), process, exit, active));
        Ok(pid)
    }

    async fn run_exec(
        &self,
        container: &Container,
        process: &Process,
        creation: &Creation,
    ) -> Result<Executed, CallError> {
        let (id, exec) = (container.id.clone(), process.exec.as_str());
        let path = paths::exec_process(&id, exec);
        let reply = if process.stdio.terminal {
            let spec = terminal::read_spec(&id, Some(&path))?;
            let request = |console| Request::Exec { id, process: path, console: Some(console) };
            let requested = streams::requested(&process.stdio);
            let reply = self.run_with_terminal(creation, request, &process.streams, requested, spec).await?;
            // Until now there was nothing to attach to.
            self.streams.add(&container.id, exec, process.streams.clone());
            reply
        } else {
            let request = Request::Exec { id, process: path, console: None };
            self.workers.run(creation, &request, process.take_ends()).await?
        };
        match reply {
            Reply::Executed(executed) => Ok(executed),
            other => Err(other.unexpected(&format!("exec {exec}"))),
        }
    }

    async fn report_exec_exit(
        self: Arc<Self>,
        container: Arc<Container>,
        process: Arc<Process>,
        exit: tokio::sync::oneshot::Receiver<Exit>,
        active: ActiveExec,
    ) {
        if let Ok(exit) = exit.await {
            process.exited(exit).await;
            self.publish_oom_kills(&container);
            self.publish_exit(&process, exit);
        }
        // From here on the init's exit may be reported.
        drop(active);
    }
}

/// Execs may also enter a container that is not started yet: its namespaces and root filesystem exist.
fn require_ready(container: &Container) -> Result<(), CallError> {
    match container.init.state() {
        ProcessState::Created { .. } | ProcessState::Starting { .. } => Ok(()),
        _ => container.require_running("exec in"),
    }
}
