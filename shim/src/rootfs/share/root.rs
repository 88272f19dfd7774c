//! What a container's root consists of: containerd's mounts, stacked on each other.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;

use super::error::ShareError;
use super::inspect::inspect;
use super::waiting::{ROOTFS, Waiting};
use crate::host::id_map::IdMap;
use crate::rootfs::mapped::{mount_overlay, take_id_map};
use crate::rootfs::mount::{MAX_OPTIONS, MountOptions, Propagation, mount_data, mount_filesystem, parse_options};
use crate::rootfs::spec::MountIdMap;

/// One of containerd's mounts.
pub(super) struct RootMount<'a> {
    index: usize,
    mount: &'a Mount,
    options: MountOptions,
    id_map: Option<IdMap>,
}

/// A folder of the host that is the root, or on top of it.
pub(super) struct Top {
    what: String,
    path: PathBuf,
    recursive: bool,
    attributes: u64,
    id_map: Option<IdMap>,
}

/// The parts of a root.
pub(super) struct Root<'a> {
    /// What is mounted in the shim's namespace. A bind mount below another mount is hidden, but takes its place.
    pub(super) filesystems: Vec<RootMount<'a>>,
    top: Option<RootMount<'a>>,
}

impl<'a> Root<'a> {
    /// Checks the options of containerd's mounts. [`crate::rootfs::plan`] has checked the rest.
    ///
    /// # Errors
    /// What husk does not support.
    pub(super) fn parse(mounts: &'a [Mount]) -> Result<Self, ShareError> {
        let parsed = mounts.iter().enumerate().map(|(index, mount)| RootMount::parse(index, mount));
        let mut filesystems = parsed.collect::<Result<Vec<_>, _>>()?;
        let top = filesystems.pop_if(|mount| mount.is_bind());
        Ok(Self { filesystems, top })
    }

    /// The folder that is mounted last, in virtiofsd's namespace: the topmost mount if it is a bind mount, or `rootfs`
    /// if there are no mounts.
    pub(super) fn top(&self, rootfs: &Path) -> Option<Top> {
        match &self.top {
            Some(mount) => Some(mount.folder()),
            None if self.filesystems.is_empty() => Some(Top {
                what: format!("root.path {:?}", rootfs.display()),
                path: rootfs.to_owned(),
                recursive: true,
                attributes: 0,
                id_map: None,
            }),
            None => None,
        }
    }
}

impl Top {
    /// The field that requires the mount, and its source.
    pub(super) fn what(&self) -> String {
        self.what.clone()
    }

    /// Opens the folder. Follows symbolic links, as mount(2) does.
    ///
    /// # Errors
    /// When the folder does not exist or is not accessible.
    pub(super) fn open(&self) -> io::Result<Waiting> {
        let path = inspect(&self.path)?.path;
        let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
        Ok(Waiting {
            what: self.what(),
            name: ROOTFS,
            file,
            recursive: self.recursive,
            attributes: self.attributes,
            propagation: Propagation::Private,
            id_map: self.id_map.clone().map(|map| MountIdMap { map, recursive: false }),
        })
    }
}

impl<'a> RootMount<'a> {
    fn parse(index: usize, mount: &'a Mount) -> Result<Self, ShareError> {
        let unsupported = |option: String| ShareError::Unsupported { index, option };
        let mut options = mount.options.clone();
        let id_map = take_id_map(&mut options).map_err(unsupported)?;
        let options = parse_options(&options).map_err(|option| unsupported(option.to_owned()))?;
        let parsed = Self { index, mount, options, id_map };
        match mount.options.iter().find(|option| option.starts_with("uidmap=")) {
            // Other filesystems have no layers, and this mount is their first one.
            Some(option) if mount.type_ != "overlay" && !parsed.is_bind() => Err(unsupported(option.clone())),
            _ => Ok(parsed),
        }
    }

    fn is_bind(&self) -> bool {
        self.mount.type_ == "bind" || self.options.bind.is_some()
    }

    /// The field that requires the mount, and its source.
    pub(super) fn what(&self) -> String {
        format!("rootfs[{}] ({} {:?})", self.index, self.mount.type_, self.mount.source)
    }

    fn folder(&self) -> Top {
        Top {
            what: self.what(),
            path: PathBuf::from(&self.mount.source),
            recursive: self.options.bind.unwrap_or(false),
            attributes: self.options.attributes,
            id_map: self.id_map.clone(),
        }
    }

    /// Mounts it in the shim's namespace.
    ///
    /// # Errors
    /// When the source cannot be opened or the mount fails.
    pub(super) fn mount(&self, target: &Path) -> io::Result<()> {
        if self.is_bind() {
            return self.folder().open()?.clone_tree(false)?.attach(target);
        }
        let (mount, options) = (self.mount, &self.options);
        if let Some(map) = &self.id_map {
            return mount_overlay(map, &mount.source, target, options.flags, &options.data);
        }
        let (folder, data) = mount_data(&mount.type_, &options.data).map_err(|length| {
            let message = format!("the options have {length} bytes, more than {MAX_OPTIONS}");
            io::Error::new(io::ErrorKind::InvalidInput, message)
        })?;
        mount_filesystem(&mount.type_, &mount.source, target, options.flags, &data, folder.as_deref())
    }
}
