//! Disks of a running machine: SCSI disks on a controller that the machine has from the start. QEMU plugs neither
//! virtio-mmio devices nor devices of q35's own bus, but disks of a SCSI controller on every board.
//!
//! QEMU gets the image's descriptor over QMP, then the block node, then the disk. Number N is target N of the controller,
//! and has the set of descriptors N.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::plug::Failure;
use super::qmp::{Qmp, QmpError};
use crate::vmm::machine::{Cache, PluggedDisk};

/// Deadline for all commands that plug or unplug a disk, and again for those that undo it. Unplugging writes back what
/// the guest has written.
const DEADLINE: Duration = Duration::from_secs(10);
/// How many requests must be left: twice what one machine takes (QEMU's block/linux-aio.c, MAX_EVENTS).
const AIO_REQUESTS: u64 = 2048;
/// The targets of virtio's SCSI controller (QEMU's hw/scsi/virtio-scsi.c, VIRTIO_SCSI_MAX_TARGET), without number 0.
const MOST: u32 = 255;

/// The numbers of the disks that a machine has.
#[derive(Debug, Default)]
pub(super) struct Disks(Mutex<BTreeSet<u32>>);

impl Disks {
    pub(super) fn take(&self) -> Option<u32> {
        let mut taken = lock(&self.0);
        let free = (1..=MOST).find(|number| !taken.contains(number))?;
        taken.insert(free);
        Some(free)
    }

    pub(super) fn give_back(&self, number: u32) {
        lock(&self.0).remove(&number);
    }
}

/// Who waits for QEMU to delete a device.
#[derive(Debug, Default)]
pub(super) struct Deleted(Mutex<HashMap<String, oneshot::Sender<()>>>);

impl Deleted {
    /// Passes QEMU's event on.
    pub(super) fn report(&self, device: &str) {
        if let Some(waiting) = lock(&self.0).remove(device) {
            // Fails after the deadline.
            let _ = waiting.send(());
        }
    }

    fn of(&self, device: &str) -> oneshot::Receiver<()> {
        let (sender, deleted) = oneshot::channel();
        lock(&self.0).insert(device.to_owned(), sender);
        deleted
    }
}

/// Gives the machine a disk.
pub(super) async fn plug(qmp: &Qmp, number: u32, disk: &PluggedDisk) -> Result<(), Failure> {
    let until = Instant::now() + DEADLINE;
    let plugged = async {
        let set = json!({"fdset-id": number});
        qmp.execute_with("add-fd", set, disk.image.as_fd(), left(until)).await?;
        qmp.execute("blockdev-add", node(number, disk, native_aio()), left(until)).await?;
        qmp.execute("device_add", device(number, disk), left(until)).await
    };
    let Err(failed) = plugged.await else { return Ok(()) };
    let QmpError::Rejected { command, .. } = &failed else { return Err(Failure::Unknown(failed)) };
    let until = Instant::now() + DEADLINE;
    let undone = async {
        if command == "device_add" {
            qmp.execute("blockdev-del", json!({"node-name": id(number)}), left(until)).await?;
        }
        match command.as_str() {
            // QEMU has not taken the descriptor.
            "add-fd" => Ok(()),
            _ => forget(qmp, number, until).await,
        }
    };
    match undone.await {
        Ok(()) => Err(Failure::Undone(failed)),
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "failed to undo a disk that QEMU has rejected");
            Err(Failure::Unknown(failed))
        }
    }
}

/// Takes a disk away from the machine. QEMU has written everything back and closed the image when this returns.
pub(super) async fn unplug(qmp: &Qmp, deleted: &Deleted, number: u32) -> Result<(), QmpError> {
    let until = Instant::now() + DEADLINE;
    // Before the command: QEMU may report the deletion before it replies.
    let event = deleted.of(&id(number));
    qmp.execute("device_del", json!({"id": id(number)}), left(until)).await?;
    let late = || QmpError::Deadline { command: "DEVICE_DELETED".to_owned(), deadline: DEADLINE };
    tokio::time::timeout(left(until), event).await.map_err(|_| late())?.map_err(|_| QmpError::Closed)?;
    qmp.execute("blockdev-del", json!({"node-name": id(number)}), left(until)).await?;
    forget(qmp, number, until).await
}

