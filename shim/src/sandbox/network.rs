//! The sandbox's network namespace on the host: the one that its first container names, or one that the shim creates.

use std::time::Duration;

use crate::network;
use crate::network::Claim;
use crate::prepare::Prepared;
use crate::rootfs::spec::NetworkRequest;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::sandbox::thread::blocking;

/// Deadline for the creation of a network namespace. It takes less than a millisecond, but waits while the host's
/// kernel removes other namespaces.
const CREATE: Duration = Duration::from_secs(10);

impl Sandbox {
    /// The network namespace of a container's processes on the host. If the container is the first, the VM is connected
    /// to it. `None` means the shim's own: the spec has no network namespace, so the container would use the host's
    /// network under runc.
    pub(super) async fn network_namespace(&self, prepared: &Prepared) -> Result<Option<Claim>, SandboxError> {
        let of_vm = self.lock().network.clone();
        match prepared.rewritten.network {
            NetworkRequest::OfHost(_) => Ok(prepared.network.clone()),
            NetworkRequest::New if of_vm.is_none() => self.private_network().await.map(Some),
            NetworkRequest::New | NetworkRequest::Shared => Ok(of_vm),
        }
    }

    /// The namespace that the shim has created; creates it if necessary.
    async fn private_network(&self) -> Result<Claim, SandboxError> {
        let existing = |sandbox: &Self| sandbox.lock().private_network.as_ref().map(|network| network.claim().clone());
        if let Some(claim) = existing(self) {
            return Ok(claim);
        }
        let created = blocking("create a network namespace", || network::create(CREATE)).await?;
        // Another container may have been faster. Then its namespace counts.
        Ok(self.lock().private_network.get_or_insert(created).claim().clone())
    }
}
