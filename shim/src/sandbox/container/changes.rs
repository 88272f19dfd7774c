//! The changes to a root filesystem that a container has made on a disk of its VM. The guest copies them to the filesystem
//! in the share, where the host sees them: before the container's exit is known, and whenever it is paused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use husk_protos::bundle::{CopyBackRequest, CopyBackResponse, DiskFolder};
use husk_protos::chain::Chain;
use serde_json::json;
use tokio::sync::Mutex;
use ttrpc::context::with_duration;

use crate::guest::client::GuestError;
use crate::host::text::clean;
use crate::state::recent::{EventKind, Recent};
use crate::vm::Vm;

/// How much longer than the guest the host waits.
const MARGIN: Duration = Duration::from_secs(5);
/// How much of a guest's message is kept, bytes.
const SHOWN: usize = 512;

/// Why a container's changes are not in its snapshot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangesError {
    #[error("the VM is dead: {0}")]
    Dead(String),
    #[error("copy the changes of the root filesystem to the host")]
    Guest(#[source] GuestError),
    #[error("{failed} files of the root filesystem were not copied to the host: {first}")]
    Incomplete { failed: u64, first: String },
}

/// The changes of one container.
pub(crate) struct Changes {
    vm: Arc<Vm>,
    recent: Recent,
    container: String,
    upper: DiskFolder,
    target: DiskFolder,
    /// The overlay, if its lower layers are images.
    merged: Option<DiskFolder>,
    timeout: Duration,
    /// The container's program may have changed something.
    started: AtomicBool,
    /// Locked while the guest copies. True after the last copy.
    finished: Mutex<bool>,
}

impl Changes {
    /// The changes in the first folder of the guest, which belong to the second one. `merged` is the overlay, if its lower
    /// layers are images.
    pub(crate) fn new(
        vm: Arc<Vm>,
        recent: Recent,
        container: &str,
        [upper, target]: [DiskFolder; 2],
        merged: Option<DiskFolder>,
        timeout: Duration,
    ) -> Self {
        let (container, started, finished) = (container.to_owned(), AtomicBool::new(false), Mutex::new(false));
        Self { vm, recent, container, upper, target, merged, timeout, started, finished }
    }

    /// Notes that the container's program runs.
    pub(super) fn note_start(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    /// Copies the changes of a container whose processes have ended. Only the first call does. What cannot be copied is
    /// lost, which is logged.
    pub(super) async fn finish(&self) {
        let mut finished = self.finished.lock().await;
        if !std::mem::replace(&mut *finished, true) && self.started.load(Ordering::Relaxed) {
            // It has been logged.
            let _ = self.copy(true, "changes of the container's root filesystem are lost").await;
        }
    }

    /// Copies the changes of a container whose processes are frozen.
    ///
    /// # Errors
    /// What could not be copied.
    pub(crate) async fn copy_paused(&self) -> Result<(), ChangesError> {
        let finished = self.finished.lock().await;
        if *finished {
            return Ok(());
        }
        self.copy(false, "the host does not have all changes of the paused container's root filesystem").await
    }

    /// Copies. No other copy follows the `last` one.
    async fn copy(&self, last: bool, failure: &'static str) -> Result<(), ChangesError> {
        let container = self.container.as_str();
        let copied = match self.call(last).await {
            Ok(CopyBackResponse { entries, bytes, failed: 0, rejected, rejection, .. }) => {
                tracing::info!(container, entries, bytes, "changes of the root filesystem copied to the host");
                if rejected > 0 {
                    let first = shortened(&rejection);
                    tracing::warn!(container, rejected, first, "the snapshot does not accept some extended attributes");
                }
                Ok(())
            }
            Ok(CopyBackResponse { failed, failure, .. }) => {
                Err(ChangesError::Incomplete { failed, first: shortened(&failure) })
            }
            Err(error) => Err(error),
        };
        if let Err(error) = &copied {
            let error = Chain(error).to_string();
            tracing::error!(container, error, "{failure}");
            self.recent.note(EventKind::Sandbox, failure, json!({"container": container, "error": error}));
        }
        copied
    }

    async fn call(&self, last: bool) -> Result<CopyBackResponse, ChangesError> {
        if let Some(cause) = self.vm.cause_of_death() {
            return Err(ChangesError::Dead(cause));
        }
        let request = CopyBackRequest {
            id: self.container.clone(),
            upper: Some(self.upper.clone()).into(),
            target: Some(self.target.clone()).into(),
            merged: self.merged.clone().into(),
            last,
            timeout_ms: self.timeout.as_millis().try_into().unwrap_or(u64::MAX),
            ..Default::default()
        };
        let call = self.vm.guest.bundle.copy_back(with_duration(self.timeout + MARGIN), &request);
        tokio::select! {
            response = call => match response {
                Ok(response) => Ok(response),
                Err(error) => match self.vm.cause_of_death() {
                    Some(cause) => Err(ChangesError::Dead(cause)),
                    None => Err(ChangesError::Guest(error.into())),
                },
            },
            cause = self.vm.died() => Err(ChangesError::Dead(cause)),
        }
    }
}

/// A message of the guest.
fn shortened(text: &str) -> String {
    clean(&text[..text.floor_char_boundary(SHOWN)])
}
