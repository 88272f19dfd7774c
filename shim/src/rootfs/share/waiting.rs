//! A folder or file of the host that is mounted once virtiofsd serves the share.

use std::fs::File;
use std::io;

use husk_protos::changes::SHARE_SOURCE;

use crate::rootfs::mount::{DetachedTree, Propagation};
use crate::rootfs::spec::{Bind, MountIdMap};

/// Name of the mount point in an entry for a container's root.
pub(super) const ROOTFS: &str = "rootfs";

/// A folder or file of the host that is to be mounted in the share.
#[derive(Debug)]
pub(super) struct Waiting {
    /// The field that requires the mount, and its source.
    pub(super) what: String,
    /// The name of the mount point in its entry.
    pub(super) name: &'static str,
    /// The source, opened with `O_PATH`.
    pub(super) file: File,
    /// Includes what is mounted below.
    pub(super) recursive: bool,
    /// Flags of all mounts (`MOUNT_ATTR_*`).
    pub(super) attributes: u64,
    pub(super) propagation: Propagation,
    /// The mapping of an ID-mapped mount.
    pub(super) id_map: Option<MountIdMap>,
}

impl Waiting {
    /// The source of a bind mount.
    pub(super) fn for_bind(what: String, file: File, bind: &Bind) -> Self {
        Self {
            what,
            name: SHARE_SOURCE,
            file,
            recursive: bind.recursive,
            attributes: if bind.read_only_below { libc::MOUNT_ATTR_RDONLY } else { 0 },
            propagation: if bind.follows_host { Propagation::Slave } else { Propagation::Private },
            id_map: bind.id_map.clone(),
        }
    }

    /// Clones the mounts of the source; if `read_only`, the topmost is read-only. Only now: a clone that is not attached
    /// receives no mounts of the host.
    ///
    /// # Errors
    /// When open_tree(2) or mount_setattr(2) fails.
    pub(super) fn clone_tree(&self, read_only: bool) -> io::Result<DetachedTree> {
        let tree = DetachedTree::clone_of_file(&self.file, self.recursive)?;
        if let Some(MountIdMap { map, recursive }) = &self.id_map {
            tree.map_ids(&map.namespace()?, *recursive)?;
        }
        tree.restrict(self.attributes, self.propagation)?;
        if read_only {
            tree.restrict_top(libc::MOUNT_ATTR_RDONLY, self.propagation)?;
        }
        Ok(tree)
    }
}
