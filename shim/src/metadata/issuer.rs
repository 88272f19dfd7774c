//! Issues tokens with the host's key, and builds the service's responses.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use husk_protos::metadata::GetMetadataResponse;
use nix::unistd::gethostname;
use tokio::sync::Semaphore;
use ttrpc::Code;

use crate::config::settings::TokenSettings;
use crate::config::workspace::Workspace;
use crate::metadata::key::{Key, KeyError};
use crate::metadata::service::Refusal;
use crate::metadata::token::{self, Identity, Occasion};

/// Interval between two log lines about an unusable key: a guest decides how often it asks for a token.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Why a token cannot be issued.
#[derive(Debug, thiserror::Error)]
enum IssueError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("read the host's name")]
    Host(#[source] std::io::Error),
    #[error("read random bytes for the token's ID")]
    Random(#[source] getrandom::Error),
}

/// Issues tokens with the host's key.
pub(super) struct Issuer {
    pub(super) settings: TokenSettings,
    /// Lets one request read the key at a time: a hanging disk blocks one thread only.
    reading: Arc<Semaphore>,
    logged: Mutex<Option<Instant>>,
}

impl Issuer {
    /// An issuer that reads the key when a token is requested.
    pub(super) fn new(settings: TokenSettings) -> Self {
        Self { settings, reading: Arc::new(Semaphore::new(1)), logged: Mutex::new(None) }
    }

    /// Issues a token with which a VM proves its identity to `audience`. The reason of a failure appears in the host's log
    /// only.
    ///
    /// # Errors
    ///
    /// When the key cannot be used.
    pub(super) async fn issue(&self, identity: Identity, audience: String) -> Result<String, Refusal> {
        // The semaphore is never closed.
        let permit = self.reading.clone().acquire_owned().await.map_err(|_| no_token())?;
        let settings = self.settings.clone();
        let issued = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            issue(&settings, &identity, audience)
        });
        let error = match issued.await {
            Ok(Ok(token)) => return Ok(token),
            Ok(Err(error)) => Chain(&error).to_string(),
            Err(error) => Chain(&error).to_string(),
        };
        if self.may_log() {
            tracing::error!(error, "failed to issue a token for a VM");
        }
        Err(no_token())
    }

    pub(super) fn may_log(&self) -> bool {
        let mut logged = lock(&self.logged);
        let now = Instant::now();
        let due = logged.is_none_or(|at| now.duration_since(at) >= LOG_INTERVAL);
        if due {
            *logged = Some(now);
        }
        due
    }
}

fn issue(settings: &TokenSettings, identity: &Identity, audience: String) -> Result<String, IssueError> {
    let key = Key::read_or_create(&settings.key)?;
    let host = match &settings.host {
        Some(host) => host.clone(),
        None => gethostname().map_err(|error| IssueError::Host(error.into()))?.to_string_lossy().into_owned(),
    };
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(IssueError::Random)?;
    let occasion = Occasion { audience, host, id, now: SystemTime::now(), lifetime: settings.lifetime };
    Ok(token::issue(&key, identity, &occasion))
}

fn no_token() -> Refusal {
    let message = "the host cannot sign a token; the host's log has the reason".to_owned();
    Refusal { code: Code::FAILED_PRECONDITION, message }
}

/// The response for a VM.
pub(super) fn response(token: String, workspace: Option<&Workspace>) -> GetMetadataResponse {
    let workspace = workspace.map(|workspace| workspace.bytes().to_vec());
    GetMetadataResponse { token, workspace, ..Default::default() }
}
