//! Provides a VM with the service: on the VM's own vsock device, or through a file for the host's service (`host.rs`).

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream;
use husk_protos::PORT_METADATA;
use husk_protos::chain::Chain;
use husk_protos::metadata::GetMetadataResponse;
use husk_vsock::{Listener, VsockError};

use crate::config::settings::TokenSettings;
use crate::config::workspace::Workspace;
use crate::guest::link::Link;
use crate::metadata::issuer::{Issuer, response};
use crate::metadata::service::{MetadataSource, Refusal, serve};
use crate::metadata::token::Identity;

/// Why a VM cannot be provided with the service.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The service's port on the VM's device.
    #[error("listen on the metadata port")]
    Listen(#[from] VsockError),
    /// The workspace for the host's service.
    #[error("write the workspace {}", path.display())]
    Workspace {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// The file from which `husk metadata serve` reads the workspace of the sandbox with the folder `dir`.
pub(super) fn workspace_file(dir: &Path) -> PathBuf {
    dir.join("workspace")
}

/// Provides a VM with the service before the VM starts. On its own device, serves it; for the kernel's device, writes
/// the workspace to the sandbox's folder `dir`, where the host's service reads it.
///
/// # Errors
///
/// When the port is taken, or the workspace cannot be written.
pub(crate) fn provide(
    link: &Link,
    identity: Identity,
    tokens: &TokenSettings,
    workspace: Option<&Workspace>,
    dir: &Path,
) -> Result<(), MetadataError> {
    match link {
        Link::Own(device) => {
            let listener = device.listen(PORT_METADATA)?;
            // Ends with the device.
            tokio::spawn(serve_vm(listener, identity, tokens.clone(), workspace.cloned()));
            Ok(())
        }
        Link::Kernel(_) => {
            let path = workspace_file(dir);
            replace(&path, workspace).map_err(|source| MetadataError::Workspace { path, source })
        }
    }
}

/// Writes the workspace's file, or removes it. A failed boot may have left one.
fn replace(path: &Path, workspace: Option<&Workspace>) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let Some(workspace) = workspace else { return Ok(()) };
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(workspace.bytes())
}

/// The metadata of one VM.
pub(super) struct OneVm {
    pub(super) identity: Identity,
    pub(super) issuer: Issuer,
    pub(super) workspace: Option<Workspace>,
}

#[async_trait]
impl MetadataSource for OneVm {
    async fn get(&self, _cid: u32, audience: String) -> Result<GetMetadataResponse, Refusal> {
        Ok(response(self.issuer.issue(self.identity.clone(), audience).await?, self.workspace.as_ref()))
    }
}

/// Serves the VM behind `listener` until its device is removed.
pub(super) async fn serve_vm(
    listener: Listener,
    identity: Identity,
    settings: TokenSettings,
    workspace: Option<Workspace>,
) {
    let cid = identity.cid;
    let incoming = stream::unfold(listener, move |mut listener| async move {
        loop {
            match listener.accept().await {
                Ok(stream) => return Some(((stream, cid), listener)),
                Err(VsockError::Closed) => return None,
                // The guest has closed the connection, or descriptors are exhausted. The next connection may succeed.
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "failed to accept a connection to the metadata service");
                }
            }
        }
    });
    let source = OneVm { identity, issuer: Issuer::new(settings), workspace };
    serve(Box::pin(incoming), Arc::new(source)).await;
}
