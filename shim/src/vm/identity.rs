//! Whose VM it is, for the metadata service.

use super::error::BootError;
use super::plan::BootPlan;
use crate::guest::link::Link;
use crate::metadata;
use crate::metadata::token::Identity;
use crate::state::journal::Journal;

/// Provides a VM with the metadata of its sandbox. A VM that waits has none: it learns later whose it is.
pub(super) fn identify(link: &Link, plan: &BootPlan, journal: &Journal) -> Result<(), BootError> {
    let identity = journal.with(|state| {
        let identity = || Identity {
            namespace: state.namespace().to_owned(),
            sandbox: state.sandbox().to_owned(),
            cid: link.cid(),
        };
        Ok((!state.is_waiting()).then(identity))
    })?;
    let Some(identity) = identity else { return Ok(()) };
    Ok(metadata::provide(link, identity, &plan.tokens, plan.workspace.as_ref(), journal.dir())?)
}
