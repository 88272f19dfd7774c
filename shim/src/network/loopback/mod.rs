//! Redirects the namespace's own TCP connections to the shim. A program inside the namespace on the host that connects
//! to 127.0.0.1, or to one of the pod's addresses, means a server in the VM; containerd's CRI plugin does so for
//! `kubectl port-forward`. A rule of nf_tables redirects such connections to listeners of the shim in the same
//! namespace. The kernel still knows the address that the program meant.
//!
//! | file          | content                                                      |
//! |---------------|--------------------------------------------------------------|
//! | `listener.rs` | the listeners, and the address that a connection meant       |
//! | `table.rs`    | the table of nf_tables with the rule                         |
//! | `batch.rs`    | messages of nf_tables as bytes (pure)                        |

mod batch;
mod listener;
mod table;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use husk_protos::chain::Chain;

use super::error::NetworkError;
use super::netns::Claim;
pub(crate) use listener::original_destination;

/// Prefix of the table's name, which ends with the sandbox's id.
const TABLE: &str = "husk-";

/// Listens in the namespace, and redirects all TCP connections to the namespace's own addresses to the listeners.
/// Replaces what a former VM of the sandbox left. Blocks.
///
/// # Errors
///
/// A socket cannot be created, or the kernel rejects the rule, such as one without nf_tables.
pub(crate) fn intercept(claim: &Claim, sandbox: &str, limit: Duration) -> Result<Vec<TcpListener>, NetworkError> {
    let table = format!("{TABLE}{sandbox}");
    let unwanted = table.clone();
    let work = move |deadline| {
        let (listeners, port) = listener::listen()?;
        table::add(&table, port, deadline)?;
        Ok(listeners)
    };
    claim.run_or_undo(limit, work, move |_| {
        if let Err(error) = table::remove(&unwanted, Instant::now() + limit) {
            tracing::warn!(table = unwanted, error = %Chain(&error), "failed to remove a rule that came too late");
        }
    })
}

/// Removes the rule. Does nothing if there is none or the namespace is gone. Blocks.
///
/// # Errors
///
/// The rule cannot be removed.
pub(crate) fn release(claim: &Claim, sandbox: &str, limit: Duration) -> Result<(), NetworkError> {
    if claim.is_gone()? {
        return Ok(());
    }
    let table = format!("{TABLE}{sandbox}");
    match claim.run(limit, move |deadline| table::remove(&table, deadline)) {
        // It vanished meanwhile.
        Err(_) if claim.is_gone()? => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests;
