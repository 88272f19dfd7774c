//! The folder that virtiofsd serves to the guest. For each container, it has the root and the sources of the spec's
//! bind mounts.
//!
//! ```text
//! <state>/skeleton/<id>/rootfs      a folder, created here because the guest does not see the skeleton
//! <state>/share/<id>/rootfs         the same folder through a read-only mount; the container's root is mounted on it
//! <state>/share/<id>/mounts/<n>     mount point for the source of the spec's mount n
//! ```
//!
//! The guest can do to the share whatever virtiofsd can. The share's own mount is therefore read-only: the guest can
//! neither place a symbolic link where the host is about to mount something, nor move a folder with a mount. The mount
//! has shared propagation, so that later mounts appear in virtiofsd's mount namespace, which is a slave of the shim's.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;

use crate::rootfs::mount::{DetachedTree, MAX_OPTIONS, Propagation, mount_data, mount_filesystem, parse_options};
use crate::rootfs::spec::{Bind, FileKind, HostFile};
use crate::state::{Recorder, StateError, Step, check_identifier};

/// Why the share, or a container's part of it, cannot be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    /// The container's ID, or the journal.
    #[error(transparent)]
    State(#[from] StateError),
    /// A folder or file of the share.
    #[error("create {}", path.display())]
    Create {
        /// The folder or file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A mount.
    #[error("mount {what} on {}{}", target.display(), hint(source))]
    Mount {
        /// The field that requires the mount, and its source.
        what: String,
        /// The mount point.
        target: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// One of containerd's mounts that husk does not support.
    #[error("rootfs[{index}].{field} {value:?}: {why}")]
    Unsupported {
        /// The mount's index.
        index: usize,
        /// The mount's field.
        field: &'static str,
        /// The field's value.
        value: String,
        /// The reason.
        why: &'static str,
    },
}

fn hint(error: &io::Error) -> &'static str {
    if error.raw_os_error() == Some(libc::ENOSYS) { " (husk requires Linux 5.12 or newer)" } else { "" }
}

/// Looks up a path on the host and resolves symbolic links, for [`crate::rootfs::spec::Context`].
///
/// # Errors
/// When the path does not exist or is not accessible.
pub(crate) fn inspect(path: &Path) -> io::Result<HostFile> {
    let path = fs::canonicalize(path)?;
    let metadata = fs::symlink_metadata(&path)?;
    let file_type = metadata.file_type();
    let kind = if file_type.is_dir() {
        FileKind::Dir
    } else if file_type.is_socket() {
        FileKind::Socket
    } else if file_type.is_fifo() {
        FileKind::Fifo
    } else if file_type.is_block_device() {
        FileKind::BlockDevice
    } else if file_type.is_char_device() {
        let number = metadata.rdev();
        FileKind::CharDevice { major: libc::major(number).into(), minor: libc::minor(number).into() }
    } else {
        FileKind::File
    };
    Ok(HostFile { path, kind })
}

/// The share of one sandbox.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    skeleton: PathBuf,
    dir: PathBuf,
}

impl Share {
    /// Creates the empty share of a sandbox. A second call for the same folder fails.
    ///
    /// # Errors
    /// When a step fails. The caller undoes the recorded steps.
    pub(crate) fn create(state_dir: &Path, record: Recorder<'_>) -> Result<Self, ShareError> {
        let share = Self { skeleton: state_dir.join("skeleton"), dir: state_dir.join("share") };
        record(vec![
            Step::Dir { path: share.skeleton.clone() },
            Step::Dir { path: share.dir.clone() },
            Step::Mount { path: share.dir.clone() },
        ])?;
        make_dir(&share.skeleton)?;
        make_dir(&share.dir)?;
        let mount = || {
            let tree = DetachedTree::clone_of(&share.skeleton, false)?;
            tree.restrict(libc::MOUNT_ATTR_RDONLY, Propagation::Private)?;
            // A peer group of its own, separate from that of the cloned mount.
            tree.restrict(libc::MOUNT_ATTR_RDONLY, Propagation::Shared)?;
            tree.attach(&share.dir)
        };
        mount().map_err(mount_error("the share".into(), &share.dir))?;
        Ok(share)
    }

