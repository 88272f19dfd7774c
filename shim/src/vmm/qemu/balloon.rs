//! The balloon: a device to which the guest gives memory that it does not need. QEMU gives it back to the host.
//!
//! A guest that reports free pages needs nobody to ask. A target makes it give up pages that it uses as a cache.

use std::time::Duration;

use serde_json::{Value, json};

use super::args::BALLOON;
use super::qmp::{Qmp, QmpError};
use crate::vmm::machine::Balloon;

/// Deadline of each command.
const DEADLINE: Duration = Duration::from_secs(10);
/// How QEMU describes the feature that a guest accepts when it reports free pages.
const REPORTING: &str = "VIRTIO_BALLOON_F_REPORTING";
/// The device's place among QEMU's objects, on virtio-mmio and behind a PCI proxy.
const PATHS: [&str; 2] = ["/machine/peripheral/balloon", "/machine/peripheral/balloon/virtio-backend"];

/// Sets the memory that the guest is to get by with, MiB, of what it booted with.
pub(super) async fn set_target(qmp: &Qmp, target_mib: u64) -> Result<(), QmpError> {
    qmp.execute("balloon", json!({"value": target_mib << 20}), DEADLINE).await.map(|_| ())
}

/// What the guest has given back of `boot_mib` MiB.
pub(super) async fn query(qmp: &Qmp, boot_mib: u64) -> Result<Balloon, QmpError> {
    let reply = qmp.execute("query-balloon", json!({}), DEADLINE).await?;
    let left = reply["actual"].as_u64();
    let left = left.ok_or_else(|| std::io::Error::other(format!("size {reply} of the device {BALLOON}")))?;
    let mut reports_free_pages = None;
    for path in PATHS {
        match qmp.execute("x-query-virtio-status", json!({"path": path}), DEADLINE).await {
            Ok(status) => reports_free_pages = accepted(&status),
            // Not the path on this board, or a QEMU without the command, which is not a stable one.
            Err(QmpError::Rejected { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Balloon { given_back_mib: boot_mib.saturating_sub(left.div_ceil(1 << 20)), reports_free_pages })
}

/// Whether the guest has accepted to report free pages. None if QEMU does not say it as expected.
fn accepted(status: &Value) -> Option<bool> {
    let features = status["guest-features"]["dev-features"].as_array()?;
    Some(features.iter().filter_map(Value::as_str).any(|feature| feature.starts_with(REPORTING)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_reports_free_pages_if_it_has_accepted_the_feature() {
        let status = |features: Value| json!({"guest-features": {"dev-features": features}});
        for (reply, expected) in [
            (status(json!(["VIRTIO_BALLOON_F_REPORTING: Page reporting VQ enabled"])), Some(true)),
            (status(json!(["VIRTIO_BALLOON_F_STATS_VQ: Guest memory stats VQ available"])), Some(false)),
            (status(json!([])), Some(false)),
            (json!({"guest-features": {}}), None),
            (json!(7), None),
        ] {
            assert_eq!(accepted(&reply), expected, "{reply}");
        }
    }
}