/// Makes QEMU close its copy of the image's descriptor. With the last user of the set, it has done so already.
async fn forget(qmp: &Qmp, number: u32, until: Instant) -> Result<(), QmpError> {
    match qmp.execute("remove-fd", json!({"fdset-id": number}), left(until)).await {
        Ok(_) | Err(QmpError::Rejected { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether QEMU may use the kernel's asynchronous I/O, for which each machine takes requests of a host-wide number
/// (proc_sys_fs(5), aio-max-nr). If there are few left, threads of QEMU serve the disk.
fn native_aio() -> bool {
    let read = |name| {
        let text = std::fs::read_to_string(format!("/proc/sys/fs/{name}")).ok()?;
        text.trim_end().parse::<u64>().ok()
    };
    read("aio-max-nr").zip(read("aio-nr")).is_some_and(|(most, taken)| most.saturating_sub(taken) >= AIO_REQUESTS)
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

fn id(number: u32) -> String {
    format!("disk-{number}")
}

fn node(number: u32, disk: &PluggedDisk, native_aio: bool) -> Value {
    // Asynchronous I/O of the kernel requires O_DIRECT: with the page cache it would block QEMU.
    let direct = disk.cache == Cache::Bypassed;
    let aio = if direct && native_aio { "native" } else { "threads" };
    json!({
        "driver": if disk.is_device { "host_device" } else { "file" },
        "node-name": id(number),
        "filename": format!("/dev/fdset/{number}"),
        "read-only": disk.read_only,
        "cache": {"direct": direct, "no-flush": false},
        "aio": aio,
        "discard": "unmap",
        // The shim has locked the image.
        "locking": "off",
    })
}

fn device(number: u32, disk: &PluggedDisk) -> Value {
    json!({
        "driver": "scsi-hd", "id": id(number), "bus": "disks.0", "drive": id(number),
        "scsi-id": number, "lun": 0, "serial": disk.serial,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::factory::qemu::plug::tests::{SECOND, file, play};
    use tokio::net::UnixStream;

    fn disk() -> PluggedDisk {
        let image = file(512);
        PluggedDisk { serial: "volume-1".into(), image, is_device: false, read_only: false, cache: Cache::Bypassed }
    }

    async fn plugged(
        disk: PluggedDisk,
        rejected: &'static str,
    ) -> (Result<(), Failure>, Vec<(String, Value, Option<u64>)>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(play(theirs, rejected));
        let (qmp, _events) = Qmp::handshake(ours, SECOND).await.unwrap();
        let result = plug(&qmp, 3, &disk).await;
        drop(qmp);
        let mut received = qemu.await.unwrap();
        received.remove(0);
        (result, received)
    }

    #[tokio::test]
    async fn a_disk_gets_its_image_by_descriptor() {
        let (result, received) = plugged(disk(), "").await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(received[0], ("add-fd".into(), json!({"fdset-id": 3}), Some(512)));
        let expected = json!({
            "driver": "file", "node-name": "disk-3", "filename": "/dev/fdset/3", "read-only": false,
            "cache": {"direct": true, "no-flush": false}, "aio": "native", "discard": "unmap", "locking": "off",
        });
        assert_eq!(node(3, &disk(), true), expected);
        assert_eq!(node(3, &disk(), false)["aio"], "threads");
        assert_eq!((received[1].0.as_str(), &received[1].1["filename"]), ("blockdev-add", &json!("/dev/fdset/3")));
        let device = json!({
            "driver": "scsi-hd", "id": "disk-3", "bus": "disks.0", "drive": "disk-3", "scsi-id": 3, "lun": 0,
            "serial": "volume-1",
        });
        assert_eq!(received[2], ("device_add".into(), device, None));
    }

    #[test]
    fn an_image_that_machines_share_is_read_through_the_page_cache() {
        let shared = PluggedDisk { read_only: true, cache: Cache::Shared, is_device: true, ..disk() };
        let node = node(3, &shared, true);
        assert_eq!((&node["driver"], &node["aio"]), (&json!("host_device"), &json!("threads")));
        assert_eq!((&node["cache"]["direct"], &node["read-only"]), (&json!(false), &json!(true)));
    }

    #[tokio::test]
    async fn a_disk_that_qemu_rejects_leaves_nothing_there() {
        let table: [(&str, &[&str]); 3] =
            [("add-fd", &[]), ("blockdev-add", &["remove-fd"]), ("device_add", &["blockdev-del", "remove-fd"])];
        for (rejected, undone) in table {
            let (result, received) = plugged(disk(), rejected).await;
            let Err(Failure::Undone(error)) = result else { panic!("{rejected}: {result:?}") };
            assert_eq!(error.to_string(), format!("{rejected}: GenericError: no"));
            let at = received.iter().position(|(name, ..)| name == rejected).unwrap();
            let after: Vec<&str> = received[at + 1..].iter().map(|(name, ..)| name.as_str()).collect();
            assert_eq!(after, undone, "{rejected}");
        }
    }

    #[tokio::test]
    async fn a_disk_is_gone_when_qemu_says_so() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(play(theirs, ""));
        let (qmp, _events) = Qmp::handshake(ours, SECOND).await.unwrap();
        let deleted = Deleted::default();
        let reported = async {
            while lock(&deleted.0).is_empty() {
                tokio::task::yield_now().await;
            }
            deleted.report("another");
            deleted.report("disk-3");
        };
        let (unplugged, ()) = tokio::join!(unplug(&qmp, &deleted, 3), reported);
        unplugged.unwrap();
        drop(qmp);
        let names: Vec<String> = qemu.await.unwrap().into_iter().map(|(name, ..)| name).skip(1).collect();
        assert_eq!(names, ["device_del", "blockdev-del", "remove-fd"]);
    }

    #[test]
    fn the_lowest_free_number_is_used() {
        let disks = Disks::default();
        assert_eq!((disks.take(), disks.take(), disks.take()), (Some(1), Some(2), Some(3)));
        disks.give_back(2);
        assert_eq!((disks.take(), disks.take()), (Some(2), Some(4)));
    }
}