    /// The folder that virtiofsd serves.
    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// Adds a container to the share: its root, which consists of containerd's mounts stacked on each other, or of
    /// `rootfs` if there are none, and the spec's bind mounts. Blocks until everything is mounted. To remove the
    /// container, undo its steps.
    ///
    /// # Errors
    /// When a step fails. The caller undoes the recorded steps.
    pub(crate) fn add_container(
        &self,
        record: Recorder<'_>,
        id: &str,
        mounts: &[Mount],
        rootfs: &Path,
        binds: &[Bind],
    ) -> Result<(), ShareError> {
        check_identifier("container id", id)?;
        let skeleton = self.skeleton.join(id);
        let dir = self.dir.join(id);
        let (root, bound) = (dir.join("rootfs"), dir.join("mounts"));

        let mut steps: Vec<Step> =
            [skeleton.clone(), skeleton.join("rootfs"), skeleton.join("mounts")].map(|path| Step::Dir { path }).into();
        steps.extend(binds.iter().map(|bind| {
            let path = skeleton.join("mounts").join(bind.index.to_string());
            if bind.is_dir { Step::Dir { path } } else { Step::File { path } }
        }));
        steps.extend((0..mounts.len().max(1)).map(|_| Step::Mount { path: root.clone() }));
        steps.extend(binds.iter().map(|bind| Step::Mount { path: bound.join(bind.index.to_string()) }));
        for step in &steps {
            if let Step::Dir { path } | Step::File { path } = step {
                reject_existing(path)?;
            }
        }
        record(steps.clone())?;
        for step in &steps {
            match step {
                Step::Dir { path } => make_dir(path)?,
                Step::File { path } => make_file(path)?,
                _ => {}
            }
        }
        if mounts.is_empty() {
            let what = format!("root.path {:?}", rootfs.display());
            let rootfs = inspect(rootfs).map_err(mount_error(what.clone(), &root))?.path;
            bind(&rootfs, true, 0, Propagation::Private, &root).map_err(mount_error(what, &root))?;
        }
        for (index, mount) in mounts.iter().enumerate() {
            mount_root(index, mount, &root)?;
        }
        for entry in binds {
            let target = bound.join(entry.index.to_string());
            let read_only = if entry.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
            let propagation = if entry.follows_host { Propagation::Slave } else { Propagation::Private };
            bind(&entry.source, entry.recursive, read_only, propagation, &target).map_err(mount_error(
                format!("mounts[{}].source {:?}", entry.index, entry.source.display()),
                &target,
            ))?;
        }
        Ok(())
    }
}

/// Fails if the path exists: undoing the steps would remove it.
fn reject_existing(path: &Path) -> Result<(), ShareError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(ShareError::Create { path: path.into(), source: io::ErrorKind::AlreadyExists.into() }),
        Err(_) => Ok(()),
    }
}

// Mode 0755, because every user in the guest must pass through these folders. On the host, the sandbox's folder
// protects them.
fn make_dir(path: &Path) -> Result<(), ShareError> {
    DirBuilder::new().mode(0o755).create(path).map_err(|source| ShareError::Create { path: path.into(), source })
}

fn make_file(path: &Path) -> Result<(), ShareError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.map(drop).map_err(|source| ShareError::Create { path: path.into(), source })
}

fn mount_error(what: String, target: &Path) -> impl FnOnce(io::Error) -> ShareError {
    let target = target.to_path_buf();
    move |source| ShareError::Mount { what, target, source }
}

fn bind(source: &Path, recursive: bool, flags: u64, propagation: Propagation, target: &Path) -> io::Result<()> {
    let tree = DetachedTree::clone_of(source, recursive)?;
    tree.restrict(flags, propagation)?;
    tree.attach(target)
}

fn mount_root(index: usize, mount: &Mount, target: &Path) -> Result<(), ShareError> {
    let unsupported = |field, value: &str, why| ShareError::Unsupported { index, field, value: value.into(), why };
    if !mount.target.is_empty() {
        return Err(unsupported("target", &mount.target, "mounts below the root are not supported"));
    }
    if mount.type_.starts_with("fuse") {
        return Err(unsupported("type", &mount.type_, "filesystems that need a mount helper are not supported"));
    }
    let options = parse_options(&mount.options)
        .map_err(|option| unsupported("options", option, "is not supported for a container's root"))?;
    let what = || format!("rootfs[{index}] ({} {:?})", mount.type_, mount.source);
    if mount.type_ == "bind" || options.bind.is_some() {
        // containerd's bind mounts follow symbolic links, as mount(2) does.
        let source = inspect(Path::new(&mount.source)).map_err(mount_error(what(), target))?.path;
        let recursive = options.bind.unwrap_or(false);
        return bind(&source, recursive, options.attributes, Propagation::Private, target)
            .map_err(mount_error(what(), target));
    }
    let (folder, data) = mount_data(&mount.type_, &options.data).map_err(|length| {
        let source = io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the options have {length} bytes, more than {MAX_OPTIONS}"),
        );
        mount_error(what(), target)(source)
    })?;
    mount_filesystem(&mount.type_, &mount.source, target, options.flags, &data, folder.as_deref())
        .map_err(mount_error(what(), target))
}

#[cfg(test)]
mod tests;
