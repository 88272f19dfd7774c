//! Disks that the host gives to the running machine, and the Disks service.
//!
//! | file         | contents                                    |
//! |--------------|---------------------------------------------|
//! | `find.rs`    | finds a block device by its serial          |
//! | `scsi.rs`    | makes the kernel look for a disk, and forget it |
//! | `filesystem.rs` | mounts, grows, freezes and unmounts a disk's filesystem |
//! | `layer.rs`   | what lies between a disk and its filesystem |
//! | `verity.rs`  | disks whose blocks the kernel verifies      |
//! | `corruption.rs` | reports blocks that are not as they should be |
//! | `encrypted.rs` | disks that the guest encrypts             |
//! | `mapper.rs`  | devices of the device mapper                |
//!
//! The host says which container uses a disk. The first use prepares the disk, the last one ends it. While all containers
//! that use a disk are paused, its filesystem is frozen.

mod corruption;
mod encrypted;
mod filesystem;
pub(crate) mod find;
mod layer;
mod mapper;
mod scsi;
mod verity;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use husk_protos::DISKS_PATH;
use husk_protos::disks::{AttachDiskRequest, AttachDiskResponse, DetachDiskRequest, DetachDiskResponse, DiskMount};
use husk_protos::lock::lock;
use nix::sys::stat::{major, minor};
use tokio::sync::{RwLock, RwLockReadGuard};
use ttrpc::r#async::TtrpcContext;

use crate::error::{CallError, FailureKind};
use crate::paths;
use crate::rpc::handle_uninterrupted;
use filesystem::Filesystem;
use mapper::Mapped;

/// How far the kernel reads ahead on disks. A request has a price, and bytes have nearly none: without KVM, 64 MiB are read
/// four times as fast as with the kernel's 128 KiB. The most that a request can have is 1280 KiB.
const READ_AHEAD_KIB: u32 = 1024;

/// A disk that containers use.
#[derive(Debug)]
struct Disk {
    /// The kernel's name of the device.
    name: String,
    numbers: AttachDiskResponse,
    /// The containers that use it.
    users: BTreeSet<String>,
    /// The device between the disk and its filesystem, if there is one.
    mapped: Option<Arc<Mapped>>,
    /// None of a disk that is used as a device.
    filesystem: Option<Arc<Filesystem>>,
}

/// The disks that containers use, by serial, and the containers that are paused.
#[derive(Debug, Default)]
struct Table {
    disks: BTreeMap<String, Disk>,
    paused: BTreeSet<String>,
}

impl Table {
    /// The filesystems of disks whose users are all paused, and the others.
    fn by_pause(&self, container: &str) -> (Vec<Arc<Filesystem>>, Vec<Arc<Filesystem>>) {
        let of_container = self.disks.values().filter(|disk| disk.users.contains(container));
        let (paused, others): (Vec<&Disk>, Vec<&Disk>) =
            of_container.partition(|disk| disk.users.is_subset(&self.paused));
        let filesystems = |disks: Vec<&Disk>| disks.into_iter().filter_map(|disk| disk.filesystem.clone()).collect();
        (filesystems(paused), filesystems(others))
    }
}

/// The disks of this guest.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    table: Mutex<Table>,
    /// Held while a disk is attached or detached, which blocks.
    changing: Mutex<()>,
    /// Locked for reading while a container's mount namespace is made: until its root is in place, it has copies of all
    /// mounts of the guest.
    namespaces: RwLock<()>,
}

impl Disks {
    fn attach(&self, request: AttachDiskRequest) -> Result<AttachDiskResponse, CallError> {
        let AttachDiskRequest { serial, target, container, mount, .. } = request;
        paths::check_id(&serial)?;
        let _changing = lock(&self.changing);
        self.forget_lost();
        let known = lock(&self.table).disks.get(&serial).map(|disk| disk.numbers.clone());
        let numbers = match known {
            Some(numbers) => numbers,
            None => {
                let disk = prepare(&serial, target, mount.into_option())?;
                let numbers = disk.numbers.clone();
                lock(&self.table).disks.insert(serial.clone(), disk);
                numbers
            }
        };
        if let Some(disk) = lock(&self.table).disks.get_mut(&serial) {
            disk.users.insert(container.clone());
        }
        // It is not paused, whoever else is.
        self.thaw(&container);
        Ok(numbers)
    }

