//! Disks of a running machine: SCSI disks on a controller that the machine has from the start. QEMU plugs neither
//! virtio-mmio devices nor devices of q35's own bus, but disks of a SCSI controller on every board.
//!
//! QEMU gets the image's descriptor over QMP, then the block node, then the disk. Number N is target N of the controller,
//! and has the set of descriptors N.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Mutex;

use husk_protos::lock::lock;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::hotplug::{Commands, DEADLINE, Failure};
use super::qmp::{Qmp, QmpError};
use crate::vmm::machine::{Cache, PluggedDisk};

/// How many requests must be left: twice what one machine takes (QEMU's block/linux-aio.c, MAX_EVENTS).
const AIO_REQUESTS: u64 = 2048;
/// The targets of virtio's SCSI controller (QEMU's hw/scsi/virtio-scsi.c, VIRTIO_SCSI_MAX_TARGET), without number 0.
pub(super) const MOST: u32 = 255;

/// Who waits for QEMU to delete a device.
#[derive(Debug, Default)]
pub(super) struct Deleted(Mutex<HashMap<String, oneshot::Sender<()>>>);

/// Waits for the deletion of one device. Nobody does when this is dropped.
struct Deletion<'a> {
    deleted: &'a Deleted,
    device: String,
    event: oneshot::Receiver<()>,
}

impl Drop for Deletion<'_> {
    fn drop(&mut self) {
        lock(&self.deleted.0).remove(&self.device);
    }
}

impl Deleted {
    /// Passes QEMU's event on.
    pub(super) fn report(&self, device: &str) {
        if let Some(waiting) = lock(&self.0).remove(device) {
            // Fails after the deadline.
            let _ = waiting.send(());
        }
    }

    fn of(&self, device: String) -> Deletion<'_> {
        let (sender, event) = oneshot::channel();
        lock(&self.0).insert(device.clone(), sender);
        Deletion { deleted: self, device, event }
    }
}

/// Gives the machine a disk.
pub(super) async fn plug(qmp: &Qmp, number: u32, disk: &PluggedDisk) -> Result<(), Failure> {
    let commands = Commands::new(qmp);
    let plugged = async {
        qmp.execute_with("add-fd", json!({"fdset-id": number}), disk.image.as_fd(), commands.left()).await?;
        commands.execute("blockdev-add", node(number, disk, native_aio())).await?;
        commands.execute("device_add", device(number, disk)).await
    };
    let Err(failed) = plugged.await else { return Ok(()) };
    let QmpError::Rejected { command, .. } = &failed else { return Err(Failure::Unknown(failed)) };
    let commands = Commands::new(qmp);
    let undone = match command.as_str() {
        // QEMU has not taken the descriptor.
        "add-fd" => Ok(()),
        "device_add" => remove_node(&commands, number).await,
        _ => forget(&commands, number).await,
    };
    Err(Failure::after(failed, undone, "a disk"))
}

/// Takes a disk away from the machine. QEMU has written everything back and closed the image when this returns.
pub(super) async fn unplug(qmp: &Qmp, deleted: &Deleted, number: u32) -> Result<(), QmpError> {
    let commands = Commands::new(qmp);
    // Before the command: QEMU may report the deletion before it replies.
    let mut deletion = deleted.of(id(number));
    commands.execute("device_del", json!({"id": id(number)})).await?;
    let late = || QmpError::Deadline { command: "DEVICE_DELETED".to_owned(), deadline: DEADLINE };
    tokio::time::timeout(commands.left(), &mut deletion.event)
        .await
        .map_err(|_| late())?
        .map_err(|_| QmpError::Closed)?;
    remove_node(&commands, number).await
}

/// Makes QEMU forget an image that no disk uses.
async fn remove_node(commands: &Commands<'_>, number: u32) -> Result<(), QmpError> {
    commands.execute("blockdev-del", json!({"node-name": id(number)})).await?;
    forget(commands, number).await
}

/// Makes QEMU close its copy of the image's descriptor. With the last user of the set, it has done so already.
async fn forget(commands: &Commands<'_>, number: u32) -> Result<(), QmpError> {
    match commands.execute("remove-fd", json!({"fdset-id": number})).await {
        Err(QmpError::Rejected { .. }) => Ok(()),
        other => other,
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
        // The guest learns of every error. By default, QEMU stops the machine when the host's disk is full.
        "werror": "report", "rerror": "report",
    })
}

#[cfg(test)]
mod tests {
    use super::super::hotplug::tests::{Received, expect_undone, file, with_qemu};
    use super::*;

    fn disk() -> PluggedDisk {
        let image = file(512);
        PluggedDisk { serial: "volume-1".into(), image, is_device: false, read_only: false, cache: Cache::Bypassed }
    }

    async fn plugged(disk: PluggedDisk, rejected: &'static str) -> (Result<(), Failure>, Vec<Received>) {
        with_qemu(rejected, async |qmp| plug(qmp, 3, &disk).await).await
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
            "serial": "volume-1", "werror": "report", "rerror": "report",
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
            expect_undone(rejected, result, &received, undone);
        }
    }

    #[tokio::test]
    async fn nobody_waits_for_the_deletion_of_a_disk_that_qemu_keeps() {
        let deleted = Deleted::default();
        let (unplugged, received) = with_qemu("device_del", async |qmp: &Qmp| unplug(qmp, &deleted, 3).await).await;
        assert!(matches!(unplugged, Err(QmpError::Rejected { .. })), "{unplugged:?}");
        assert_eq!(received.len(), 1, "{received:?}");
        assert!(lock(&deleted.0).is_empty());
    }

    #[tokio::test]
    async fn a_disk_is_gone_when_qemu_says_so() {
        let deleted = Deleted::default();
        let reported = async {
            while lock(&deleted.0).is_empty() {
                tokio::task::yield_now().await;
            }
            deleted.report("another");
            deleted.report("disk-3");
        };
        let both = async |qmp: &Qmp| tokio::join!(unplug(qmp, &deleted, 3), reported).0;
        let (unplugged, received) = with_qemu("", both).await;
        unplugged.unwrap();
        let names: Vec<&str> = received.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["device_del", "blockdev-del", "remove-fd"]);
    }
}
