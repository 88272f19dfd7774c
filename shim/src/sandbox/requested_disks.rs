//! The disks that a container asks for: volumes, block devices of the host, and scratch space.

use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::volumes::VolumeRequest;
use crate::disks::image::{Access, Image};
use crate::disks::volume::{self, Sizing};
use crate::disks::{GuestLayer, GuestMount, Kind, NewDisk, scratch};
use crate::prepare::Prepared;
use crate::prepare::disks::{SCRATCH, Scratch};
use crate::rootfs::direct::DirectVolume;
use crate::rootfs::spec::DirectMount;
use crate::sandbox::disk_error::DiskError;
use crate::sandbox::disks::{Open, Wanted};
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::sandbox::thread::blocking;
use crate::vm::Vm;

/// The filesystem of volumes.
const EXT4: &str = "ext4";

impl Sandbox {
    /// Attaches the disks that a container asks for, and completes its spec with them. Call it when the spec's other
    /// files have their places.
    pub(super) async fn attach_disks(
        &self,
        vm: &Arc<Vm>,
        id: &str,
        prepared: &mut Prepared,
    ) -> Result<(), SandboxError> {
        self.attach_devices(vm, id, prepared).await?;
        self.attach_direct(vm, id, prepared).await?;
        // A pod's sandbox container carries the annotations of the pod, and has no program that would use a volume.
        if prepared.is_pods_sandbox() {
            return Ok(());
        }
        let (mut wanted_volumes, mut places) = (Vec::new(), Vec::new());
        for volume in prepared.disks.volumes.clone() {
            let VolumeRequest { source, destination, size_mib, grow, read_only, verity } = volume;
            let wanted = Wanted {
                kind: Kind::Volume,
                image: identity(&source, |path| fs::symlink_metadata(path)).await?,
                access: if read_only { Access::ReadOnly } else { Access::Exclusive },
                mount: Some(GuestMount {
                    fs_type: EXT4.to_owned(),
                    flags: if read_only { libc::MS_RDONLY } else { 0 },
                    grow: !read_only,
                    layer: verity.map(GuestLayer::Verified),
                    ..GuestMount::default()
                }),
                volume: Some(Sizing { mib: size_mib, grow, read_only }),
            };
            let open: Open = Box::new(move || volume::open(&source, read_only).map_err(DiskError::from));
            wanted_volumes.push((wanted, open));
            places.push((destination, read_only));
        }
        let attached = self.attach_wanted(vm, id, wanted_volumes).await?;
        for (attached, (destination, read_only)) in attached.into_iter().zip(places) {
            prepared.rewritten.mount_disk(&attached.guest_path, &destination, read_only);
        }
        if let Some(scratch) = prepared.disks.scratch.clone() {
            let path = self.attach_scratch(vm, id, scratch).await?;
            prepared.rewritten.mount_disk(&path, Path::new(SCRATCH), false);
        }
        Ok(())
    }

    /// Attaches block devices of the host, which have other numbers in the guest.
    async fn attach_devices(&self, vm: &Arc<Vm>, id: &str, prepared: &mut Prepared) -> Result<(), SandboxError> {
        let (mut devices, mut numbers) = (Vec::new(), Vec::new());
        for device in prepared.rewritten.block_devices.clone() {
            let access = if device.read_only { Access::ReadOnly } else { Access::Exclusive };
            let (major, minor) = (device.major, device.minor);
            let image = Some(Image::id_of_device(major, minor));
            let wanted = Wanted { kind: Kind::Device, image, access, mount: None, volume: None };
            let open: Open = Box::new(move || Image::open_device(major, minor, access).map_err(DiskError::from));
            devices.push((wanted, open));
            numbers.push((major, minor));
        }
        let attached = self.attach_wanted(vm, id, devices).await?;
        let in_guest = attached.into_iter().map(|disk| (disk.major.into(), disk.minor.into()));
        let numbers: Vec<_> = numbers.into_iter().zip(in_guest).collect();
        prepared.rewritten.place_devices(&numbers);
        Ok(())
    }

    /// Attaches block devices whose filesystems the guest mounts. The host has none of them mounted: a device that is in
    /// use cannot be opened exclusively, and one that is open so cannot be mounted.
    async fn attach_direct(&self, vm: &Arc<Vm>, id: &str, prepared: &mut Prepared) -> Result<(), SandboxError> {
        let (mut volumes, mut places) = (Vec::new(), Vec::new());
        for DirectMount { index, volume } in prepared.rewritten.direct.clone() {
            let DirectVolume { device, fs_type, flags, data } = volume;
            let grow = fs_type == EXT4;
            let wanted = Wanted {
                kind: Kind::Volume,
                image: identity(&device, |path| fs::metadata(path)).await?,
                access: Access::Exclusive,
                mount: Some(GuestMount { fs_type, flags: flags.bits(), data, grow, ..GuestMount::default() }),
                volume: None,
            };
            let open: Open = Box::new(move || match Image::open(&device, Access::Exclusive)? {
                image if image.is_device() => Ok(image),
                _ => Err(DiskError::NoDevice(device)),
            });
            volumes.push((wanted, open));
            places.push(index);
        }
        let attached = self.attach_wanted(vm, id, volumes).await?;
        for (attached, index) in attached.into_iter().zip(places) {
            prepared.rewritten.place_disk(index, &attached.guest_path);
        }
        Ok(())
    }

    /// The VM's scratch disk, attached for one more container. Returns its path in the guest.
    async fn attach_scratch(
        &self,
        vm: &Arc<Vm>,
        id: &str,
        Scratch { mib, folder, encrypted }: Scratch,
    ) -> Result<PathBuf, SandboxError> {
        if encrypted && self.disks.has_plain_scratch() {
            return Err(DiskError::PlainScratch.into());
        }
        if let Some(attached) = self.attach_known(vm, id, Kind::Scratch).await? {
            return Ok(attached.guest_path);
        }
        let (image, layer) = scratch::create(&folder, mib, encrypted).await.map_err(DiskError::from)?;
        let disk = NewDisk::new(Kind::Scratch, image, Some(scratch::mount(layer)));
        Ok(self.attach_disk(vm, id, disk).await?.guest_path)
    }
}

/// The identity of an image, unless it does not exist or cannot be examined: then opening it says why.
async fn identity(
    path: &Path,
    examine: impl FnOnce(&Path) -> io::Result<Metadata> + Send + 'static,
) -> Result<Option<String>, SandboxError> {
    let path = path.to_owned();
    let identify = move || Ok::<_, DiskError>(examine(&path).ok().map(|metadata| Image::id_of(&metadata)));
    blocking("examine a disk image", identify).await
}
