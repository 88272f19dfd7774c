//! containerd's Task service, versions 2 and 3: looks the task up in the sandbox and relays. Nothing is decided here.
//!
//! Calls that change something run in a task of their own: a client that goes away in the middle of a call must not leave
//! half of it done.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use husk_protos::chain::Chain;
use protobuf::MessageField;
use ttrpc::r#async::{Service, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::sandbox::{Error, Sandbox};

/// The name under which containerd 1.x knows the service; the messages are the same in both versions.
const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// The service under both its names.
pub fn services(sandbox: Arc<Sandbox>) -> HashMap<String, Service> {
    let register = || create_task(Arc::new(Tasks { sandbox: sandbox.clone() }));
    let mut services = register();
    services.extend(register().into_iter().map(|(name, service)| {
        debug_assert_eq!(name, TASK_V3);
        (TASK_V2.to_owned(), service)
    }));
    services
}

struct Tasks {
    sandbox: Arc<Sandbox>,
}

impl Tasks {
    async fn reply(&self, error: Error) -> ttrpc::Error {
        reply(self.sandbox.explain(error).await)
    }

    async fn answer<T>(&self, result: Result<T, Error>) -> ttrpc::Result<T> {
        match result {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.reply(error).await),
        }
    }

    /// Runs `call` to its end, whatever becomes of the client.
    async fn detached<T, F>(&self, call: impl FnOnce(Arc<Sandbox>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        match tokio::spawn(call(self.sandbox.clone())).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.reply(error).await),
            Err(error) => Err(status(Code::INTERNAL, format!("the call ended without an answer: {error}"))),
        }
    }
}

fn status(code: Code, text: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, text))
}

/// The one place where errors become codes: containerd's clients branch on them.
fn reply(error: Error) -> ttrpc::Error {
    let code = match &error {
        // The guest's own answer, code and all.
        Error::Guest(crate::guest::client::Error::Call(ttrpc::Error::RpcStatus(answer))) => {
            return ttrpc::Error::RpcStatus(answer.clone());
        }
        Error::NotFound { .. } => Code::NOT_FOUND,
        Error::AlreadyExists { .. } => Code::ALREADY_EXISTS,
        Error::Stopping | Error::NotStopped { .. } | Error::Ended { .. } => Code::FAILED_PRECONDITION,
        Error::Stdio(crate::stdio::StdioError::Logger { .. }) => Code::INTERNAL,
        Error::Invalid(_) | Error::Stdio(_) => Code::INVALID_ARGUMENT,
        Error::Unsupported(_) => Code::UNIMPLEMENTED,
        Error::Boot(_) | Error::Guest(_) | Error::Dead { .. } => Code::UNAVAILABLE,
        Error::State(_) | Error::Share(_) | Error::Hook(_) | Error::Task(_) => Code::INTERNAL,
    };
    status(code, Chain(&error).to_string())
}

#[async_trait]
impl Task for Tasks {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.detached(|sandbox| async move { sandbox.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self.detached(|sandbox| async move { sandbox.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.detached(|sandbox| async move { sandbox.exec(request).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.detached(|sandbox| async move { sandbox.delete(&request.id, &request.exec_id).await }).await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        self.answer(self.sandbox.state(&request.id, &request.exec_id).await).await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.sandbox.wait(&request.id, &request.exec_id).await.map_err(reply)?;
        Ok(WaitResponse { exit_status: exit.status, exited_at: MessageField::some(exit.at), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.detached(|sandbox| async move { sandbox.kill(request).await }).await?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.answer(self.sandbox.pids(request).await).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.sandbox.close_io(&request.id, &request.exec_id, request.stdin).map_err(reply)?;
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Also without the task: containerd asks a shim that it has found again who it is.
        let task_pid = self.sandbox.pid(&request.id).unwrap_or(0);
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.detached(|sandbox| async move { sandbox.shutdown(request.now).await }).await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.detached(|sandbox| async move { sandbox.pause(request).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.detached(|sandbox| async move { sandbox.resume(request).await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.detached(|sandbox| async move { sandbox.update(request).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.answer(self.sandbox.stats(request).await).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.sandbox.checkpoint(&request.id).map_err(reply)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.answer(self.sandbox.resize_pty(request).await).await?;
        Ok(Empty::new())
    }
}
