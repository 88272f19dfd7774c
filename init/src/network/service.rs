//! The Network service's side of TTRPC.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use husk_protos::network::{ConfigureNetworkRequest, ConfigureNetworkResponse};
use husk_protos::network_ttrpc::Network as NetworkApi;
use ttrpc::r#async::TtrpcContext;

use super::apply::configure;
use super::error::NetworkError;
use super::model::Network;
use crate::error::{CallError, FailureKind};
use crate::rpc::handle_uninterrupted;

#[derive(Default)]
pub(crate) struct NetworkService {
    /// The configuration that the last request left.
    last: Arc<Mutex<Network>>,
}

#[async_trait]
impl NetworkApi for NetworkService {
    async fn configure(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> ttrpc::Result<ConfigureNetworkResponse> {
        let last = self.last.clone();
        handle_uninterrupted(async move {
            // On a thread of its own: the kernel's lock of the network configuration may be held for long, for example
            // while it destroys a container's network namespace, and PID 1 has to send heartbeats.
            tokio::task::spawn_blocking(move || configure(&request, &mut lock(&last)))
                .await
                .map_err(|e| CallError::internal("configure the network", &e))?
                .map_err(|e| call_error(&e))?;
            Ok(ConfigureNetworkResponse::default())
        })
        .await
    }
}

fn call_error(error: &NetworkError) -> CallError {
    let kind = match error {
        NetworkError::Invalid { .. } => FailureKind::InvalidArgument,
        NetworkError::NoDevice { .. } => FailureKind::NotFound,
        NetworkError::List(_) | NetworkError::Change { .. } | NetworkError::Netlink(_) => FailureKind::Internal,
    };
    CallError::new(kind, format!("configure the network: {}", Chain(error)))
}
