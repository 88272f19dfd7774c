//! Disks of the running VM: attached for the first container that uses them, and taken away after the last.
//!
//! An image is leased and locked, the machine gets the disk, and the guest finds and mounts it; in reverse order for the
//! end. The machine's descriptor keeps the lock, so the image is free as soon as the machine is dead, however it dies.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::stream::{self, StreamExt};
use husk_protos::DISKS_PATH;
use husk_protos::chain::Chain;
use husk_protos::disks::{AttachDiskRequest, DetachDiskRequest, DiskEncryption, DiskExtent, DiskMount, DiskVerity};
use serde_json::json;
use ttrpc::context::with_duration;

use crate::config::verity::Verity;
use crate::disks::image::{Access, Image};
use crate::disks::volume::{self, Sizing};
use crate::disks::written::Extent;
use crate::disks::{GuestLayer, GuestMount, Kind, NewDisk};
use crate::guest::client::GuestError;
use crate::host::process::ProcessId;
use crate::sandbox::disk_error::DiskError;
use crate::sandbox::disk_table::{AttachedDisk, Disk};
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::sandbox::thread::blocking;
use crate::state::images::ImageLeaseError;
use crate::state::journal::Journal;
use crate::state::lease::Holder;
use crate::state::recent::EventKind;
use crate::state::{Owner, Step};
use crate::vm::Vm;
use crate::vmm::PluggedDisk;

/// A disk whose image is opened only if the VM does not have it: a block device can be opened for one machine, and once.
pub(super) struct Wanted {
    pub(super) kind: Kind,
    /// The image's identity, if there is an image.
    pub(super) image: Option<String>,
    pub(super) access: Access,
    pub(super) mount: Option<GuestMount>,
    pub(super) volume: Option<Sizing>,
}

/// Opens an image.
pub(super) type Open = Box<dyn FnOnce() -> Result<Image, DiskError> + Send>;

/// How many disks are attached at the same time: while the guest mounts one, the machine gets the next.
const AT_ONCE: usize = 4;

impl Sandbox {
    /// Gives a container a disk. A disk that the VM has already is shared.
    ///
    /// # Errors
    /// See [`DiskError`]. Nothing is left behind.
    pub(super) async fn attach_disk(
        &self,
        vm: &Arc<Vm>,
        container: &str,
        disk: NewDisk,
    ) -> Result<AttachedDisk, SandboxError> {
        let _changing = self.disks.changing.lock().await;
        self.attach_opened(vm, container, disk).await
    }

    /// Gives a container several disks, as [`Self::attach_disk`] does. Returns a result for each, in their order.
    pub(super) async fn attach_several(
        &self,
        vm: &Arc<Vm>,
        container: &str,
        disks: Vec<NewDisk>,
    ) -> Vec<Result<AttachedDisk, SandboxError>> {
        let _changing = self.disks.changing.lock().await;
        let attach = |disk: NewDisk| (Some(disk.image.id().to_owned()), self.attach_opened(vm, container, disk));
        some_at_once(disks.into_iter().map(attach).collect()).await
    }

    /// Gives a container several disks, and opens the image of each that the VM does not have. Returns the disks in their
    /// order.
    ///
    /// # Errors
    /// The first of them, see [`Self::attach_disk`].
    pub(super) async fn attach_wanted(
        &self,
        vm: &Arc<Vm>,
        container: &str,
        disks: Vec<(Wanted, Open)>,
    ) -> Result<Vec<AttachedDisk>, SandboxError> {
        let _changing = self.disks.changing.lock().await;
        let attach =
            |(wanted, open): (Wanted, Open)| (wanted.image.clone(), self.attach_one(vm, container, wanted, open));
        some_at_once(disks.into_iter().map(attach).collect()).await.into_iter().collect()
    }

    async fn attach_one(
        &self,
        vm: &Vm,
        container: &str,
        Wanted { kind, image, access, mount, volume }: Wanted,
        open: Open,
    ) -> Result<AttachedDisk, SandboxError> {
        if let Some(image) = &image
            && let Some(attached) = self.attach_image(vm, container, image, access, mount.as_ref()).await?
        {
            return Ok(attached);
        }
        let image = blocking("open a disk image", open).await?;
        self.attach_opened(vm, container, NewDisk { kind, image, mount, volume }).await
    }