    fn detach(&self, serial: &str, container: &str) -> Result<(), CallError> {
        let _changing = lock(&self.changing);
        let (name, mapped, filesystem) = {
            let mut table = lock(&self.table);
            let Some(disk) = table.disks.get_mut(serial) else { return Ok(()) };
            disk.users.remove(container);
            if !disk.users.is_empty() {
                return Ok(());
            }
            (disk.name.clone(), disk.mapped.clone(), disk.filesystem.clone())
        };
        self.release(serial, &name, mapped.as_deref(), filesystem.as_deref())?;
        lock(&self.table).disks.remove(serial);
        Ok(())
    }

    /// Forgets disks that something in the guest still used when their last container was deleted. The host has taken
    /// them away since: it does not attach another disk before.
    fn forget_lost(&self) {
        let lost: Vec<(String, Disk)> =
            lock(&self.table).disks.extract_if(.., |_, disk| disk.users.is_empty()).collect();
        for (serial, Disk { name, mapped, filesystem, .. }) in lost {
            tracing::warn!(serial, "a disk is gone that something in the guest still uses");
            let unmounted = filesystem.map_or(Ok(()), |filesystem| filesystem.abandon());
            let removed = mapped.map_or(Ok(()), |mapped| mapped.remove_later());
            for error in [unmounted, removed, scsi::forget(&name)].into_iter().filter_map(Result::err) {
                tracing::error!(serial, %error, "failed to forget a disk that is gone");
            }
        }
    }

    /// Delays the release of disks while a container's mount namespace is made.
    pub(crate) async fn making_namespace(&self) -> RwLockReadGuard<'_, ()> {
        self.namespaces.read().await
    }

    /// Freezes the filesystems that only paused containers use, of which `container` is one from now on.
    ///
    /// # Errors
    /// That of the first filesystem that does not freeze. Then call [`Self::thaw`], as also if the future is dropped.
    pub(crate) async fn freeze(&self, container: &str) -> Result<(), CallError> {
        let filesystems = {
            let mut table = lock(&self.table);
            table.paused.insert(container.to_owned());
            table.by_pause(container).0
        };
        for filesystem in filesystems {
            let path = filesystem.path().display().to_string();
            // On a thread: freezing writes everything back.
            let frozen = tokio::task::spawn_blocking(move || filesystem.freeze()).await;
            let frozen = frozen.map_err(io::Error::other).flatten();
            frozen.map_err(|error| CallError::internal(format_args!("freeze {path}"), &error))?;
        }
        Ok(())
    }

    /// Thaws the filesystems of a container, which is not paused any more. A failure is logged.
    pub(crate) fn thaw(&self, container: &str) {
        let filesystems = {
            let mut table = lock(&self.table);
            table.paused.remove(container);
            table.by_pause(container).1
        };
        filesystems.iter().for_each(|filesystem| filesystem.thaw());
    }

    /// Thaws everything.
    pub(crate) fn thaw_all(&self) {
        let filesystems: Vec<_> = {
            let mut table = lock(&self.table);
            table.paused.clear();
            table.disks.values().filter_map(|disk| disk.filesystem.clone()).collect()
        };
        filesystems.iter().for_each(|filesystem| filesystem.thaw());
    }

    /// Unmounts a disk and makes the kernel forget it.
    fn release(
        &self,
        serial: &str,
        name: &str,
        mapped: Option<&Mapped>,
        filesystem: Option<&Filesystem>,
    ) -> Result<(), CallError> {
        let failed = |what: &str, error: &io::Error| match error.raw_os_error() {
            Some(libc::EBUSY) => {
                let what = format!("detach the disk {serial}: {what}: something in the guest still uses it");
                CallError::new(FailureKind::FailedPrecondition, what)
            }
            _ => CallError::internal(format_args!("detach the disk {serial}: {what}"), error),
        };
        if let Some(filesystem) = filesystem {
            filesystem.unmount().map_err(|error| failed("unmount its filesystem", &error))?;
        }
        let _alone = self.namespaces.blocking_write();
        if let Some(mapped) = mapped {
            mapped.remove().map_err(|error| failed("remove the device over it", &error))?;
        }
        // Fails if the filesystem is mounted elsewhere: then the kernel may have more to write.
        let alone = File::options().read(true).custom_flags(libc::O_EXCL).open(format!("/dev/{name}"));
        drop(alone.map_err(|error| failed("look for its users", &error))?);
        scsi::forget(name).map_err(|error| failed("remove it", &error))
    }

    /// Unmounts everything, before the guest ends. A failure is logged: the journals of the filesystems are complete.
    pub(crate) fn unmount_all(&self) {
        let _changing = lock(&self.changing);
        for (serial, disk) in &lock(&self.table).disks {
            if let Some(filesystem) = &disk.filesystem
                && let Err(error) = filesystem.unmount()
            {
                tracing::warn!(serial, %error, "failed to unmount a disk at the guest's end");
            }
        }
    }
}

