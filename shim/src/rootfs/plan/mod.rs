//! What containerd's mounts for a container's root mean: which of them the host mounts in the share, and which ones the
//! guest mounts from disks. Pure.
//!
//! | file          | contents                                                                 |
//! |---------------|--------------------------------------------------------------------------|
//! | `guest.rs`    | roots of disks                                                           |
//! | `host.rs`     | roots of the host's folders, and the only effects here: they are created |
//! | `options.rs`  | the options of filesystems, and those of containerd's mount manager      |
//! | `part.rs`     | one mount: its transforms, its type, and what it refers to               |
//! | `template.rs` | the templates of containerd's mount manager                              |
//!
//! The host's kernel never mounts a disk: its filesystem may have been written by a stranger, and a kernel trusts the
//! filesystems that it mounts. Folders and overlays of them are the host's own.
//!
//! From version 2.2, containerd's mount manager prepares mounts whose type begins with a transform, such as
//! `format/mkdir/overlay`, and mounts those on which they depend. husk claims what it does itself ([`TYPES`] and
//! [`TRANSFORMS`]). containerd keeps the numbers of mounts only if it mounts none itself, so husk claims all of them.

mod guest;
mod host;
mod options;
mod part;
mod template;

use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nix::mount::MsFlags;

pub(crate) use self::host::{FolderError, create_folders};
pub(crate) use self::options::Format;
use self::part::Part;
use crate::config::problem::Problem;

/// The types of mounts that containerd's mount manager leaves to husk, besides those that it never mounts.
pub(crate) const TYPES: [&str; 2] = ["erofs", "loop"];
/// The transforms that containerd's mount manager leaves to husk.
pub(crate) const TRANSFORMS: [&str; 3] = ["format", "mkdir", "mkfs"];
/// Most mounts of a root: each may be a disk. containerd's limit is 255.
const MAX_MOUNTS: usize = 255;

/// Where a container's root comes from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RootPlan {
    /// The host mounts it in the share.
    Host(HostRoot),
    /// The guest mounts it from disks.
    Guest(GuestRoot),
}

/// A root in the share.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct HostRoot {
    /// Mounts without transforms, stacked on each other. Without mounts, the root is the spec's folder.
    pub(crate) mounts: Vec<Mount>,
    /// Folders that have to exist before.
    pub(crate) folders: Vec<NewFolder<PathBuf>>,
}

/// A root that the guest mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestRoot {
    /// The disks, in the order in which they are attached.
    pub(crate) disks: Vec<RootDisk>,
    /// Folders that the guest creates on the disks.
    pub(crate) folders: Vec<NewFolder<Place>>,
    /// What the root is.
    pub(crate) top: Top,
}

/// A filesystem on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RootDisk {
    /// The image file or block device on the host.
    pub(crate) image: PathBuf,
    pub(crate) fs_type: String,
    pub(crate) flags: MsFlags,
    /// The filesystem's options.
    pub(crate) data: String,
    /// The image is created if it does not exist.
    pub(crate) format: Option<Format>,
}

impl RootDisk {
    pub(crate) fn read_only(&self) -> bool {
        self.flags.contains(MsFlags::MS_RDONLY)
    }
}

/// What the guest shows as the container's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Top {
    /// A folder of a disk.
    Folder { place: Place, flags: MsFlags },
    /// An overlay.
    Overlay {
        /// The uppermost layer first.
        lower: Vec<Place>,
        /// The upper folder and the working folder, unless the root is read-only.
        upper: Option<(Place, Place)>,
        flags: MsFlags,
        /// Further options.
        data: Vec<String>,
    },
}

/// A folder of a disk's filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Index in [`GuestRoot::disks`].
    pub(crate) disk: usize,
    /// Relative, without `..`; empty for the filesystem's root.
    pub(crate) path: String,
}

/// A folder that has to exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewFolder<P> {
    pub(crate) place: P,
    /// Permission bits.
    pub(crate) mode: u32,
    /// User and group.
    pub(crate) owner: (u32, u32),
}

/// What the plan needs to know of the host.
pub(crate) struct HostView<'a> {
    /// Whether a path leads to a block device or a regular file.
    pub(crate) is_image: &'a dyn Fn(&Path) -> bool,
    /// Whether the host uses a block device, for example because it has mounted it.
    pub(crate) is_busy: &'a dyn Fn(&Path) -> bool,
}

impl HostView<'static> {
    /// The host itself.
    pub(crate) fn of_host() -> Self {
        Self { is_image: &host::is_image, is_busy: &host::is_busy }
    }
}

/// Plans a root.
///
/// # Errors
/// What husk does not support, by field and value.
pub(crate) fn plan(mounts: &[Mount], view: &HostView<'_>) -> Result<RootPlan, Vec<Problem>> {
    if mounts.len() > MAX_MOUNTS {
        let why = format!("more than {MAX_MOUNTS} mounts are not supported");
        return Err(vec![Problem { key: "rootfs".into(), value: Some(mounts.len().to_string()), why }]);
    }
    let mut parts: Vec<Part> = Vec::new();
    let mut problems = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        match Part::parse(index, mount, &parts, view) {
            Ok(part) => parts.push(part),
            // What refers to this mount would only cause further problems.
            Err(problem) => {
                problems.push(problem);
                break;
            }
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let planned = match parts.iter().any(Part::is_disk) {
        true => guest::root(parts).map(RootPlan::Guest),
        false => host::root(mounts, parts).map(RootPlan::Host),
    };
    planned.map_err(|problem| vec![problem])
}

#[cfg(test)]
mod tests;