    async fn attach_opened(&self, vm: &Vm, container: &str, disk: NewDisk) -> Result<AttachedDisk, SandboxError> {
        let (image, mount) = (&disk.image, disk.mount.as_ref());
        match self.attach_image(vm, container, image.id(), image.access(), mount).await? {
            Some(attached) => Ok(attached),
            None => self.add_disk(vm, container, disk).await,
        }
    }

    /// Gives a container the disk with this image, if the VM has it.
    async fn attach_image(
        &self,
        vm: &Vm,
        container: &str,
        image: &str,
        access: Access,
        mount: Option<&GuestMount>,
    ) -> Result<Option<AttachedDisk>, SandboxError> {
        let known = self.disks.table().disks.iter().find(|known| known.image == image).cloned();
        match known {
            None => Ok(None),
            Some(known) if known.access != access || known.mount.as_ref() != mount => {
                Err(DiskError::Differs(known.path).into())
            }
            Some(known) => self.share_disk(vm, container, known).await.map(Some),
        }
    }

    /// Gives a container the first disk of this kind, if the VM has one.
    ///
    /// # Errors
    /// Those of the guest.
    pub(super) async fn attach_known(
        &self,
        vm: &Arc<Vm>,
        container: &str,
        kind: Kind,
    ) -> Result<Option<AttachedDisk>, SandboxError> {
        let _changing = self.disks.changing.lock().await;
        let known = self.disks.table().disks.iter().find(|known| known.kind == kind).cloned();
        match known {
            Some(known) => self.share_disk(vm, container, known).await.map(Some),
            None => Ok(None),
        }
    }

    /// Lets a container use a disk that the VM has.
    async fn share_disk(&self, vm: &Vm, container: &str, known: Disk) -> Result<AttachedDisk, SandboxError> {
        let (serial, path) = (known.attached.serial, known.path);
        let (attached, bytes) = attach_in_guest(vm, container, &serial, known.number, &path, known.mount).await?;
        let mut table = self.disks.table();
        if let Some(known) = table.disks.iter_mut().find(|known| known.attached.serial == serial) {
            known.bytes = bytes;
            if !known.users.iter().any(|user| user == container) {
                known.users.push(container.to_owned());
            }
        }
        Ok(attached)
    }

    /// Gives the VM another disk.
    async fn add_disk(&self, vm: &Vm, container: &str, disk: NewDisk) -> Result<AttachedDisk, SandboxError> {
        let serial = {
            let mut table = self.disks.table();
            table.count += 1;
            format!("{}-{}", disk.kind.name(), table.count)
        };
        let added = self.add_leased(vm, container, &serial, disk).await;
        if added.is_err() {
            self.release_image(&serial).await;
        }
        added
    }

    async fn add_leased(
        &self,
        vm: &Vm,
        container: &str,
        serial: &str,
        NewDisk { kind, image, mount, volume }: NewDisk,
    ) -> Result<AttachedDisk, SandboxError> {
        let (path, access, id) = (image.path().to_owned(), image.access(), image.id().to_owned());
        let (journal, owner) = (self.journal.clone(), Owner::Disk(serial.to_owned()));
        let image = blocking("lease a disk image", move || {
            let leased = lease(&journal, owner, &image);
            leased.map(|()| image).map_err(|(path, source)| DiskError::Lease { path, source })
        })
        .await?;
        if let Some(sizing) = volume {
            volume::prepare(&image, sizing).await.map_err(DiskError::from)?;
        }
        let cache = image.cache().map_err(|source| DiskError::Image { path: path.clone(), source })?;
        let plugged = PluggedDisk {
            serial: serial.to_owned(),
            is_device: image.is_device(),
            read_only: access != Access::Exclusive,
            cache,
            image: image.into_fd(),
        };
        let number = vm.plug_disk(plugged).await;
        let number = number.map_err(|source| DiskError::Machine { path: path.clone(), source })?;
        let (attached, bytes) = match attach_in_guest(vm, container, serial, number, &path, mount.clone()).await {
            Ok(attached) => attached,
            Err(error) => {
                unplug(vm, serial, number).await;
                return Err(error);
            }
        };
        tracing::info!(container, serial, path = %path.display(), bytes, "disk attached");
        let fields = json!({"container": container, "serial": serial, "path": path, "kind": kind.name()});
        self.recent().note(EventKind::Sandbox, "a disk was attached", fields);
        let users = vec![container.to_owned()];
        let disk = Disk { attached: attached.clone(), kind, number, image: id, path, access, mount, bytes, users };
        self.disks.table().disks.push(disk);
        Ok(attached)
    }

