//! containerd's Task service: maps each call onto the containers, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::Task;
use protobuf::MessageField;
use tokio::sync::mpsc;
use tokio::time::timeout;
use ttrpc::r#async::TtrpcContext;

use super::Tasks;
use super::container::Freezer;
use super::process::State;
use super::tell::timestamp;
use crate::error::{Error, Kind};
use crate::io::Size;
use crate::reaper::Exit;
use crate::report::Reports;
use crate::rpc::{Answer, answer, finish};
use crate::supervisor::Supervisor;

/// How long the last reports may take to get out before the host is told that it can end the VM.
const LAST_REPORTS: Duration = Duration::from_millis(500);

/// The Task service.
pub struct Service {
    /// What it serves.
    pub tasks: Arc<Tasks>,
    /// Ends with the guest, if there is one.
    pub supervisor: Option<Arc<Supervisor>>,
    /// What the host is to hear of the end.
    pub reports: Reports,
    /// Takes one message: the guest is to end.
    pub end: mpsc::Sender<()>,
}

fn unimplemented<T>(call: &str) -> Answer<T> {
    Err(Error::new(Kind::Unimplemented, format!("{call} is not implemented by the guest")).into())
}

fn exit_of(state: State) -> Option<Exit> {
    if let State::Stopped { exit, .. } = state { Some(exit) } else { None }
}

#[async_trait]
impl Task for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        let tasks = self.tasks.clone();
        let pid = finish(async move { tasks.create(request).await }).await?;
        Ok(CreateTaskResponse { pid: pid as u32, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let tasks = self.tasks.clone();
        let pid = finish(async move { tasks.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid: pid as u32, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        let tasks = self.tasks.clone();
        let deleted = finish(async move { tasks.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid: deleted.pid as u32,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(timestamp(deleted.exit.at)),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        answer(async { self.tasks.add_exec(request) }).await.map(|()| Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        answer(async { self.tasks.kill(&request.id, &request.exec_id, request.signal, request.all) })
            .await
            .map(|()| Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        answer(async {
            let process = self.tasks.container(&request.id)?.process(&request.exec_id)?;
            let exit = process.wait().await;
            Ok(WaitResponse {
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            })
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        answer(async {
            let container = self.tasks.container(&request.id)?;
            let process = container.process(&request.exec_id)?;
            let state = process.state();
            let status = match state {
                State::Added | State::Created { .. } | State::Starting { .. } => Status::CREATED,
                // Of execs too: what the container is, its processes are.
                State::Running { .. } => match container.freezer() {
                    Freezer::Thawed => Status::RUNNING,
                    Freezer::Freezing => Status::PAUSING,
                    Freezer::Frozen | Freezer::Thawing => Status::PAUSED,
                },
                State::Stopped { .. } | State::Deleted => Status::STOPPED,
            };
            let exit = exit_of(state);
            Ok(StateResponse {
                id: container.id.clone(),
                exec_id: process.exec.clone(),
                bundle: container.bundle().to_string_lossy().into_owned(),
                pid: state.pid() as u32,
                status: status.into(),
                stdin: process.stdio.stdin.clone(),
                stdout: process.stdio.stdout.clone(),
                stderr: process.stdio.stderr.clone(),
                terminal: process.stdio.terminal,
                exit_status: exit.map_or(0, |exit| exit.status),
                exited_at: exit.map(|exit| timestamp(exit.at)).into(),
                ..Default::default()
            })
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        answer(async {
            let processes = self.tasks.pids(&request.id)?;
            Ok(PidsResponse { processes, ..Default::default() })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Answer<ConnectResponse> {
        answer(async {
            let container = self.tasks.container(&request.id)?;
            Ok(ConnectResponse {
                shim_pid: std::process::id(),
                task_pid: container.init.state().pid() as u32,
                version: env!("CARGO_PKG_VERSION").into(),
                ..Default::default()
            })
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        answer(async {
            let process = self.tasks.container(&request.id)?.process(&request.exec_id)?;
            if request.stdin {
                process.streams.close_stdin();
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        let (tasks, supervisor, reports) = (self.tasks.clone(), self.supervisor.clone(), self.reports.clone());
        finish(async move {
            // At the same time: each has seconds to go by itself, and the host waits for both.
            tokio::join!(tasks.stop_all(), async {
                if let Some(supervisor) = supervisor {
                    supervisor.stop().await;
                }
            });
            // Before the answer: the host ends the VM as soon as it has it. Nothing else of this process is of use any more, so it may block.
            nix::unistd::sync();
            // Nor would it hear anything that comes after. It may not listen.
            let _ = timeout(LAST_REPORTS, reports.flush()).await;
            Ok(())
        })
        .await?;
        // Full means that another shutdown has said it already.
        let _ = self.end.try_send(());
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        let tasks = self.tasks.clone();
        finish(async move { tasks.pause(&request.id).await }).await.map(|()| Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        let tasks = self.tasks.clone();
        finish(async move { tasks.resume(&request.id).await }).await.map(|()| Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        unimplemented("Checkpoint")
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        answer(async {
            let short = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
            let size = Size { height: short(request.height), width: short(request.width) };
            self.tasks.resize(&request.id, &request.exec_id, size)
        })
        .await
        .map(|()| Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        let tasks = self.tasks.clone();
        finish(async move { tasks.update(request).await }).await.map(|()| Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        answer(async {
            let stats = MessageField::some(self.tasks.stats(&request.id)?);
            Ok(StatsResponse { stats, ..Default::default() })
        })
        .await
    }
}
