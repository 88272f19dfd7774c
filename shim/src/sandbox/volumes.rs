//! Folders and files of the host that containers can write to, and the warning when two sandboxes share one.

use std::collections::BTreeSet;
use std::path::PathBuf;

use husk_protos::chain::Chain;
use serde_json::json;

use crate::host::process::ProcessId;
use crate::rootfs::spec::Bind;
use crate::sandbox::registry::Sandbox;
use crate::state::journal::Journal;
use crate::state::lease::Holder;
use crate::state::recent::EventKind;
use crate::state::volumes::{SharedVolume, Volume, VolumeError};
use crate::state::{Owner, Step};

/// How many volumes of one sandbox the log warns of. `husk status` shows all.
const WARNINGS: usize = 64;

impl Sandbox {
    /// Leases what a container can write to, and warns if another sandbox can write to it too. A failure is logged: the
    /// container works without the warning.
    pub(super) async fn lease_volumes(&self, id: &str, binds: &[Bind]) {
        let writable: Vec<PathBuf> =
            binds.iter().filter(|bind| !bind.read_only).map(|bind| bind.source.clone()).collect();
        if writable.is_empty() {
            return;
        }
        let (journal, container) = (self.journal.clone(), id.to_owned());
        match blocking(move || lease(&journal, &container, &writable)).await {
            Ok(shared) => shared.into_iter().for_each(|shared| self.warn_of_shared(id, shared)),
            Err(error) => {
                tracing::warn!(container = id, error = %Chain(&error), "failed to look for sandboxes that share a volume");
            }
        }
    }

    /// What other running sandboxes can write to as well; empty if that cannot be determined.
    pub(super) async fn shared_volumes(&self) -> BTreeSet<SharedVolume> {
        let journal = self.journal.clone();
        blocking(move || shared(&journal)).await.unwrap_or_else(|error| {
            tracing::warn!(error = %Chain(&error), "failed to look for sandboxes that share a volume");
            BTreeSet::new()
        })
    }

    /// Warns once for each volume.
    fn warn_of_shared(&self, id: &str, shared: SharedVolume) {
        {
            let warned_of = &mut self.lock().warned_of;
            if warned_of.len() >= WARNINGS || !warned_of.insert(shared.path.clone()) {
                return;
            }
        }
        let SharedVolume { path, namespace, sandbox } = shared;
        let what = "another sandbox can write to the same volume: file locks and inotify do not work between two VMs";
        tracing::warn!(container = id, volume = %path.display(), sandbox, namespace, "{what}");
        let fields = json!({"container": id, "volume": path, "sandbox": sandbox, "namespace": namespace});
        self.recent().note(EventKind::Sandbox, what, fields);
    }
}

/// Runs file operations on a separate thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(VolumeError::Thread(std::io::Error::other(error))))
}

/// Leases a container's volumes, and returns those that the sandbox shares.
fn lease(journal: &Journal, container: &str, writable: &[PathBuf]) -> Result<BTreeSet<SharedVolume>, VolumeError> {
    // A source that is gone by now is not shared either: it was mounted before.
    let volumes: Vec<Volume> = writable.iter().filter_map(|path| Volume::at(path).ok()).collect();
    let shim = ProcessId::own().map_err(VolumeError::Shim)?;
    let (leases, holder) = journal.with(|state| {
        let (namespace, sandbox) = (state.namespace().to_owned(), state.sandbox().to_owned());
        Ok((state.volume_leases(), Holder { namespace, sandbox, shim }))
    })?;
    let step = Step::Volumes { container: container.to_owned(), leases: leases.clone(), shim };
    let record = || journal.record(&Owner::Container(container.to_owned()), [step]);
    leases.lease(container, volumes, &holder, record)?;
    Ok(leases.shared(&holder.namespace, &holder.sandbox)?)
}

fn shared(journal: &Journal) -> Result<BTreeSet<SharedVolume>, VolumeError> {
    let (leases, namespace, sandbox) =
        journal.with(|state| Ok((state.volume_leases(), state.namespace().to_owned(), state.sandbox().to_owned())))?;
    Ok(leases.shared(&namespace, &sandbox)?)
}
