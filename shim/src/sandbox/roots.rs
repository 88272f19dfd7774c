//! Root filesystems that the guest mounts: their disks are created if necessary, attached, and described to the guest.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protos::ROOTS_PATH;
use husk_protos::bundle::{self, DiskFolder, DiskRoot};

use crate::disks::image::{Access, Image};
use crate::disks::{GuestLayer, GuestMount, Kind, NewDisk, format, scratch};
use crate::prepare::disks::Scratch;
use crate::prepare::root::{Overlay, PlannedRoot};
use crate::rootfs::plan::{GuestRoot, NewFolder, Place, RootChoice, RootDisk, RootKind, RootPlan, Top};
use crate::sandbox::container::changes::Changes;
use crate::sandbox::disk_error::DiskError;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::sandbox::thread::blocking;
use crate::vm::Vm;

/// The folders of a disk for changes.
const UPPER: &str = "upper";
const WORK: &str = "work";
/// Options of an overlay. `volatile`: the disk ends with the VM, so that nothing has to reach the host's disk. Without the
/// others, the upper layer could refer to the files below it, and would be no complete description of the changes.
const OPTIONS: [&str; 4] = ["volatile", "index=off", "metacopy=off", "redirect_dir=off"];

/// A root whose disks are attached.
pub(super) struct Attached {
    /// What the guest mounts.
    pub(super) root: Option<DiskRoot>,
    /// What the guest has to copy back.
    pub(super) changes: Option<Arc<Changes>>,
    /// How the guest has it.
    pub(super) choice: RootChoice,
}

/// An overlay whose disk is not attached yet.
pub(super) struct NewOverlay<'a> {
    overlay: &'a Overlay,
    image: Image,
    layer: Option<GuestLayer>,
}

/// Creates the disk for the changes to a root, if it has one.
///
/// # Errors
/// Those of the file and of its filesystem.
pub(super) async fn new_overlay(root: &PlannedRoot) -> Result<Option<NewOverlay<'_>>, SandboxError> {
    let Some(overlay) = &root.overlay else { return Ok(None) };
    let Scratch { mib, folder, encrypted } = &overlay.scratch;
    let (image, layer) = scratch::create(folder, *mib, *encrypted).await.map_err(DiskError::from)?;
    Ok(Some(NewOverlay { overlay, image, layer }))
}

impl Sandbox {
    /// Attaches the disks of a container's root, if it has any. `share` is where the guest finds the root in the share, and
    /// `new` the disk for its changes.
    pub(super) async fn attach_root(
        &self,
        vm: &Arc<Vm>,
        id: &str,
        root: &PlannedRoot,
        share: &Path,
        new: Option<NewOverlay<'_>>,
    ) -> Result<Attached, SandboxError> {
        match (&root.plan, new) {
            (RootPlan::Guest(disks), _) => {
                let of_disks = self.attach_disks_of_root(vm, id, disks).await?;
                Ok(Attached { root: Some(of_disks), changes: None, choice: root.choice })
            }
            (RootPlan::Host(_), Some(new)) => self.attach_overlay(vm, id, new, root.choice, share).await,
            (RootPlan::Host(_), None) => Ok(Attached { root: None, changes: None, choice: root.choice }),
        }
    }

    async fn attach_disks_of_root(&self, vm: &Arc<Vm>, id: &str, root: &GuestRoot) -> Result<DiskRoot, SandboxError> {
        let mut disks = Vec::new();
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
                layer: disk.verity.map(GuestLayer::Verified),
                ..GuestMount::default()
            };
            disks.push(NewDisk::new(kind, image, Some(mount)));
        }
        let attached = self.attach_several(vm, id, disks).await.into_iter();
        let paths = attached.map(|attached| Ok(attached?.guest_path)).collect::<Result<Vec<_>, SandboxError>>()?;
        Ok(disk_root(root, &paths))
    }

    /// Attaches a new disk for the changes to a root in the share.
    async fn attach_overlay(
        &self,
        vm: &Arc<Vm>,
        id: &str,
        NewOverlay { overlay, image, layer }: NewOverlay<'_>,
        mut choice: RootChoice,
        share: &Path,
    ) -> Result<Attached, SandboxError> {
        let below = DiskFolder { disk: text(share), ..Default::default() };
        let mut lower = vec![below.clone()];
        if let Some(layers) = &overlay.layers {
            match self.attach_layers(vm, id, &overlay.store, layers).await? {
                Ok(images) => {
                    let whole = |path: &PathBuf| DiskFolder { disk: text(path), ..Default::default() };
                    lower = images.iter().map(whole).collect();
                    choice.kind = RootKind::Erofs;
                }
                Err(why) => choice.why = why,
            }
        }
        let mount = GuestMount { temporary: true, ..scratch::mount(layer) };
        let disk = self.attach_disk(vm, id, NewDisk::new(Kind::Overlay, image, Some(mount))).await?.guest_path;
        let folder = |path: &str| DiskFolder { disk: text(&disk), path: path.to_owned(), ..Default::default() };
        let new_folder =
            |path| bundle::NewFolder { folder: Some(folder(path)).into(), mode: 0o755, ..Default::default() };
        let root = DiskRoot {
            folders: vec![new_folder(UPPER), new_folder(WORK)],
            lower,
            overlay: true,
            upper: Some(folder(UPPER)).into(),
            work: Some(folder(WORK)).into(),
            options: OPTIONS.map(str::to_owned).to_vec(),
            attributes_of: Some(below.clone()).into(),
            ..Default::default()
        };
        let recent = self.recent().clone();
        let merged = (choice.kind == RootKind::Erofs)
            .then(|| DiskFolder { disk: text(&Path::new(ROOTS_PATH).join(id)), ..Default::default() });
        let changes = overlay
            .timeout
            .map(|timeout| Arc::new(Changes::new(vm.clone(), recent, id, [folder(UPPER), below], merged, timeout)));
        Ok(Attached { root: Some(root), changes, choice })
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
