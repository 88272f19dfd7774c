//! The metadata service: tells a VM, or what runs in it beside the containers, who it is, so that it can prove it to others, and how its workspace is
//! configured. The caller is known by the VM that it calls from.
//!
//! | file           | what it is                                                          |
//! |----------------|---------------------------------------------------------------------|
//! | `key.rs`       | the host's key: made once, read anew for each token                 |
//! | `token.rs`     | the token (pure)                                                    |
//! | `service.rs`   | TTRPC on connections that may be hostile                            |
//! | `host.rs`      | answers for all VMs whose connections the kernel's vsock carries    |
//!
//! Neither the key nor the workspace shows in a log, an error, a kernel's command line or `state.json`.

pub mod host;
pub mod key;
mod service;
pub mod token;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use futures::stream;
use husk_protos::PORT_METADATA;
use husk_protos::metadata::GetMetadataResponse;
use tokio::sync::Semaphore;
use ttrpc::Code;

use crate::config::settings::TokenSettings;
use crate::config::workspace::Workspace;
use crate::guest::link::Link;
use husk_vsock::Listener;
use key::Key;
pub use service::{Refusal, Source, serve};
use token::Identity;

/// How often the log may say why there are no tokens: a guest decides how often it asks.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// Why a VM would be without the service.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its port cannot be listened on.
    #[error("metadata service: {0}")]
    Listen(#[from] husk_vsock::VsockError),
    /// The workspace cannot be put where the host's service finds it.
    #[error("write the workspace {}: {source}", path.display())]
    Workspace {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Issues tokens by the host's key.
pub struct Issuer {
    settings: TokenSettings,
    /// One reads the key at a time: should its disk hang, no more than one thread hangs with it.
    reading: Arc<Semaphore>,
    told: Mutex<Option<Instant>>,
}

impl Issuer {
    /// One that has not read the key: that is done when it is needed.
    pub fn new(settings: TokenSettings) -> Self {
        Self { settings, reading: Arc::new(Semaphore::new(1)), told: Mutex::new(None) }
    }

    /// A new token for a VM. Why there is none is for the host's log alone.
    ///
    /// # Errors
    ///
    /// When the key cannot be used.
    pub async fn issue(&self, identity: Identity) -> Result<String, Refusal> {
        // Never closed; were it, there would be no token.
        let turn = self.reading.clone().acquire_owned().await.map_err(|_| no_token())?;
        let TokenSettings { key, lifetime } = self.settings.clone();
        let issued = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let key = Key::read_or_make(&key)?;
            Ok::<_, key::KeyError>(token::issue(&key, &identity, SystemTime::now(), lifetime))
        });
        let why = match issued.await {
            Ok(Ok(token)) => return Ok(token),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        if self.may_tell() {
            tracing::error!(error = why, "a VM that asked for a token got none");
        }
        Err(no_token())
    }

    fn may_tell(&self) -> bool {
        let mut told = self.told.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let now = Instant::now();
        let due = told.is_none_or(|at| now.duration_since(at) >= TELL_AGAIN);
        if due {
            *told = Some(now);
        }
        due
    }
}

fn no_token() -> Refusal {
    let message = "the host cannot sign a token; its log says why".to_owned();
    Refusal { code: Code::FAILED_PRECONDITION, message }
}

/// What a VM is told.
pub fn response(token: String, workspace: Option<&Workspace>) -> GetMetadataResponse {
    let workspace = workspace.map(|workspace| workspace.bytes().to_vec());
    GetMetadataResponse { token, workspace, ..Default::default() }
}

/// Where `husk metadata serve` finds the workspace of the sandbox whose folder this is.
fn workspace_file(dir: &Path) -> PathBuf {
    dir.join("workspace")
}

/// Provides a VM that is not started yet with the service: on its own device, or by what the host's service needs, in the sandbox's folder `dir`.
///
/// # Errors
///
/// When the port is taken, or the workspace cannot be written.
pub fn provide(
    link: &Link,
    identity: Identity,
    tokens: &TokenSettings,
    workspace: Option<&Workspace>,
    dir: &Path,
) -> Result<(), Error> {
    match link {
        Link::Own(device) => {
            // Ends with the device.
            let listener = device.listen(PORT_METADATA)?;
            tokio::spawn(serve_vm(listener, identity, tokens.clone(), workspace.cloned()));
            Ok(())
        }
        Link::Kernel(_) => {
            let path = workspace_file(dir);
            // An earlier boot that failed may have left one.
            let removed = match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
            let write = |workspace: &Workspace| {
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
                file?.write_all(workspace.bytes())
            };
            let written = removed.and_then(|()| workspace.map_or(Ok(()), write));
            written.map_err(|source| Error::Workspace { path: path.clone(), source })
        }
    }
}

/// Answers for the one VM whose device it is.
struct OneVm {
    identity: Identity,
    issuer: Issuer,
    workspace: Option<Workspace>,
}

#[async_trait]
impl Source for OneVm {
    async fn get(&self, _cid: u32) -> Result<GetMetadataResponse, Refusal> {
        Ok(response(self.issuer.issue(self.identity.clone()).await?, self.workspace.as_ref()))
    }
}

/// Answers the VM behind `listener` until its device has ended.
pub async fn serve_vm(listener: Listener, identity: Identity, settings: TokenSettings, workspace: Option<Workspace>) {
    let cid = identity.cid;
    let incoming = stream::unfold(listener, move |mut listener| async move {
        loop {
            match listener.accept().await {
                Ok(stream) => return Some(((stream, cid), listener)),
                Err(husk_vsock::VsockError::Closed) => return None,
                // Closed by the guest, or out of descriptors: that connection is lost, the next may not be.
                Err(error) => tracing::warn!(%error, "a connection to the metadata service is lost"),
            }
        }
    });
    let source = OneVm { identity, issuer: Issuer::new(settings), workspace };
    serve(Box::pin(incoming), Arc::new(source)).await;
}

#[cfg(test)]
mod tests;
