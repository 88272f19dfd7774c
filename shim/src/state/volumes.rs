//! Leases of the host's folders and files that a container can write to: the files
//! `<state>/.volumes/<shim's PID>-<container>`. Unlike other leases, they exclude nobody. They show which sandboxes share
//! a volume, because virtio-fs carries neither file locks nor inotify from one VM to another.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::StateError;
use super::lease::{Holder, LeaseDir, LeaseError};
use crate::host::process::ProcessId;

const DIR: &str = ".volumes";

/// Why volumes cannot be leased.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// A file operation failed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The undo step could not be recorded.
    #[error(transparent)]
    State(#[from] StateError),
    /// This process's start time.
    #[error("read the start time of this process")]
    Shim(#[source] io::Error),
    /// The thread of the file operations.
    #[error("the thread of the file operations has ended early")]
    Thread(#[source] io::Error),
}

/// A folder or file of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Volume {
    device: u64,
    inode: u64,
    path: PathBuf,
}

impl Volume {
    /// The folder or file at this path, which has no symbolic links.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        let metadata = path.symlink_metadata()?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino(), path: path.to_owned() })
    }

    /// Whether two volumes have files in common: a volume has another path in each pod that mounts it, and one volume
    /// may be a folder in the other.
    fn overlaps(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
            || self.path.starts_with(&other.path)
            || other.path.starts_with(&self.path)
    }
}

/// A folder or file of the host that two sandboxes can write to.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct SharedVolume {
    /// Its path in the spec of this sandbox's container, without symbolic links.
    pub path: PathBuf,
    /// containerd's namespace of the other sandbox.
    pub namespace: String,
    /// The other sandbox.
    pub sandbox: String,
}

/// The contents of a lease.
#[derive(Debug, Serialize, Deserialize)]
struct Lease {
    #[serde(flatten)]
    holder: Holder,
    volumes: Vec<Volume>,
}

/// The leases of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct VolumeLeases {
    dir: LeaseDir,
}

fn name(container: &str, shim: ProcessId) -> String {
    format!("{}-{container}", shim.pid)
}

impl VolumeLeases {
    /// The leases that are kept beside the sandboxes under `base`.
    pub(crate) fn under(base: &Path) -> Self {
        Self { dir: LeaseDir::under(base, DIR) }
    }

    /// Leases the volumes of a container. `record` runs before the lease is written.
    ///
    /// # Errors
    /// A failed file operation, or an error of `record`.
    pub(crate) fn lease(
        &self,
        container: &str,
        volumes: Vec<Volume>,
        holder: &Holder,
        record: impl FnOnce() -> Result<(), StateError>,
    ) -> Result<(), VolumeError> {
        if volumes.is_empty() {
            return Ok(());
        }
        record()?;
        let locked = self.dir.lock()?;
        let lease = Lease { holder: holder.clone(), volumes };
        Ok(self.dir.write(&locked, &name(container, holder.shim), &lease)?)
    }

    /// The volumes that a sandbox shares with others that run.
    ///
    /// # Errors
    /// A failed file operation.
    pub(crate) fn shared(&self, namespace: &str, sandbox: &str) -> Result<BTreeSet<SharedVolume>, LeaseError> {
        let mut leases = Vec::new();
        for name in self.dir.names()? {
            // None: released in the meantime.
            leases.extend(self.dir.read::<Lease>(&name)?.map(|lease| (name, lease)));
        }
        let (own, others): (Vec<_>, Vec<_>) = leases
            .into_iter()
            .partition(|(_, lease)| (&*lease.holder.namespace, &*lease.holder.sandbox) == (namespace, sandbox));
        let own: Vec<Volume> = own.into_iter().flat_map(|(_, lease)| lease.volumes).collect();
        let mut shared = BTreeSet::new();
        for (name, other) in others {
            let overlaps = |volume: &&Volume| other.volumes.iter().any(|theirs| volume.overlaps(theirs));
            let common: Vec<&Volume> = own.iter().filter(overlaps).collect();
            if common.is_empty() || !self.dir.lives(&name, &other.holder)? {
                continue;
            }
            shared.extend(common.into_iter().map(|volume| SharedVolume {
                path: volume.path.clone(),
                namespace: other.holder.namespace.clone(),
                sandbox: other.holder.sandbox.clone(),
            }));
        }
        Ok(shared)
    }

    /// Releases a container's lease, unless another shim holds it by now.
    ///
    /// # Errors
    /// A failed file operation.
    pub(crate) fn release(&self, container: &str, shim: ProcessId) -> Result<(), LeaseError> {
        self.dir.release([name(container, shim)], shim)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::state::{Owner, State, Step};

    fn holder(sandbox: &str, shim: ProcessId) -> Holder {
        Holder { namespace: "ns".into(), sandbox: sandbox.into(), shim }
    }

    #[test]
    fn sandboxes_that_share_a_volume_are_named_on_both_sides() {
        let (base, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let leases = VolumeLeases::under(base.path());
        let own = ProcessId::own().unwrap();
        for folder in ["data/below", "database", "other"] {
            fs::create_dir_all(host.path().join(folder)).unwrap();
        }
        let volume = |path: &str| Volume::at(&host.path().join(path)).unwrap();
        // The same folder by another path, as in another pod.
        let elsewhere = Volume { path: "/elsewhere".into(), ..volume("other") };
        let table = [
            ("one", vec![volume("data"), volume("other")]),
            ("two", vec![volume("data/below")]),
            ("three", vec![elsewhere]),
            ("four", vec![volume("database")]),
        ];
        for (sandbox, volumes) in table {
            leases.lease(sandbox, volumes, &holder(sandbox, own), || Ok(())).unwrap();
        }
        // A second container of the same sandbox.
        leases.lease("side", vec![volume("data")], &holder("one", own), || Ok(())).unwrap();
        let shared = |sandbox: &str| {
            let shared = leases.shared("ns", sandbox).unwrap().into_iter();
            shared.map(|shared| format!("{} {}", shared.path.display(), shared.sandbox)).collect::<Vec<_>>()
        };
        let path = |name: &str| host.path().join(name).display().to_string();
        assert_eq!(shared("one"), [format!("{} two", path("data")), format!("{} three", path("other"))]);
        assert_eq!(shared("two"), [format!("{} one", path("data/below"))]);
        assert_eq!(shared("three"), ["/elsewhere one"]);
        assert!(shared("four").is_empty());
        leases.release("two", own).unwrap();
        assert_eq!(shared("one"), [format!("{} three", path("other"))]);
    }

    #[test]
    fn a_dead_shim_shares_nothing_and_its_cleanup_releases_its_lease() {
        let (base, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut state = State::create(base.path(), "ns", "old").unwrap();
        let leases = state.volume_leases();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let shim = ProcessId::of(child.id()).unwrap().unwrap();
        let volume = || vec![Volume::at(host.path()).unwrap()];
        let step = Step::Volumes { container: "old".into(), leases: leases.clone(), shim };
        let record = || state.record(&Owner::Container("old".into()), [step]);
        leases.lease("old", volume(), &holder("old", shim), record).unwrap();
        leases.lease("new", volume(), &holder("new", ProcessId::own().unwrap()), || Ok(())).unwrap();
        assert_eq!(leases.shared("ns", "new").unwrap().len(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(leases.shared("ns", "new").unwrap().is_empty());
        drop(state);
        State::load(base.path(), "ns", "old").unwrap().undo_all(Duration::from_secs(1)).unwrap();
        assert_eq!(leases.dir.names().unwrap(), [name("new", ProcessId::own().unwrap())]);
    }
}
