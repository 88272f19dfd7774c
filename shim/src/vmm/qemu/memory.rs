//! Memory that a running machine is given: a virtio-mem device whose whole range exists from the start, and of which
//! QEMU offers the guest as much as it may have.
//!
//! The vhost-user back ends map the range when the machine starts, so their memory tables do not change later. It takes
//! no memory of the host until it is used. QEMU does not prevent a guest from using more than it is offered: the limit
//! of the VM's cgroup does.

use std::time::Duration;

use serde_json::{Value, json};

use super::args::GROWTH;
use super::qmp::{Qmp, QmpError};

/// Deadline of each command.
const DEADLINE: Duration = Duration::from_secs(10);

/// Offers the guest `mib` MiB beyond what it started with.
pub(super) async fn offer(qmp: &Qmp, mib: u64) -> Result<(), QmpError> {
    let arguments = json!({"path": path(), "property": "requested-size", "value": mib << 20});
    qmp.execute("qom-set", arguments, DEADLINE).await.map(|_| ())
}

/// How much of an offer the guest has taken, MiB, rounded up.
pub(super) async fn taken_mib(qmp: &Qmp) -> Result<u64, QmpError> {
    let reply = qmp.execute("qom-get", json!({"path": path(), "property": "size"}), DEADLINE).await?;
    mib(&reply).ok_or_else(|| std::io::Error::other(format!("size {reply} of the device {GROWTH}")).into())
}

fn path() -> String {
    format!("/machine/peripheral/{GROWTH}")
}

fn mib(reply: &Value) -> Option<u64> {
    reply.as_u64().map(|bytes| bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_mib() {
        for (reply, expected) in
            [(json!(0), Some(0)), (json!((2 << 20) - 1), Some(2)), (json!(-1), None), (json!("1"), None)]
        {
            assert_eq!(mib(&reply), expected, "{reply}");
        }
    }
}
