//! The user of a VM's machine: an ID of its own, so that a machine that is taken over reaches no other.

use std::io;

use super::error::{BootError, io as failed};
use super::plan::BootPlan;
use crate::host::jail::User;
use crate::state::journal::Journal;
use crate::state::users::UserError;
use crate::state::{Owner, Step};

/// Leases the user, on a separate thread because waiting for the lock may block.
pub(super) async fn lease(plan: &BootPlan, journal: &Journal) -> Result<User, BootError> {
    let (ids, journal) = (plan.ids.numbers(), journal.clone());
    let leased = tokio::task::spawn_blocking(move || {
        let (leases, holder) = journal.with(|state| Ok((state.user_leases(), state.holder()?)))?;
        let mut record = |id| {
            let step = Step::User { id, leases: leases.clone(), shim: holder.shim };
            journal.record(&Owner::Sandbox, [step])
        };
        leases.lease(ids, &holder, &mut record)
    });
    let leased: Result<u32, UserError> =
        leased.await.map_err(|error| failed("run a thread for the VM's user ID")(io::Error::other(error)))?;
    let id = leased?;
    Ok(User { uid: id, gid: id, groups: plan.groups.clone() })
}
