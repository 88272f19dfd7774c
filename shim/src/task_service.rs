//! containerd's Task service, versions 2 and 3. Relays each call to the sandbox and maps its errors to ttrpc codes.
//!
//! Calls that change something run in a task of their own: they complete even if the client disconnects.

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

use crate::guest::client::GuestError;
use crate::rootfs::share::ShareError;
use crate::sandbox::{ChangesError, DiskError, Sandbox, SandboxError};
use crate::state::StateError;
use crate::state::images::ImageLeaseError;
use crate::stdio::StdioError;
use crate::vm::FollowError;
use crate::vm::cgroup::CgroupError;

/// The service's name in containerd 1.x. Both versions have the same messages.
const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// The service under both names.
pub(crate) fn services(sandbox: Arc<Sandbox>) -> HashMap<String, Service> {
    let register = || create_task(Arc::new(TaskService(Calls { sandbox: sandbox.clone() })));
    let mut services = register();
    services.extend(register().into_iter().map(|(name, service)| {
        debug_assert_eq!(name, TASK_V3);
        (TASK_V2.to_owned(), service)
    }));
    services
}

struct TaskService(Calls);

/// How a service calls the sandbox.
pub(crate) struct Calls {
    pub(crate) sandbox: Arc<Sandbox>,
}

impl Calls {
    /// Converts the result of a call that may have been lost because the VM died.
    async fn response<T>(&self, result: Result<T, SandboxError>) -> ttrpc::Result<T> {
        match result {
            Ok(response) => Ok(response),
            Err(error) => Err(to_ttrpc(self.sandbox.explain(error).await)),
        }
    }

    /// Runs `call` to completion, even if the client disconnects.
    pub(crate) async fn detached<T, F>(&self, call: impl FnOnce(Arc<Sandbox>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, SandboxError>> + Send + 'static,
    {
        match tokio::spawn(call(self.sandbox.clone())).await {
            Ok(result) => self.response(result).await,
            Err(error) => Err(status(Code::INTERNAL, format!("the call ended without a response: {error}"))),
        }
    }
}

fn status(code: Code, text: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, text))
}

/// Maps an error to a ttrpc code. This is the only place that does so: containerd's clients branch on the codes.
pub(crate) fn to_ttrpc(error: SandboxError) -> ttrpc::Error {
    use SandboxError as Error;
    let code = match &error {
        // The guest's own status passes through unchanged.
        Error::Guest(GuestError::Call(ttrpc::Error::RpcStatus(status))) => {
            return ttrpc::Error::RpcStatus(status.clone());
        }
        Error::NotFound { .. } => Code::NOT_FOUND,
        Error::AlreadyExists { .. } => Code::ALREADY_EXISTS,
        Error::GuestNetwork(error) => match &**error {
            FollowError::Guest(GuestError::Call(ttrpc::Error::RpcStatus(status))) => status.code(),
            FollowError::Guest(_) | FollowError::Deadline(_) => Code::UNAVAILABLE,
            _ => Code::FAILED_PRECONDITION,
        },
        Error::Disk(DiskError::Guest { source: GuestError::Call(ttrpc::Error::RpcStatus(status)), .. }) => {
            status.code()
        }
        Error::Changes(ChangesError::Guest(GuestError::Call(ttrpc::Error::RpcStatus(status)))) => status.code(),
        Error::Disk(DiskError::Lease { source: ImageLeaseError::InUse(_), .. }) => Code::FAILED_PRECONDITION,
        Error::Stopping | Error::NotReady(_) | Error::NotStopped { .. } | Error::InitExited { .. } => {
            Code::FAILED_PRECONDITION
        }
        Error::Stdio(StdioError::Logger { .. }) => Code::INTERNAL,
        Error::Invalid(_)
        | Error::Stdio(_)
        | Error::State(StateError::Identifier { .. })
        | Error::Share(ShareError::Unsupported { .. })
        | Error::Disk(DiskError::Differs(_) | DiskError::Volume(_))
        | Error::Cgroup(CgroupError::Rejected { .. } | CgroupError::NoCpus { .. }) => Code::INVALID_ARGUMENT,
        Error::Unsupported(_) => Code::UNIMPLEMENTED,
        Error::Boot(_)
        | Error::Guest(_)
        | Error::Sockets(_)
        | Error::Affinity(_)
        | Error::Growth { .. }
        | Error::Changes(ChangesError::Dead(_) | ChangesError::Guest(_))
        | Error::VmDead { .. } => Code::UNAVAILABLE,
        Error::State(_)
        | Error::Folder(_)
        | Error::Format(_)
        | Error::Share(_)
        | Error::Disk(_)
        | Error::Layers(_)
        | Error::Changes(ChangesError::Incomplete { .. })
        | Error::Namespace(_)
        | Error::Cgroup(_)
        | Error::Holder(_)
        | Error::Hook(_)
        | Error::InvalidReply(_)
        | Error::Internal(_) => Code::INTERNAL,
    };
    status(code, Chain(&error).to_string())
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.0.detached(|sandbox| async move { sandbox.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self.0.detached(|sandbox| async move { sandbox.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.0.detached(|sandbox| async move { sandbox.exec(request).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.0.detached(|sandbox| async move { sandbox.delete(&request.id, &request.exec_id).await }).await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        self.0.response(self.0.sandbox.state(&request.id, &request.exec_id).await).await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.0.sandbox.wait(&request.id, &request.exec_id).await.map_err(to_ttrpc)?;
        Ok(WaitResponse { exit_status: exit.status, exited_at: MessageField::some(exit.at), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.0.detached(|sandbox| async move { sandbox.kill(request).await }).await?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.0.response(self.0.sandbox.pids(request).await).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.0.sandbox.close_io(&request.id, &request.exec_id, request.stdin).map_err(to_ttrpc)?;
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Works without the task too: after a restart containerd calls Connect to identify the shim.
        let task_pid = self.0.sandbox.pid(&request.id).unwrap_or(0);
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.0.detached(|sandbox| async move { sandbox.shutdown(request.now).await }).await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.0.detached(|sandbox| async move { sandbox.pause(request).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.0.detached(|sandbox| async move { sandbox.resume(request).await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.0.detached(|sandbox| async move { sandbox.update(request).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.0.response(self.0.sandbox.stats(request).await).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.0.sandbox.checkpoint(&request.id).map_err(to_ttrpc)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.0.response(self.0.sandbox.resize_pty(request).await).await?;
        Ok(Empty::new())
    }
}
