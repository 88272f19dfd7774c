//! Why the VM does not have a disk.

use std::path::PathBuf;

use crate::disks::image::ImageError;
use crate::disks::scratch::ScratchError;
use crate::disks::volume::VolumeFileError;
use crate::guest::client::GuestError;
use crate::state::images::ImageLeaseError;
use crate::vmm::VmmError;

/// Why the VM does not have a disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// The image is leased by another sandbox, or cannot be.
    #[error("the disk image {}", path.display())]
    Lease { path: PathBuf, source: ImageLeaseError },
    /// The image is that of a disk that the VM has in another way.
    #[error("the disk image {}: the sandbox uses it already with other options", .0.display())]
    Differs(PathBuf),
    /// The sandbox's scratch disk is not encrypted, and a container asks for one that is.
    #[error("the sandbox has a scratch disk already, which is not encrypted")]
    PlainScratch,
    /// The image cannot be opened.
    #[error(transparent)]
    Open(#[from] ImageError),
    /// The image of a direct-assigned volume is something else.
    #[error("the direct-assigned volume {} is no block device", .0.display())]
    NoDevice(PathBuf),
    /// The scratch disk.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// The file of a volume.
    #[error(transparent)]
    Volume(#[from] VolumeFileError),
    /// The image's descriptor.
    #[error("the disk image {}", path.display())]
    Image { path: PathBuf, source: std::io::Error },
    /// The machine does not have it.
    #[error("the disk image {}", path.display())]
    Machine { path: PathBuf, source: VmmError },
    /// The guest does not have it.
    #[error("the disk image {}", path.display())]
    Guest { path: PathBuf, source: GuestError },
}
