//! The balloon: a device to which the guest gives memory that it does not need. QEMU gives it back to the host.
//!
//! A guest that reports free pages needs nobody to ask. A target makes it give up pages that it uses as a cache.

use std::time::Duration;

use serde_json::json;

use super::args::BALLOON;
use super::qmp::{Qmp, QmpError};

/// Deadline of each command.
const DEADLINE: Duration = Duration::from_secs(10);

/// Sets the memory that the guest is to get by with, MiB, of what it booted with.
pub(super) async fn set_target(qmp: &Qmp, target_mib: u64) -> Result<(), QmpError> {
    qmp.execute("balloon", json!({"value": target_mib << 20}), DEADLINE).await.map(|_| ())
}

/// What the guest has given back of `boot_mib` MiB, in MiB.
///
/// Only an unstable command says whether the guest reports free pages: `x-query-virtio-status`, which ends the machine in
/// QEMU 11.1.
pub(super) async fn query(qmp: &Qmp, boot_mib: u64) -> Result<u64, QmpError> {
    let reply = qmp.execute("query-balloon", json!({}), DEADLINE).await?;
    let left = reply["actual"].as_u64();
    let left = left.ok_or_else(|| std::io::Error::other(format!("size {reply} of the device {BALLOON}")))?;
    Ok(boot_mib.saturating_sub(left.div_ceil(1 << 20)))
}