/// Finds a disk and mounts its filesystem. A failure leaves nothing behind.
fn prepare(serial: &str, target: u32, mount: Option<DiskMount>) -> Result<Disk, CallError> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    // Another disk may have the target as long as the kernel has not forgotten it.
    let locate = |serial: &str| match scsi::disk(target)? {
        Some(name) => Ok(find::has_serial(&name, serial)?.then_some(name)),
        None => Ok(None),
    };
    let found = find::find(serial, &options, || scsi::search(target), locate);
    let (name, device) = found.map_err(|error| {
        forget_target(target);
        match error.kind() {
            io::ErrorKind::TimedOut => CallError::new(FailureKind::DeadlineExceeded, format!("attach a disk: {error}")),
            _ => CallError::internal(format_args!("attach the disk {serial}"), &error),
        }
    })?;
    let prepared = use_device(serial, &name, &device, mount);
    drop(device);
    prepared.map_err(|error: io::Error| {
        if let Err(error) = scsi::forget(&name) {
            tracing::error!(serial, %error, "failed to remove a disk that cannot be used");
        }
        CallError::internal(format_args!("attach the disk {serial}"), &error)
    })
}

/// Mounts the filesystem of a disk whose device is open. A failure leaves no mount and no further device behind.
fn use_device(serial: &str, name: &str, device: &File, mount: Option<DiskMount>) -> io::Result<Disk> {
    let metadata = device.metadata()?;
    if !metadata.file_type().is_block_device() {
        return Err(io::Error::other(format!("/dev/{name} is not a block device")));
    }
    let sectors = fs::read_to_string(format!("/sys/class/block/{name}/size"))?;
    let sectors: u64 = sectors.trim_end().parse().map_err(io::Error::other)?;
    let numbers = AttachDiskResponse {
        major: major(metadata.rdev()) as u32,
        minor: minor(metadata.rdev()) as u32,
        // Sectors of the block layer have this size, whatever those of the disk have.
        bytes: sectors * 512,
        ..Default::default()
    };
    let mut disk = Disk { name: name.to_owned(), numbers, users: BTreeSet::new(), mapped: None, filesystem: None };
    read_ahead(name);
    let Some(mount) = mount else { return Ok(disk) };
    let AttachDiskResponse { major, minor, bytes, .. } = disk.numbers;
    disk.mapped = layer::set_up(serial, name, device, (&format!("{major}:{minor}"), bytes), &mount)?.map(Arc::new);
    let device = disk.mapped.as_ref().map_or_else(|| format!("/dev/{name}"), |mapped| mapped.path());
    if let Some(mapped) = &disk.mapped {
        read_ahead(mapped.path().trim_start_matches("/dev/"));
    }
    match Filesystem::mount(&device, Path::new(DISKS_PATH).join(serial), &mount, bytes) {
        Ok(filesystem) => {
            disk.filesystem = Some(Arc::new(filesystem));
            Ok(disk)
        }
        Err(error) => {
            if let Some(Err(error)) = disk.mapped.map(|mapped| mapped.remove()) {
                tracing::error!(serial, %error, "failed to remove the device over a disk that cannot be used");
            }
            Err(error)
        }
    }
}

