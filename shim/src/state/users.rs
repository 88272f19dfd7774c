//! Leases of user IDs, so that no two VMs of a host have the same: the file `<state>/.users/<id>`. The group ID is the
//! same number.

use std::ops::RangeInclusive;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::StateError;
use super::lease::{Holder, LeaseDir, LeaseError};
use crate::host::process::ProcessId;

const DIR: &str = ".users";

/// Why a user ID cannot be leased or released.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// A file operation failed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The undo step could not be recorded.
    #[error(transparent)]
    State(#[from] StateError),
    /// No ID is free.
    #[error("no user ID is free for another VM: all of vm_ids, {} to {}, are in use", .0.start(), .0.end())]
    Exhausted(RangeInclusive<u32>),
}

/// The leases of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct UserLeases {
    dir: LeaseDir,
}

impl UserLeases {
    /// The leases that are kept beside the sandboxes under `base`.
    pub(crate) fn under(base: &Path) -> Self {
        Self { dir: LeaseDir::under(base, DIR) }
    }

    /// Leases an ID of `among`. `record` runs before the lease is written.
    ///
    /// # Errors
    /// No ID is free, or a file operation or `record` failed.
    pub(crate) fn lease(
        &self,
        among: RangeInclusive<u32>,
        holder: &Holder,
        record: &mut dyn FnMut(u32) -> Result<(), StateError>,
    ) -> Result<u32, UserError> {
        let leased = self.dir.lease_number(among.clone(), holder, record, &mut |_| Ok::<_, UserError>(true))?;
        leased.ok_or(UserError::Exhausted(among))
    }

    /// Releases an ID, unless another shim holds it by now.
    ///
    /// # Errors
    /// A file operation failed.
    pub(crate) fn release(&self, id: u32, shim: ProcessId) -> Result<(), UserError> {
        Ok(self.dir.release([id.to_string()], shim)?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::state::{Owner, State, Step};

    #[test]
    fn each_vm_gets_its_own_user_which_cleanup_after_a_killed_shim_releases() {
        let base = tempfile::tempdir().unwrap();
        let mut state = State::create(base.path(), "ns", "s1").unwrap();
        let holder = Holder { namespace: "ns".into(), sandbox: "s1".into(), shim: ProcessId::own().unwrap() };
        let leases = state.user_leases();
        let step = |id| Step::User { id, leases: leases.clone(), shim: holder.shim };
        let mut record = |id| state.record(&Owner::Sandbox, [step(id)]);
        assert_eq!([(); 2].map(|()| leases.lease(700..=701, &holder, &mut record).unwrap()), [700, 701]);
        let error = leases.lease(700..=701, &holder, &mut record).unwrap_err().to_string();
        assert_eq!(error, "no user ID is free for another VM: all of vm_ids, 700 to 701, are in use");
        // The shim is killed between recording the step and writing the lease.
        state.record(&Owner::Sandbox, [step(702)]).unwrap();
        drop(state);
        State::load(base.path(), "ns", "s1").unwrap().undo_all(Duration::from_secs(1)).unwrap();
        assert!(!base.path().join(DIR).exists());
    }
}
