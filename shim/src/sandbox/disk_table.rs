//! Which disks the running VM has.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use husk_protos::lock::lock;

use crate::disks::image::Access;
use crate::disks::{GuestLayer, GuestMount, Kind};
use crate::state::status::DiskStatus;

/// The VM's disks.
#[derive(Debug, Default)]
pub(super) struct Disks {
    /// Locked while a disk is attached or detached.
    pub(super) changing: tokio::sync::Mutex<()>,
    pub(super) table: Mutex<Table>,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    /// How many disks there have been: serials are not used twice.
    pub(super) count: u64,
    pub(super) disks: Vec<Disk>,
}

/// What the machine has.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) attached: AttachedDisk,
    pub(super) kind: Kind,
    /// Its number in the machine.
    pub(super) number: u32,
    pub(super) image: String,
    pub(super) path: PathBuf,
    pub(super) access: Access,
    pub(super) mount: Option<GuestMount>,
    pub(super) bytes: u64,
    pub(super) users: Vec<String>,
}

/// A disk in the guest.
#[derive(Clone, Debug)]
pub(super) struct AttachedDisk {
    pub(super) serial: String,
    /// Where it is mounted, if it is.
    pub(super) guest_path: PathBuf,
    /// Its numbers as a device.
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Disk {
    /// What the guest has set up between the disk and its filesystem.
    fn layer(&self) -> Option<&GuestLayer> {
        self.mount.as_ref()?.layer.as_ref()
    }
}

impl Disks {
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Forgets all disks of a VM that is gone.
    pub(super) fn clear(&self) {
        self.table().disks.clear();
    }

    /// Whether the guest may have something to write to a disk that outlives the container.
    pub(super) fn any_writable(&self) -> bool {
        let matters = |disk: &Disk| disk.access == Access::Exclusive && disk.kind != Kind::Overlay;
        self.table().disks.iter().any(matters)
    }

    /// Whether the VM has a scratch disk that its guest does not encrypt.
    pub(super) fn has_plain_scratch(&self) -> bool {
        self.table().disks.iter().any(|disk| disk.kind == Kind::Scratch && disk.layer().is_none())
    }

    /// The disks, for operators.
    pub(super) fn status(&self) -> Vec<DiskStatus> {
        let table = self.table();
        let status = |disk: &Disk| DiskStatus {
            serial: disk.attached.serial.clone(),
            path: disk.path.clone(),
            read_only: disk.access != Access::Exclusive,
            bytes: disk.bytes,
            state: if disk.mount.is_some() { "mounted" } else { "attached" }.to_owned(),
            protection: disk.layer().map(|layer| layer.name().to_owned()),
            containers: disk.users.clone(),
        };
        table.disks.iter().map(status).collect()
    }
}
