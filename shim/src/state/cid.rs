//! Leases of CIDs, the guests' addresses on the kernel's vsock device. CIDs are unique per host, so each sandbox leases
//! one: the file `<state>/.cids/<cid>`.

use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::StateError;
use super::lease::{Holder, LeaseDir, LeaseError};
use crate::host::process::ProcessId;

/// The kernel reserves 0 to 2 (vsock(7)). The shim's own vsock device gives 3 to each of its guests.
pub(crate) const CIDS: RangeInclusive<u32> = 4..=65535;
const DIR: &str = ".cids";

/// Why a lease cannot be made, read or released.
#[derive(Debug, thiserror::Error)]
pub enum CidError {
    /// A file operation failed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
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
    dir: LeaseDir,
}

impl Leases {
    /// The leases that are kept beside the sandboxes under `base`.
    pub(crate) fn under(base: &Path) -> Self {
        Self { dir: LeaseDir::under(base, DIR) }
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
        let mut claim = |cid| claim(cid).map_err(|source| CidError::Claim { cid, source });
        self.dir.lease_number(among, holder, record, &mut claim)?.ok_or(CidError::Exhausted)
    }

    /// Returns the holder of a CID, `None` if there is none or if the lease cannot be decoded.
    ///
    /// # Errors
    /// The lease's file cannot be read.
    pub(crate) fn holder(&self, cid: u32) -> Result<Option<Holder>, CidError> {
        Ok(self.dir.holder(&cid.to_string())?)
    }

    /// Releases a CID, unless another shim holds it by now.
    ///
    /// # Errors
    /// A file operation failed.
    pub(crate) fn release(&self, cid: u32, shim: ProcessId) -> Result<(), CidError> {
        Ok(self.dir.release([cid.to_string()], shim)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::process::{Child, Command};
    use std::sync::Mutex;
    use std::time::Duration;

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
        let _held = leases.dir.lock().unwrap();
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
