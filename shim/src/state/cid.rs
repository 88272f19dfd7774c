//! Leases of CIDs, the guests' addresses on the kernel's vsock device. CIDs are unique per host, so each sandbox leases
//! one. A lease is a file that names its holder, `<state>/.cids/<cid>`, created and removed under a lock. No
//! namespace's name begins with a dot.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::error::StateError;
use crate::host::process::ProcessId;

/// The kernel reserves 0 to 2 (vsock(7)). The shim's own vsock device gives 3 to each of its guests.
pub(crate) const CIDS: RangeInclusive<u32> = 4..=65535;
const DIR: &str = ".cids";
const LOCK: &str = "lock";
/// How long to wait for the lock: a holder only lists a directory.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to lock: flock(2) has no deadline.
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// The holder of a CID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holder {
    /// containerd's namespace.
    pub(crate) namespace: String,
    pub(crate) sandbox: String,
    /// The sandbox's shim. After its death another sandbox may take the lease over.
    pub(crate) shim: ProcessId,
}

/// Why a lease cannot be made, read or released.
#[derive(Debug, thiserror::Error)]
pub enum CidError {
    /// A file operation failed.
    #[error("{what} {}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// Its file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The kernel's vsock device rejected the CID.
    #[error("claim vsock CID {cid}")]
    Claim {
        /// The CID.
        cid: u32,
        /// The system's error.
        source: io::Error,
    },
    /// The undo step could not be recorded.
    #[error(transparent)]
    State(#[from] StateError),
    /// No CID is free.
    #[error("no vsock CID is free: all of {} to {} are in use", CIDS.start(), CIDS.end())]
    Exhausted,
}

/// The leases of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Leases {
    dir: PathBuf,
}

impl Leases {
    /// The leases that are kept beside the sandboxes under `base`.
    pub(crate) fn under(base: &Path) -> Self {
        Self { dir: base.join(DIR) }
    }

    /// Leases a CID of `among`: the first without a lease, or else the first whose holder is dead. `claim` reserves the
    /// CID in the kernel and returns false if another program's guest has it. `record` runs before the lease is
    /// written.
    ///
    /// # Errors
    /// No CID is free, or a file operation, `record` or `claim` failed.
    pub(crate) fn lease(
        &self,
        among: RangeInclusive<u32>,
        holder: &Holder,
        record: &mut dyn FnMut(u32) -> Result<(), StateError>,
        claim: &mut dyn FnMut(u32) -> io::Result<bool>,
    ) -> Result<u32, CidError> {
        let _lock = self.lock()?;
        // Try unleased CIDs first: checking whether a holder is alive is the slowest part, and other shims wait for the
        // lock.
        let leased = self.leased()?;
        let (taken, free): (Vec<u32>, Vec<u32>) = among.partition(|cid| leased.contains(cid));
        for cid in free.into_iter().chain(taken) {
            if leased.contains(&cid) && self.is_held(cid)?
                || !claim(cid).map_err(|source| CidError::Claim { cid, source })?
            {
                continue;
            }
            record(cid)?;
            self.write(cid, holder)?;
            return Ok(cid);
        }
        Err(CidError::Exhausted)
    }

    /// Returns the holder of a CID, `None` if there is none or if the lease cannot be decoded.
    ///
    /// # Errors
    /// The lease's file cannot be read.
    pub(crate) fn holder(&self, cid: u32) -> Result<Option<Holder>, CidError> {
        let path = self.path(cid);
        match fs::read(&path) {
            // A damaged lease counts as free: the kernel still protects a running guest's CID.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CidError::Io { what: "read", path, source }),
        }
    }

    /// Releases a CID, unless another shim holds it by now.
    ///
    /// # Errors
    /// A file operation failed.
    pub(crate) fn release(&self, cid: u32, shim: ProcessId) -> Result<(), CidError> {
        if !self.dir.exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        if self.holder(cid)?.is_none_or(|holder| holder.shim != shim) {
            return Ok(());
        }
        let path = self.path(cid);
        fs::remove_file(&path).map_err(|source| CidError::Io { what: "remove", path, source })
    }

