//! The Network service's side of TTRPC.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use husk_protos::network::{
    ConfigureNetworkRequest, ConfigureNetworkResponse, NetworkStatusRequest, NetworkStatusResponse,
};
use husk_protos::network_ttrpc::Network as NetworkApi;
use ttrpc::r#async::TtrpcContext;

use super::apply::configure;
use super::driver::VirtioNet;
use super::error::NetworkError;
use super::model::Applied;
use super::status::status;
use crate::error::{CallError, FailureKind};
use crate::forward::names::Names;
use crate::rpc::{handle, handle_uninterrupted};

#[derive(Default)]
pub(crate) struct NetworkService {
    state: Arc<Mutex<(Applied, Names)>>,
}

#[async_trait]
impl NetworkApi for NetworkService {
    async fn configure(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> ttrpc::Result<ConfigureNetworkResponse> {
        let state = self.state.clone();
        let configure = move || {
            let (last, names) = &mut *lock(&state);
            configure(&request, last, &VirtioNet::default())?;
            names.relay_to(request.name_server_port).map_err(NetworkError::Names)
        };
        handle_uninterrupted(on_a_thread("configure the network", configure)).await?;
        Ok(ConfigureNetworkResponse::default())
    }

    async fn status(&self, _: &TtrpcContext, _: NetworkStatusRequest) -> ttrpc::Result<NetworkStatusResponse> {
        let links = handle(on_a_thread("read the state of the network", status)).await?;
        Ok(NetworkStatusResponse { links, ..Default::default() })
    }
}

/// Calls the kernel on a thread of its own. The kernel may hold its lock of the network configuration for long, for
/// example while it destroys a container's network namespace, and PID 1 must send heartbeats meanwhile.
async fn on_a_thread<T: Send + 'static>(
    operation: &str,
    call: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, CallError> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result.map_err(|error| call_error(operation, &error)),
        Err(error) => Err(CallError::internal(operation, &error)),
    }
}

fn call_error(operation: &str, error: &NetworkError) -> CallError {
    let kind = match error {
        NetworkError::Invalid { .. } => FailureKind::InvalidArgument,
        NetworkError::NoDevice { .. } => FailureKind::NotFound,
        NetworkError::Attach(_)
        | NetworkError::Detach { .. }
        | NetworkError::Names(_)
        | NetworkError::List(_)
        | NetworkError::Change { .. }
        | NetworkError::Sysctl { .. }
        | NetworkError::Netlink(_) => FailureKind::Internal,
    };
    CallError::new(kind, format!("{operation}: {}", Chain(error)))
}
