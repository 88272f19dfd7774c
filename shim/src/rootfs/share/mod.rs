//! The folder that virtiofsd serves to the guest: for each container its root, and beside it what the spec binds from
//! the host.
//!
//! ```text
//! <state>/skeleton/<id>/rootfs      where folders are made: the guest never sees this path
//! <state>/share/<id>/rootfs         the same folder through a read-only mount, and on it the container's root
//! <state>/share/<id>/mounts/<n>     on it the source of the spec's mount number n
//! ```
//!
//! The share's own mount is read-only, so the guest, which may do to the share whatever virtiofsd can, cannot put a link
//! where the host is going to mount something, nor move a folder away from under a mount. It is shared (propagation), so
//! that what is mounted on it later also appears in virtiofsd's mount namespace, a slave of ours.
//!
//! `containerd_shim::mount` is not used: without the crate's `async` feature it forks a multi-threaded process and needs
//! the crate's own reaper, with it it changes the working folder of the calling thread for good, and it makes bind mounts
//! read-only only after they were mounted (see [`mount`](crate::rootfs::mount) for why that is too late).

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;

use crate::rootfs::mount::{Detached, Propagation, mount_data, mount_filesystem, parse_options};
use crate::rootfs::spec::{Bind, Kind, Source};
use crate::state::{Recorder, StateError, Step, check_identifier};

/// Why the share, or a container's part of it, could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The container's id.
    #[error(transparent)]
    State(#[from] StateError),
    /// A folder or file of the share could not be made.
    #[error("create {}: {source}", path.display())]
    Create {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A mount failed.
    #[error("mount {what} on {}: {source}{}", target.display(), hint(source))]
    Mount {
        /// The field that asks for it, and what is mounted.
        what: String,
        /// Where.
        target: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A mount of containerd's that husk cannot make.
    #[error("rootfs[{index}].{field} {value:?}: {why}")]
    Unsupported {
        /// Which of containerd's mounts.
        index: usize,
        /// Its field.
        field: &'static str,
        /// The value.
        value: String,
        /// Why not.
        why: &'static str,
    },
}

fn hint(e: &io::Error) -> &'static str {
    if e.raw_os_error() == Some(libc::ENOSYS) { "; husk needs Linux 5.12 or newer" } else { "" }
}

/// Looks a path up on the host, following links: for [`crate::rootfs::spec::Context`].
///
/// # Errors
/// When it is not there, or cannot be looked at.
pub fn inspect(path: &Path) -> io::Result<Source> {
    let path = fs::canonicalize(path)?;
    let metadata = fs::symlink_metadata(&path)?;
    let file_type = metadata.file_type();
    let kind = if file_type.is_dir() {
        Kind::Dir
    } else if file_type.is_socket() {
        Kind::Socket
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else if file_type.is_block_device() {
        Kind::BlockDevice
    } else if file_type.is_char_device() {
        let number = metadata.rdev();
        Kind::CharDevice { major: libc::major(number).into(), minor: libc::minor(number).into() }
    } else {
        Kind::File
    };
    Ok(Source { path, kind })
}

/// The share of one sandbox.
#[derive(Clone, Debug)]
pub struct Share {
    skeleton: PathBuf,
    dir: PathBuf,
}

impl Share {
    /// Makes the share of a sandbox, empty. Once: a second call for the same folder is an error.
    ///
    /// # Errors
    /// When a step fails; what was recorded is for the caller to undo.
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
            let tree = Detached::clone_of(&share.skeleton, false)?;
            tree.restrict(libc::MOUNT_ATTR_RDONLY, Propagation::Private)?;
            // A group of its own, not that of the mount it was cloned from.
            tree.restrict(libc::MOUNT_ATTR_RDONLY, Propagation::Shared)?;
            tree.attach(&share.dir)
        };
        mount().map_err(mount_error("the share".into(), &share.dir))?;
        Ok(share)
    }

    /// What virtiofsd is to serve.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Puts a container into the share: containerd's mounts as its root, one on top of the other, or `rootfs` if there are
    /// none, and the binds of its spec. Blocks for as long as the mounts take. To take it out, undo the container's steps.
    ///
    /// # Errors
    /// When a step fails; what was recorded is for the caller to undo.
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
                refuse_existing(path)?;
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
        for wanted in binds {
            let target = bound.join(wanted.index.to_string());
            let read_only = if wanted.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
            let propagation = if wanted.follows_host { Propagation::Slave } else { Propagation::Private };
            bind(&wanted.source, wanted.recursive, read_only, propagation, &target).map_err(mount_error(
                format!("mounts[{}].source {:?}", wanted.index, wanted.source.display()),
                &target,
            ))?;
        }
        Ok(())
    }
}

/// Otherwise undoing the steps would remove what somebody else made.
fn refuse_existing(path: &Path) -> Result<(), ShareError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(ShareError::Create { path: path.into(), source: io::ErrorKind::AlreadyExists.into() }),
        Err(_) => Ok(()),
    }
}

// Everybody in the guest passes through these folders, so they are open; on the host, the sandbox's folder around them is not.
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
    let tree = Detached::clone_of(source, recursive)?;
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
        // containerd's own binds follow links, as mount(2) does.
        let source = inspect(Path::new(&mount.source)).map_err(mount_error(what(), target))?.path;
        let recursive = options.bind.unwrap_or(false);
        return bind(&source, recursive, options.attributes, Propagation::Private, target)
            .map_err(mount_error(what(), target));
    }
    let (folder, data) = mount_data(&mount.type_, &options.data).map_err(|length| {
        let source = io::Error::new(io::ErrorKind::InvalidInput, format!("its {length} bytes of options are too many"));
        mount_error(what(), target)(source)
    })?;
    mount_filesystem(&mount.type_, &mount.source, target, options.flags, &data, folder.as_deref())
        .map_err(mount_error(what(), target))
}

#[cfg(test)]
mod tests;