    fn leased(&self) -> Result<HashSet<u32>, CidError> {
        let failed = |source| CidError::Io { what: "list", path: self.dir.clone(), source };
        let listing =
            fs::read_dir(&self.dir).and_then(|entries| entries.collect::<io::Result<Vec<_>>>()).map_err(failed)?;
        Ok(listing.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }

    fn is_held(&self, cid: u32) -> Result<bool, CidError> {
        let Some(holder) = self.holder(cid)? else { return Ok(false) };
        holder.shim.runs().map_err(|source| CidError::Io {
            what: "look for the holder of",
            path: self.path(cid),
            source,
        })
    }

    /// Writes a lease by rename: readers do not take the lock and must never see a part of it.
    fn write(&self, cid: u32, holder: &Holder) -> Result<(), CidError> {
        let (path, new) = (self.path(cid), self.dir.join("new"));
        let write = || -> io::Result<()> {
            let bytes = serde_json::to_vec(holder)?;
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?.write_all(&bytes)?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| CidError::Io { what: "write", path, source })
    }

    fn path(&self, cid: u32) -> PathBuf {
        self.dir.join(cid.to_string())
    }

    fn lock(&self) -> Result<Flock<File>, CidError> {
        let path = self.dir.join(LOCK);
        let failed = |source| CidError::Io { what: "lock", path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(failed)?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = file.map_err(failed)?;
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((unlocked, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < deadline => file = unlocked,
                Err((_, error)) => return Err(failed(error.into())),
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::{Child, Command};
    use std::sync::Mutex;

    use husk_protos::chain::Chain;

    use super::*;

    fn holder(shim: ProcessId) -> Holder {
        Holder { namespace: "ns".into(), sandbox: "s1".into(), shim }
    }

    fn own() -> Holder {
        holder(ProcessId::own().unwrap())
    }

    fn lease(leases: &Leases, among: RangeInclusive<u32>, holder: &Holder) -> Result<u32, CidError> {
        leases.lease(among, holder, &mut |_| Ok(()), &mut |_| Ok(true))
    }

    /// A process that stands in for a shim.
    fn shim() -> (Child, ProcessId) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        (child, id)
    }

    #[test]
    fn each_sandbox_gets_its_own_cid_and_a_released_one_is_leased_again() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        assert_eq!([4, 5, 6].map(|_| lease(&leases, 4..=6, &own()).unwrap()), [4, 5, 6]);
        let exhausted = lease(&leases, 4..=6, &own()).unwrap_err().to_string();
        assert_eq!(exhausted, "no vsock CID is free: all of 4 to 65535 are in use");
        leases.release(5, own().shim).unwrap();
        assert_eq!(leases.holder(5).unwrap(), None);
        leases.release(5, own().shim).unwrap();
        assert_eq!(lease(&leases, 4..=6, &own()).unwrap(), 5);
        assert_eq!(leases.holder(5).unwrap(), Some(own()));
        assert_eq!((*CIDS.start(), *CIDS.end()), (4, 65535));
    }

    #[test]
    fn concurrent_leases_never_share_a_cid() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        // Each thread locks through its own descriptor, as processes do.
        let leased = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..16 {
                        let cid = lease(&leases, CIDS, &own()).unwrap();
                        leased.lock().unwrap().push(cid);
                    }
                });
            }
        });
        let leased = leased.into_inner().unwrap();
        assert_eq!(leased.iter().collect::<BTreeSet<_>>().len(), 128, "{leased:?}");
        assert_eq!(leased.iter().max(), Some(&131));
    }

    #[test]
    fn a_dead_shims_lease_is_taken_over_and_its_cleanup_leaves_the_new_lease() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        let (mut child, dead) = shim();
        assert_eq!(lease(&leases, 4..=5, &holder(dead)).unwrap(), 4);
        assert_eq!(lease(&leases, 4..=5, &own()).unwrap(), 5);
        assert!(lease(&leases, 4..=5, &own()).is_err(), "a running shim's lease was taken");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(lease(&leases, 4..=6, &own()).unwrap(), 6, "a dead shim's lease was preferred to an unused CID");
        assert_eq!(lease(&leases, 4..=6, &own()).unwrap(), 4);
        leases.release(4, dead).unwrap();
        assert_eq!(leases.holder(4).unwrap(), Some(own()), "the new holder's lease was removed");
    }

    #[test]
    fn a_cid_that_the_kernel_has_given_away_is_skipped_and_each_lease_is_recorded_first() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        fs::create_dir_all(base.path().join(DIR)).unwrap();
        fs::write(base.path().join(DIR).join("5"), "{").unwrap();
        let mut recorded = Vec::new();
        let mut record = |cid| {
            assert!(!leases.holder(cid).is_ok_and(|holder| holder.is_some()), "leased before it was recorded");
            recorded.push(cid);
            Ok(())
        };
        // The damaged lease of 5 does not hold it; another program's guest has 4.
        assert_eq!(leases.lease(4..=5, &own(), &mut record, &mut |cid| Ok(cid != 4)).unwrap(), 5);
        assert_eq!(recorded, [5]);
        let unrecorded = &mut |_| Err(StateError::NotFound(base.path().into()));
        assert!(leases.lease(CIDS, &own(), unrecorded, &mut |cid| Ok(cid != 4)).is_err());
        assert_eq!(leases.holder(6).unwrap(), None);
        let denied = &mut |_| Err(io::ErrorKind::PermissionDenied.into());
        let error = leases.lease(6..=6, &own(), &mut |_| Ok(()), denied).unwrap_err();
        assert_eq!(Chain(&error).to_string(), "claim vsock CID 6: permission denied");
    }

    #[test]
    fn a_lock_that_is_never_released_is_an_error_after_a_while() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        let _held = leases.lock().unwrap();
        let error = Chain(&lease(&leases, CIDS, &own()).unwrap_err()).to_string();
        assert!(error.starts_with("lock ") && error.contains(".cids/lock: "), "{error}");
    }

    #[test]
    fn cleanup_after_a_killed_shim_releases_its_cids() {
        use crate::state::{Owner, State, Step};
        let base = tempfile::tempdir().unwrap();
        let mut state = State::create(base.path(), "ns", "s1").unwrap();
        let (leases, holder) = (state.leases(), own());
        assert_eq!(leases, Leases::under(base.path()));
        let step = |cid| Step::Cid { cid, leases: leases.clone(), shim: holder.shim };
        let mut record = |cid| state.record(&Owner::Sandbox, [step(cid)]);
        assert_eq!(leases.lease(CIDS, &holder, &mut record, &mut |_| Ok(true)).unwrap(), 4);
        // The shim is killed between recording the step and writing the lease.
        state.record(&Owner::Sandbox, [step(5)]).unwrap();
        drop(state);
        State::load(base.path(), "ns", "s1").unwrap().undo_all(Duration::from_secs(1)).unwrap();
        assert_eq!(leases.holder(4).unwrap(), None);
        assert!(!base.path().join("ns").exists());
    }

    #[test]
    fn a_release_without_leases_creates_no_directory() {
        let base = tempfile::tempdir().unwrap();
        Leases::under(base.path()).release(4, own().shim).unwrap();
        assert!(!base.path().join(DIR).exists());
    }
}
