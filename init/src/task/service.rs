//! containerd's Task service: maps each call onto [`Tasks`].

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
use super::container::FreezerState;
use super::events::timestamp;
use super::process::ProcessState;
use crate::error::{CallError, FailureKind};
use crate::io::Size;
use crate::reaper::Exit;
use crate::report::Reports;
use crate::roots;
use crate::rpc::{handle, handle_uninterrupted};
use crate::supervisor::Supervisor;

/// How long Shutdown waits for the last reports to be sent before it replies, which lets the host end the VM.
const LAST_REPORTS: Duration = Duration::from_millis(500);

pub(crate) struct TaskService {
    pub(crate) tasks: Arc<Tasks>,
    /// Shutdown stops the supervisor agent.
    pub(crate) supervisor: Option<Arc<Supervisor>>,
    /// Shutdown sends the reports that are left.
    pub(crate) reports: Reports,
    /// A message on this channel ends the guest.
    pub(crate) end: mpsc::Sender<()>,
}

fn unimplemented<T>(call: &str) -> ttrpc::Result<T> {
    Err(CallError::new(FailureKind::Unimplemented, format!("{call} is not implemented by the guest")).into())
}

fn exit_of(state: ProcessState) -> Option<Exit> {
    if let ProcessState::Stopped { exit, .. } = state { Some(exit) } else { None }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let tasks = self.tasks.clone();
        let pid = handle_uninterrupted(async move { tasks.create(request).await }).await?;
        Ok(CreateTaskResponse { pid: pid as u32, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let tasks = self.tasks.clone();
        let pid = handle_uninterrupted(async move { tasks.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid: pid as u32, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let tasks = self.tasks.clone();
        let deleted = handle_uninterrupted(async move { tasks.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid: deleted.pid as u32,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(timestamp(deleted.exit.at)),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        handle(async { self.tasks.add_exec(request) }).await.map(|()| Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        handle(async { self.tasks.kill(&request.id, &request.exec_id, request.signal, request.all) })
            .await
            .map(|()| Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        handle(async {
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

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        handle(async {
            let container = self.tasks.container(&request.id)?;
            let process = container.process(&request.exec_id)?;
            let state = process.state();
            let status = match state {
                ProcessState::Added | ProcessState::Created { .. } | ProcessState::Starting { .. } => Status::CREATED,
                // Also for execs: pausing a container pauses all its processes.
                ProcessState::Running { .. } => match container.freezer() {
                    FreezerState::Thawed => Status::RUNNING,
                    FreezerState::Freezing => Status::PAUSING,
                    FreezerState::Frozen | FreezerState::Thawing => Status::PAUSED,
                },
                ProcessState::Stopped { .. } | ProcessState::Deleted => Status::STOPPED,
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

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        handle(async {
            let processes = self.tasks.pids(&request.id)?;
            Ok(PidsResponse { processes, ..Default::default() })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        handle(async {
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

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        handle(async {
            let process = self.tasks.container(&request.id)?.process(&request.exec_id)?;
            if request.stdin {
                process.streams.close_stdin();
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let (tasks, supervisor, reports) = (self.tasks.clone(), self.supervisor.clone(), self.reports.clone());
        handle_uninterrupted(async move {
            // Concurrently: each has a grace period of several seconds, and the host waits for both.
            tokio::join!(tasks.stop_all(), async {
                if let Some(supervisor) = supervisor {
                    supervisor.stop().await;
                }
            });
            roots::unmount_all();
            tasks.disks.unmount_all();
            // Before the reply: the host ends the VM as soon as it receives it. Blocking is harmless now, because no
            // other work is left.
            nix::unistd::sync();
            // The host reads no report after the reply. The timeout is for a host that has stopped reading.
            let _ = timeout(LAST_REPORTS, reports.flush()).await;
            Ok(())
        })
        .await?;
        // A full channel means that another Shutdown was here first.
        let _ = self.end.try_send(());
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let tasks = self.tasks.clone();
        handle_uninterrupted(async move { tasks.pause(&request.id).await }).await.map(|()| Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let tasks = self.tasks.clone();
        handle_uninterrupted(async move { tasks.resume(&request.id).await }).await.map(|()| Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        unimplemented("Checkpoint")
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        handle(async {
            let short = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
            let size = Size { height: short(request.height), width: short(request.width) };
            self.tasks.resize(&request.id, &request.exec_id, size)
        })
        .await
        .map(|()| Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let tasks = self.tasks.clone();
        handle_uninterrupted(async move { tasks.update(request).await }).await.map(|()| Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        handle(async {
            let stats = MessageField::some(self.tasks.stats(&request.id)?);
            Ok(StatsResponse { stats, ..Default::default() })
        })
        .await
    }
}