/// Has the kernel read far ahead on a device, which works without, too. The file of the queue's folder would have the
/// same effect, but a write to it waits for the queue.
fn read_ahead(name: &str) {
    let file = format!("/sys/class/block/{name}/bdi/read_ahead_kb");
    if let Err(error) = fs::write(&file, READ_AHEAD_KIB.to_string()) {
        tracing::warn!(file, %error, "a disk is read in small parts");
    }
}

/// Removes what the kernel may know of a disk that has not appeared in time.
fn forget_target(target: u32) {
    if let Err(error) = scsi::forget_target(target) {
        tracing::error!(target, %error, "failed to remove a disk that has not appeared");
    }
}

/// The Disks service.
pub(crate) struct DisksService(pub(crate) Arc<Disks>);

#[async_trait]
impl husk_protos::disks_ttrpc::Disks for DisksService {
    async fn attach(&self, _: &TtrpcContext, request: AttachDiskRequest) -> ttrpc::Result<AttachDiskResponse> {
        let disks = self.0.clone();
        handle_uninterrupted(blocking("attach a disk", move || disks.attach(request))).await
    }

    async fn detach(&self, _: &TtrpcContext, request: DetachDiskRequest) -> ttrpc::Result<DetachDiskResponse> {
        let disks = self.0.clone();
        let detach = move || disks.detach(&request.serial, &request.container).map(|()| DetachDiskResponse::new());
        handle_uninterrupted(blocking("detach a disk", detach)).await
    }
}

/// Runs `work` on a thread: it may wait for the disk, and PID 1 must send heartbeats meanwhile.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, CallError> + Send + 'static,
) -> Result<T, CallError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(CallError::internal(what, &error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_is_frozen_only_while_all_its_containers_are_paused() {
        let disk = |users: &[&str]| Disk {
            name: "sda".into(),
            numbers: AttachDiskResponse::new(),
            users: users.iter().map(|user| (*user).to_owned()).collect(),
            mapped: None,
            filesystem: Some(Arc::new(Filesystem::at(users.join("+").into()))),
        };
        let disks = [("one", disk(&["a"])), ("two", disk(&["a", "b"])), ("three", disk(&["b"]))];
        let disks: BTreeMap<_, _> = disks.into_iter().map(|(serial, disk)| (serial.to_owned(), disk)).collect();
        let mut table = Table { disks, paused: BTreeSet::new() };
        let paths = |filesystems: Vec<Arc<Filesystem>>| {
            let mut paths: Vec<String> = filesystems.iter().map(|one| one.path().display().to_string()).collect();
            paths.sort();
            paths.join(" ")
        };
        let rows: [(&[&str], &str, &str, &str); 4] = [
            (&[], "a", "", "a a+b"),
            (&["a"], "a", "a", "a+b"),
            (&["a", "b"], "b", "a+b b", ""),
            (&["b"], "a", "", "a a+b"),
        ];
        for (paused, container, frozen, thawed) in rows {
            table.paused = paused.iter().map(|name| (*name).to_owned()).collect();
            let (all, some) = table.by_pause(container);
            assert_eq!((paths(all).as_str(), paths(some).as_str()), (frozen, thawed), "{paused:?} {container}");
        }
    }
}
