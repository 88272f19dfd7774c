//! The folder that virtiofsd serves to the guest. It has the root of each container, and each source of their bind
//! mounts once, however many mounts show it: see `source.rs`.
//!
//! ```text
//! <state>/skeleton/<n>/rootfs     a folder, created here because the guest does not see the skeleton
//! <state>/share/<n>/rootfs        the same folder through a read-only mount; a container's root is mounted on it
//! <state>/share/<n>/source        mount point for a source
//! <state>/share/<n>.gone/...      an entry that no container uses any more: the guest does not find it again
//! ```
//!
//! A number is never used again. The guest's kernel remembers what it has found under a name. If that name led to
//! something else, the kernel would unmount everything below it, which may be in the middle of a create.
//!
//! The guest can do to the share whatever virtiofsd can. The share's own mount is therefore read-only: the guest can
//! neither place a symbolic link where the host is about to mount something, nor move a folder with a mount. The mount
//! has shared propagation, so that later mounts appear in virtiofsd's mount namespace, which is a slave of the shim's.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use containerd_shim_protos::types::mount::Mount;
use husk_protos::SHARE_PATH;
use husk_protos::chain::Chain;
use husk_protos::changes::SHARE_SOURCE;
use husk_protos::lock::lock;

use self::entries::{Entries, Unused};
use self::source::Source;
use crate::rootfs::mount::{
    DetachedTree, MAX_OPTIONS, Propagation, mount_data, mount_filesystem, parse_options, set_read_only,
};
use crate::rootfs::spec::{Bind, FileKind, HostFile, Places};
use crate::state::{Owner, Recorder, StateError, Step, check_identifier};

mod entries;
mod source;

/// Name of the mount point in an entry for a container's root.
const ROOTFS: &str = "rootfs";

/// Most mounts below sources that the guest mounts before a container that needs them exists. Each takes a call to
/// virtiofsd and some memory.
const MAX_BELOW: usize = 256;

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
    /// An entry that is removed.
    #[error("rename {}", path.display())]
    Rename {
        /// The entry's folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// virtiofsd's mount namespace.
    #[error("open virtiofsd's mount namespace")]
    Server(#[source] io::Error),
    /// A source that becomes writable.
    #[error("make {} writable", path.display())]
    Writable {
        /// The source in the share, as virtiofsd sees it.
        path: PathBuf,
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
    /// Locked while a source is mounted, because another container may wait for the same one.
    entries: Arc<Mutex<Entries>>,
}

/// Records steps in the journal before their effects.
pub(crate) type OwnedRecorder<'a> = &'a mut dyn FnMut(&Owner, Vec<Step>) -> Result<(), StateError>;

/// What no container uses any more, and is about to be undone.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Released {
    /// The entries that the guest may know.
    pub(crate) entries: Vec<u64>,
    /// The owners of the volumes' steps.
    pub(crate) volumes: Vec<Owner>,
}

/// A source whose changes by the host programs in the guest notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Watchable {
    /// The entry's number.
    pub(crate) entry: u64,
    /// The source in the share: a mount, so no path to it changes what it is.
    pub(crate) path: PathBuf,
    /// Its path on the host, for messages.
    pub(crate) source: PathBuf,
}

