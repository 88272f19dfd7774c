//! What a container's root consists of.

use std::path::PathBuf;

use containerd_shim_protos::types::mount::Mount;
use nix::mount::MsFlags;

use super::options::{Format, NewFolder};
use crate::config::verity::Verity;

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
    /// The hash tree by which the guest verifies what it reads.
    pub(crate) verity: Option<Verity>,
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