    /// Ends a container's use of its disks, the last one first. A guest that does not let go of a disk in time loses it.
    pub(super) async fn detach_disks(&self, container: &str) {
        let _changing = self.disks.changing.lock().await;
        let used: Vec<Disk> = {
            let table = self.disks.table();
            let used = |disk: &&Disk| disk.users.iter().any(|user| user == container);
            table.disks.iter().rev().filter(used).cloned().collect()
        };
        for disk in used {
            let serial = &disk.attached.serial;
            let vm = self.live_vm().ok();
            if let Some(vm) = &vm {
                detach_in_guest(vm, container, serial).await;
            }
            if disk.users.len() > 1 {
                let mut table = self.disks.table();
                if let Some(disk) = table.disks.iter_mut().find(|known| known.attached.serial == *serial) {
                    disk.users.retain(|user| user != container);
                }
                continue;
            }
            if let Some(vm) = &vm {
                unplug(vm, serial, disk.number).await;
            }
            self.disks.table().disks.retain(|known| known.attached.serial != *serial);
            self.release_image(serial).await;
            self.recent().note(EventKind::Sandbox, "a disk was detached", json!({"serial": serial}));
        }
    }

    async fn release_image(&self, serial: &str) {
        if let Err(error) = self.journal.undo(Owner::Disk(serial.to_owned())).await {
            tracing::error!(serial, error = %Chain(&error), "failed to release a disk image");
        }
    }
}

/// Attaches disks, some at the same time, but one after the other where an image may be the same: then the first one is
/// shared.
async fn some_at_once<F: Future>(attaching: Vec<(Option<String>, F)>) -> Vec<F::Output> {
    let mut images = HashSet::new();
    let (first, later): (Vec<_>, Vec<_>) = attaching
        .into_iter()
        .enumerate()
        .partition(|(_, (image, _))| image.as_ref().is_some_and(|image| images.insert(image.clone())));
    let numbered = |(number, (_, attach)): (usize, (Option<String>, F))| async move { (number, attach.await) };
    let first = first.into_iter().map(numbered).collect::<Vec<_>>();
    let mut done: Vec<(usize, F::Output)> = stream::iter(first).buffer_unordered(AT_ONCE).collect().await;
    for other in later.into_iter().map(numbered) {
        done.push(other.await);
    }
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, attached)| attached).collect()
}

/// Locks an image and records whose it is.
fn lease(journal: &Journal, owner: Owner, image: &Image) -> Result<(), (PathBuf, ImageLeaseError)> {
    let lease = || {
        if image.access() == Access::Shared {
            return Ok(());
        }
        let shim = ProcessId::own().map_err(ImageLeaseError::Shim)?;
        let (leases, holder) = journal.with(|state| {
            let (namespace, sandbox) = (state.namespace().to_owned(), state.sandbox().to_owned());
            Ok((state.image_leases(), Holder { namespace, sandbox, shim }))
        })?;
        let step = Step::Image { image: image.id().to_owned(), leases: leases.clone(), shim };
        leases.lease(image.id(), &holder, || journal.record(&owner, [step]), || image.lock())
    };
    lease().map_err(|error| (image.path().to_owned(), error))
}

