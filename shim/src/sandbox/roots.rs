//! Root filesystems that consist of disks: their images are created if necessary, attached, and described to the guest.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protos::bundle::{self, DiskFolder, DiskRoot};

use crate::disks::image::{Access, Image};
use crate::disks::{GuestLayer, GuestMount, Kind, NewDisk, format};
use crate::rootfs::plan::{GuestRoot, NewFolder, Place, RootDisk, RootPlan, Top};
use crate::sandbox::disk_error::DiskError;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::sandbox::thread::blocking;
use crate::vm::Vm;

impl Sandbox {
    /// Attaches the disks of a container's root, if it has any. Returns what the guest mounts.
    pub(super) async fn attach_root(
        &self,
        vm: &Arc<Vm>,
        id: &str,
        plan: &RootPlan,
    ) -> Result<Option<DiskRoot>, SandboxError> {
        let RootPlan::Guest(root) = plan else { return Ok(None) };
        let mut paths = Vec::new();
        for disk in &root.disks {
            if let Some(format) = &disk.format {
                let created = format::create(&disk.image, format.size, &format.fs_type, format.uuid.as_deref());
                created.await?;
            }
            let (path, access) = (disk.image.clone(), access(disk));
            let image = blocking("open an image", move || Image::open(&path, access).map_err(DiskError::from)).await?;
            let kind = if disk.read_only() { Kind::Layer } else { Kind::Root };
            let mount = GuestMount {
                fs_type: disk.fs_type.clone(),
                flags: disk.flags.bits(),
                data: disk.data.clone(),
                grow: false,
                layer: disk.verity.map(GuestLayer::Verified),
            };
            paths.push(self.attach_disk(vm, id, NewDisk::new(kind, image, Some(mount))).await?.guest_path);
        }
        Ok(Some(disk_root(root, &paths)))
    }
}

fn access(disk: &RootDisk) -> Access {
    match disk.fs_type.as_str() {
        // Nothing writes to such a filesystem.
        "erofs" => Access::Shared,
        _ if disk.read_only() => Access::ReadOnly,
        _ => Access::Exclusive,
    }
}

/// Describes a root to the guest, which has mounted the disks at `paths`.
fn disk_root(root: &GuestRoot, paths: &[PathBuf]) -> DiskRoot {
    let folder = |place: &Place| DiskFolder {
        disk: paths.get(place.disk).map_or_else(String::new, |path: &PathBuf| text(path)),
        path: place.path.clone(),
        ..Default::default()
    };
    let new_folder = |new: &NewFolder<Place>| bundle::NewFolder {
        folder: Some(folder(&new.place)).into(),
        mode: new.mode,
        uid: new.owner.0,
        gid: new.owner.1,
        ..Default::default()
    };
    let folders = root.folders.iter().map(new_folder).collect();
    match &root.top {
        Top::Folder { place, flags } => {
            DiskRoot { folders, lower: vec![folder(place)], flags: flags.bits(), ..Default::default() }
        }
        Top::Overlay { lower, upper, flags, data } => DiskRoot {
            folders,
            lower: lower.iter().map(folder).collect(),
            overlay: true,
            upper: upper.as_ref().map(|(upper, _)| folder(upper)).into(),
            work: upper.as_ref().map(|(_, work)| folder(work)).into(),
            options: data.clone(),
            flags: flags.bits(),
            ..Default::default()
        },
    }
}

/// A path that husk has chosen, which is UTF-8.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
