//! containerd's Sandbox service, version 1 (`containerd.runtime.sandbox.v1`): the lifecycle of a sandbox apart from its
//! containers. containerd 2 uses it for runtimes with `sandboxer = "shim"`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox as SandboxApi, create_sandbox};
use containerd_shim_protos::types::platform::Platform;
use husk_protos::METRICS;
use husk_protos::sandbox_update::{UpdateSandboxRequest, UpdateSandboxResponse};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::proto::{Request, Response};

use crate::sandbox::{Sandbox, SandboxError};
use crate::task_service::{Calls, to_ttrpc};

/// States of a sandbox, by their names in Kubernetes' Container Runtime Interface.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// The type of a spec in JSON.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// The service by its name.
pub(crate) fn services(sandbox: Arc<Sandbox>) -> HashMap<String, Service> {
    let mut services = create_sandbox(Arc::new(SandboxService(Calls { sandbox: sandbox.clone() })));
    for service in services.values_mut() {
        let update = UpdateMethod { service: Updates(Calls { sandbox: sandbox.clone() }) };
        service.methods.insert("UpdateSandbox".to_owned(), Box::new(update));
    }
    services
}

struct SandboxService(Calls);

/// UpdateSandbox, which the generated service lacks.
struct UpdateMethod {
    service: Updates,
}

struct Updates(Calls);

impl Updates {
    async fn update_sandbox(
        &self,
        _: &TtrpcContext,
        request: UpdateSandboxRequest,
    ) -> ttrpc::Result<UpdateSandboxResponse> {
        self.0.detached(|sandbox| async move { sandbox.update_sandbox(&request).await }).await?;
        Ok(UpdateSandboxResponse::new())
    }
}

#[async_trait]
impl MethodHandler for UpdateMethod {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        ttrpc::async_request_handler!(self, context, request, UpdateSandboxRequest, update_sandbox);
    }
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.0.sandbox.create_sandbox(&request).map_err(to_ttrpc)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let start = |sandbox: Arc<Sandbox>| async move { sandbox.start_sandbox(&request.sandbox_id).await };
        let (started, spec) = self.0.detached(start).await?;
        let spec = Any { type_url: SPEC.to_owned(), value: spec, ..Default::default() };
        Ok(StartSandboxResponse {
            pid: started.pid,
            created_at: MessageField::some(started.at),
            spec: MessageField::some(spec),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let platform = Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), ..Default::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        let timeout = (request.timeout_secs > 0).then(|| Duration::from_secs(request.timeout_secs.into()));
        let stop = |sandbox: Arc<Sandbox>| async move { sandbox.stop_sandbox(&request.sandbox_id, timeout).await };
        self.0.detached(stop).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.0.sandbox.wait_sandbox(&request.sandbox_id).await.map_err(to_ttrpc)?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let sandbox = &self.0.sandbox;
        let state = sandbox.sandbox_state(&request.sandbox_id).await.map_err(to_ttrpc)?;
        let mut info = HashMap::new();
        if request.verbose
            && let Ok(status) = sandbox.status().await
        {
            let status = serde_json::to_string(&status)
                .map_err(|error| to_ttrpc(SandboxError::Internal(format!("encode the status: {error}"))))?;
            info.insert("husk".to_owned(), status);
        }
        let ready = state.started.is_some() && state.exit.is_none();
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: state.started.as_ref().map_or(0, |started| started.pid),
            state: if ready { READY } else { NOT_READY }.to_owned(),
            info,
            created_at: state.started.map(|started| started.at).into(),
            exited_at: state.exit.map(|exit| exit.at).into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.0.sandbox.ping_sandbox(&request.sandbox_id).map_err(to_ttrpc)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let shutdown = |sandbox: Arc<Sandbox>| async move { sandbox.shutdown_sandbox(&request.sandbox_id).await };
        self.0.detached(shutdown).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let id = request.sandbox_id.clone();
        let usage = self.0.detached(|sandbox| async move { sandbox.sandbox_usage(&id).await }).await?;
        let cpu = CPUStat {
            usage_usec: usage.user_usec + usage.system_usec,
            user_usec: usage.user_usec,
            system_usec: usage.system_usec,
            ..Default::default()
        };
        // The guest's memory is anonymous memory of the VM's processes. None of it can be reclaimed as a file's could.
        let memory = MemoryStat { usage: usage.memory, anon: usage.memory, ..Default::default() };
        let metrics = Metrics { cpu: Some(cpu).into(), memory: Some(memory).into(), ..Default::default() };
        let value = metrics
            .write_to_bytes()
            .map_err(|error| to_ttrpc(SandboxError::Internal(format!("encode the metrics: {error}"))))?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(Timestamp::now());
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(Any { type_url: METRICS.to_owned(), value, ..Default::default() });
        Ok(response)
    }
}