/// Lets the guest find a disk, and mount it.
async fn attach_in_guest(
    vm: &Vm,
    container: &str,
    serial: &str,
    number: u32,
    path: &Path,
    mount: Option<GuestMount>,
) -> Result<(AttachedDisk, u64), SandboxError> {
    let mount = mount.map(guest_mount);
    let request = AttachDiskRequest {
        serial: serial.to_owned(),
        target: number,
        container: container.to_owned(),
        mount: mount.into(),
        ..Default::default()
    };
    let attached = vm.guest.disks.attach(vm.guest.context(), &request).await.map_err(GuestError::from);
    let attached = attached.map_err(|source| DiskError::Guest { path: path.to_owned(), source })?;
    let disk = AttachedDisk {
        serial: serial.to_owned(),
        guest_path: Path::new(DISKS_PATH).join(serial),
        major: attached.major,
        minor: attached.minor,
    };
    Ok((disk, attached.bytes))
}

/// A mount in the words of the protocol.
fn guest_mount(GuestMount { fs_type, flags, data, grow, layer, temporary }: GuestMount) -> DiskMount {
    let mut mount = DiskMount { type_: fs_type, flags, data, grow, temporary, ..Default::default() };
    match layer {
        None => {}
        Some(GuestLayer::Verified(Verity { root_hash, hash_offset })) => {
            mount.verity =
                Some(DiskVerity { root_hash: root_hash.bytes().to_vec(), hash_offset, ..Default::default() }).into();
        }
        Some(GuestLayer::Encrypted { written }) => {
            let extent = |Extent { offset, length }| DiskExtent { offset, length, ..Default::default() };
            let written = written.into_iter().map(extent).collect();
            mount.encryption = Some(DiskEncryption { written, ..Default::default() }).into();
        }
    }
    mount
}

async fn detach_in_guest(vm: &Vm, container: &str, serial: &str) {
    let request =
        DetachDiskRequest { serial: serial.to_owned(), container: container.to_owned(), ..Default::default() };
    // Part of Delete, which the guest may not delay.
    let context = with_duration(vm.kill_timeout());
    let detached = vm.guest.disks.detach(context, &request).await.map_err(GuestError::from);
    if let Err(error) = detached
        && vm.cause_of_death().is_none()
    {
        tracing::warn!(container, serial, error = %Chain(&error), "the guest keeps a disk of a deleted container");
    }
}

async fn unplug(vm: &Vm, serial: &str, number: u32) {
    if let Err(error) = vm.unplug_disk(number).await
        && vm.cause_of_death().is_none()
    {
        // The image stays locked, as long as the VM runs.
        tracing::error!(serial, error = %Chain(&error), "failed to take a disk away from the VM");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test]
    async fn disks_keep_their_order_and_an_image_that_is_wanted_twice_is_attached_before_it_is_shared() {
        let (running, most, attached) = (RefCell::new(0), RefCell::new(0), RefCell::new(Vec::new()));
        let attach = async |number: usize, image: Option<&'static str>| {
            let before = attached.borrow().contains(&image);
            *running.borrow_mut() += 1;
            let now = *running.borrow();
            most.replace_with(|most| now.max(*most));
            // The later ones are faster.
            for _ in number..20 {
                tokio::task::yield_now().await;
            }
            *running.borrow_mut() -= 1;
            attached.borrow_mut().push(image);
            (number, before)
        };
        let images = [Some("a"), Some("b"), Some("a"), None, Some("c"), Some("d"), Some("e"), Some("f"), Some("b")];
        let wanted = images.iter().enumerate();
        let wanted = wanted.map(|(number, image)| (image.map(str::to_owned), attach(number, *image))).collect();
        let done = some_at_once(wanted).await;
        assert_eq!(done.iter().map(|(number, _)| *number).collect::<Vec<_>>(), (0..images.len()).collect::<Vec<_>>());
        let shared: Vec<usize> = done.iter().filter(|(_, before)| *before).map(|(number, _)| *number).collect();
        assert_eq!((shared, *most.borrow()), (vec![2, 8], AT_ONCE));
    }
}
