//! Images on the host that become disks of a VM.
//!
//! | file        | contents                                                            |
//! |-------------|---------------------------------------------------------------------|
//! | `image.rs`  | opens and locks a file or block device                              |
//! | `blank.rs`  | whether a file is provably blank                                    |
//! | `format.rs` | makes filesystems on blank files, and images                                 |
//! | `layers/`   | read-only images of the layers of root filesystems                  |
//! | `volume.rs` | the file of a volume: created, grown, and formatted on its first use |
//! | `scratch.rs` | a file without a name for data that ends with the VM              |
//! | `written.rs` | which parts of a file have been written                            |
//!
//! The host never reads a filesystem that a guest can have written: only the guest does.

mod blank;
pub(crate) mod format;
pub(crate) mod image;
pub mod layers;
pub(crate) mod scratch;
pub(crate) mod volume;
pub(crate) mod written;

use crate::config::verity::Verity;
use image::Image;
use written::Extent;

/// What a disk is for. Its serial begins with the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A container's root filesystem.
    Root,
    /// A read-only part of a root filesystem.
    Layer,
    /// A volume.
    Volume,
    /// A block device of the host, for a container that uses it as a device.
    Device,
    /// Data that ends with the VM.
    Scratch,
    /// The upper layer of a container's overlay. What is to stay of it is copied before the container ends.
    Overlay,
}

impl Kind {
    /// The name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Layer => "layer",
            Self::Volume => "volume",
            Self::Device => "device",
            Self::Scratch => "scratch",
            Self::Overlay => "overlay",
        }
    }
}

/// How the guest mounts a disk: arguments of mount(2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GuestMount {
    pub(crate) fs_type: String,
    pub(crate) flags: u64,
    pub(crate) data: String,
    /// Grow the filesystem, ext4, to the size of the disk.
    pub(crate) grow: bool,
    /// What the guest sets up between the disk and its filesystem.
    pub(crate) layer: Option<GuestLayer>,
    /// Nobody reads the disk after the guest.
    pub(crate) temporary: bool,
}

/// What the guest sets up between a disk and its filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GuestLayer {
    /// The guest's kernel verifies each block that it reads.
    Verified(Verity),
    /// The guest encrypts the disk with a key of its own, beginning with what the filesystem's maker has written.
    Encrypted { written: Vec<Extent> },
}

impl GuestLayer {
    /// What the disk is, for operators.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Verified(_) => "verified",
            Self::Encrypted { .. } => "encrypted",
        }
    }
}

/// A disk for the VM.
#[derive(Debug)]
pub(crate) struct NewDisk {
    pub(crate) kind: Kind,
    pub(crate) image: Image,
    /// None: the guest does not mount it.
    pub(crate) mount: Option<GuestMount>,
    /// Prepare the image as that of a volume, once it is locked.
    pub(crate) volume: Option<volume::Sizing>,
}

impl NewDisk {
    /// A disk whose image is ready for use.
    pub(crate) fn new(kind: Kind, image: Image, mount: Option<GuestMount>) -> Self {
        Self { kind, image, mount, volume: None }
    }
}