impl Share {
    /// Creates the empty share of a sandbox. A second call for the same folder fails.
    ///
    /// # Errors
    /// When a step fails. The caller undoes the recorded steps.
    pub(crate) fn create(state_dir: &Path, record: Recorder<'_>) -> Result<Self, ShareError> {
        let (skeleton, dir) = (state_dir.join("skeleton"), state_dir.join("share"));
        let share = Self { skeleton, dir, entries: Arc::default() };
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
    /// container, [`release`](Self::release) it and undo its steps.
    ///
    /// # Errors
    /// When a step fails. The caller removes the container.
    pub(crate) fn add_container(
        &self,
        record: OwnedRecorder<'_>,
        id: &str,
        mounts: &[Mount],
        rootfs: &Path,
        binds: &[Bind],
    ) -> Result<Places, ShareError> {
        check_identifier("container id", id)?;
        let number = lock(&self.entries).add_root(id, mounts.len().max(1));
        let root = self.dir.join(number.to_string()).join(ROOTFS);
        let steps = self.steps(&number.to_string(), ROOTFS, true, mounts.len().max(1));
        make(steps, |steps| record(&Owner::Container(id.to_owned()), steps))?;
        if mounts.is_empty() {
            let what = format!("root.path {:?}", rootfs.display());
            let rootfs = inspect(rootfs).map_err(mount_error(what.clone(), &root))?.path;
            bind(&rootfs, true, 0, Propagation::Private, &root).map_err(mount_error(what, &root))?;
        }
        for (index, mount) in mounts.iter().enumerate() {
            mount_root(index, mount, &root)?;
        }
        let mut places = Places { root: in_guest(number, ROOTFS), binds: Vec::new(), below: Vec::new() };
        for entry in binds {
            let (number, below) = self.add_bind(record, id, entry)?;
            if entry.watched {
                lock(&self.entries).watch(number, &entry.source);
            }
            let source = in_guest(number, SHARE_SOURCE);
            places.below.extend(below.into_iter().map(|path| source.join(path)));
            places.binds.push((entry.index, source));
        }
        let mut known = HashSet::new();
        places.below.retain(|path| known.insert(path.clone()));
        if places.below.len() > MAX_BELOW {
            let more = places.below.len() - MAX_BELOW;
            tracing::warn!(
                container = id,
                more,
                "too many mounts below sources: some have the options of the mounts above"
            );
            places.below.truncate(MAX_BELOW);
        }
        Ok(places)
    }

    /// Adds the source of a bind mount, unless it is there already. Returns its number, and what is mounted below it if
    /// the mount's options do not apply there.
    fn add_bind(&self, record: OwnedRecorder<'_>, id: &str, entry: &Bind) -> Result<(u64, Vec<PathBuf>), ShareError> {
        let what = || format!("mounts[{}].source {:?}", entry.index, entry.source.display());
        let (file, source) = Source::open(entry).map_err(mount_error(what(), &self.dir))?;
        let below = source.paths_below().filter(|_| entry.own_options).collect();
        let mut entries = lock(&self.entries);
        if let Some(number) = entries.reuse(&source, id, !entry.read_only) {
            return Ok((number, below));
        }
        let number = entries.add_volume(source, entry.is_dir, id, !entry.read_only);
        make(self.steps(&number.to_string(), SHARE_SOURCE, entry.is_dir, 1), |steps| {
            record(&Owner::Volume(number), steps)
        })?;
        let target = self.dir.join(number.to_string()).join(SHARE_SOURCE);
        let read_only = |restricted| if restricted { libc::MOUNT_ATTR_RDONLY } else { 0 };
        let propagation = if entry.follows_host { Propagation::Slave } else { Propagation::Private };
        let mount = || {
            let tree = DetachedTree::clone_of_file(&file, entry.recursive)?;
            tree.restrict(read_only(entry.read_only_below), propagation)?;
            tree.restrict_top(read_only(entry.read_only), propagation)?;
            tree.attach(&target)
        };
        mount().map_err(mount_error(what(), &target))?;
        entries.mounted(number);
        Ok((number, below))
    }

    /// The sources that a container uses and whose changes by the host its programs notice.
    pub(crate) fn watched(&self, id: &str) -> Vec<Watchable> {
        let watched = lock(&self.entries).watched(id).into_iter();
        let watchable = |(entry, source): (u64, PathBuf)| {
            let path = self.dir.join(entry.to_string()).join(SHARE_SOURCE);
            Watchable { entry, path, source }
        };
        watched.map(watchable).collect()
    }

    /// Lets the guest write to the sources that a container may write to, and to no others. `server` opens virtiofsd's
    /// mount namespace, whose root is the share at the path `root`.
    ///
    /// # Errors
    /// When a source cannot become writable. One that cannot become read-only, because the guest has a file in it open
    /// for writing, stays writable until the next call.
    pub(crate) fn settle(&self, server: impl FnOnce() -> io::Result<File>, root: &Path) -> Result<(), ShareError> {
        let mut entries = lock(&self.entries);
        let mut unsettled = entries.unsettled().peekable();
        if unsettled.peek().is_none() {
            return Ok(());
        }
        let server = server().map_err(ShareError::Server)?;
        for volume in unsettled {
            let path = root.join(volume.number.to_string()).join(SHARE_SOURCE);
            match set_read_only(&server, &path, !volume.read_only) {
                Ok(()) => volume.read_only = !volume.read_only,
                Err(source) if volume.read_only => return Err(ShareError::Writable { path, source }),
                Err(error) => tracing::warn!(
                    path = %path.display(),
                    error = %Chain(&error),
                    "the VM can still write to a source that no container may write to any more"
                ),
            }
        }
        Ok(())
    }

    /// Ends a container's use of the share, and renames the entries that nobody uses any more, so that the guest does
    /// not find them again. The caller makes the guest forget them, and then undoes their steps.
    pub(crate) fn release(&self, record: OwnedRecorder<'_>, id: &str) -> Released {
        let Unused { root, volumes } = lock(&self.entries).release(id);
        let root = root.map(|root| (Owner::Container(id.to_owned()), root.number, ROOTFS, true, root.mounts));
        let volume = |(number, is_dir)| (Owner::Volume(number), number, SHARE_SOURCE, is_dir, 1);
        let mut released = Released::default();
        for (owner, number, child, is_dir, mounts) in root.into_iter().chain(volumes.into_iter().map(volume)) {
            let name = number.to_string();
            let gone = format!("{name}.gone");
            let renamed =
                record(&owner, self.steps(&gone, child, is_dir, mounts)).map_err(ShareError::from).and_then(|()| {
                    let path = self.skeleton.join(name);
                    fs::rename(&path, self.skeleton.join(gone)).map_err(|source| ShareError::Rename { path, source })
                });
            match renamed {
                Ok(()) => released.entries.push(number),
                // Its creation failed before.
                Err(ShareError::Rename { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "the guest keeps a part of the share that is being removed");
                }
            }
            if matches!(owner, Owner::Volume(_)) {
                released.volumes.push(owner);
            }
        }
        released
    }

    /// The steps that create an entry and mount something in it.
    fn steps(&self, name: &str, child: &str, is_dir: bool, mounts: usize) -> Vec<Step> {
        let folder = self.skeleton.join(name);
        let path = folder.join(child);
        let child_step = if is_dir { Step::Dir { path } } else { Step::File { path } };
        let mount = Step::Mount { path: self.dir.join(name).join(child) };
        [Step::Dir { path: folder }, child_step].into_iter().chain(std::iter::repeat_n(mount, mounts)).collect()
    }
}

/// Where the guest finds an entry.
fn in_guest(number: u64, child: &str) -> PathBuf {
    [SHARE_PATH, &number.to_string(), child].iter().collect()
}

/// Records steps, and creates their folders and files.
fn make(steps: Vec<Step>, record: impl FnOnce(Vec<Step>) -> Result<(), StateError>) -> Result<(), ShareError> {
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
    Ok(())
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
    if mount.type_.contains('/') {
        let why = "only containerd's mount manager resolves such mounts, from version 2.2";
        return Err(unsupported("type", &mount.type_, why));
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
