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
//! Filesystems, such as the overlay of an image, are mounted in the shim's mount namespace. The share's own mount has
//! shared propagation, so they appear in virtiofsd's mount namespace, which is a slave of the shim's. Folders and files
//! of the host are mounted in virtiofsd's namespace only, as soon as virtiofsd has made the share its root. A copy in
//! the host's namespace would also copy what is mounted below, and nobody could remove a folder on which something is
//! mounted there: rmdir(2) and unlink(2) fail with EBUSY for a mount point of the caller's own namespace. In another
//! one, they unmount what is mounted on it. That is also how a source leaves the share: its mount point is removed.
//!
//! The skeleton is a filesystem of its own. Otherwise the share would be a second mount of the filesystem of `/run`, and
//! programs of the host that look for a folder's filesystem by its device number, such as cAdvisor in the kubelet, would
//! take the share for that of any folder in `/run`, until the sandbox ends.
//!
//! The guest can do to the share whatever virtiofsd can. The share's own mount is therefore read-only: the guest can
//! neither place a symbolic link where the host is about to mount something, nor move a folder with a mount.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use containerd_shim_protos::types::mount::Mount;
use husk_protos::chain::Chain;
use husk_protos::changes::SHARE_SOURCE;
use husk_protos::lock::lock;
use husk_protos::{ROOTS_PATH, SHARE_PATH};
use nix::mount::MsFlags;

use self::entries::{Entries, Unused};
pub(crate) use self::error::ShareError;
use self::error::mount_error;
pub(crate) use self::inspect::inspect;
use self::root::Root;
use self::source::Source;
use self::waiting::{ROOTFS, Waiting};
use crate::rootfs::mount::{DetachedTree, Propagation, in_namespace, mount_filesystem, set_read_only};
use crate::rootfs::spec::{Bind, Places};
use crate::state::{Owner, Recorder, StateError, Step, check_identifier};

mod entries;
mod error;
mod inspect;
mod root;
mod source;
mod waiting;

/// Most mounts below sources that the guest mounts before a container that needs them exists. Each takes a call to
/// virtiofsd and some memory.
const MAX_BELOW: usize = 256;

/// How long the guest may take to close the files that it has created in a root that becomes read-only: its kernel closes
/// them in the background.
const WRITERS_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two attempts: nothing reports the last close.
const WRITERS_PAUSE: Duration = Duration::from_millis(2);

/// Options of the skeleton's tmpfs. It has folders and empty files only.
const SKELETON: &str = "mode=0755,size=64k";

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
#[derive(Debug)]
pub(crate) struct Watchable {
    /// The entry's number.
    pub(crate) entry: u64,
    /// The source in the share, opened with `O_PATH`. A path of the host may lead to something else by now.
    pub(crate) file: File,
    /// Its path on the host, for messages.
    pub(crate) source: PathBuf,
}

/// Where a container's root is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ShareRoot<'a> {
    /// In the share: mounts stacked on each other, or the folder `rootfs` if there are none.
    Stacked {
        /// containerd's mounts.
        mounts: &'a [Mount],
        /// The spec's folder.
        rootfs: &'a Path,
    },
    /// On disks. The guest mounts it.
    OnDisks,
}

/// virtiofsd's mount namespace, and where the share is in it.
pub(crate) struct Server<'a, Open> {
    /// Opens the namespace.
    pub(crate) open: Open,
    /// The share's path there.
    pub(crate) root: &'a Path,
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
            Step::Mount { path: share.skeleton.clone() },
            Step::Dir { path: share.dir.clone() },
            Step::Mount { path: share.dir.clone() },
        ])?;
        make_dir(&share.skeleton)?;
        mount_filesystem("tmpfs", "husk", &share.skeleton, MsFlags::MS_NOEXEC, SKELETON, None)
            .map_err(mount_error("the share's filesystem".into(), &share.skeleton))?;
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

    /// Adds a container to the share: its root, unless that is elsewhere, and the spec's bind mounts. Blocks until filesystems are mounted; folders and files
    /// of the host wait for [`attach`](Self::attach). To remove the container, [`release`](Self::release) it and undo
    /// its steps.
    ///
    /// # Errors
    /// When a step fails. The caller removes the container.
    pub(crate) fn add_container(
        &self,
        record: OwnedRecorder<'_>,
        id: &str,
        root: ShareRoot<'_>,
        binds: &[Bind],
    ) -> Result<Places, ShareError> {
        check_identifier("container id", id)?;
        let root = match root {
            ShareRoot::Stacked { mounts, rootfs } => self.add_root(record, id, mounts, rootfs)?,
            ShareRoot::OnDisks => Path::new(ROOTS_PATH).join(id),
        };
        let mut places = Places { root, binds: Vec::new(), below: Vec::new() };
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

    /// Adds a container's root. Returns where the guest finds it.
    fn add_root(
        &self,
        record: OwnedRecorder<'_>,
        id: &str,
        mounts: &[Mount],
        rootfs: &Path,
    ) -> Result<PathBuf, ShareError> {
        let parsed = Root::parse(mounts)?;
        let number = lock(&self.entries).add_root(id, parsed.filesystems.len());
        let root = self.dir.join(number.to_string()).join(ROOTFS);
        let steps = self.steps(&number.to_string(), ROOTFS, true, parsed.filesystems.len());
        make(steps, |steps| record(&Owner::Container(id.to_owned()), steps))?;
        for filesystem in &parsed.filesystems {
            filesystem.mount(&root).map_err(mount_error(filesystem.what(), &root))?;
        }
        if let Some(top) = parsed.top(rootfs) {
            let waiting = top.open().map_err(mount_error(top.what(), &root))?;
            lock(&self.entries).root_waits(id, waiting);
        }
        Ok(in_guest(number, ROOTFS))
    }

    /// Adds the source of a bind mount, unless it is there already. Returns its number, and what is mounted below it if
    /// the mount's options do not apply there.
    fn add_bind(&self, record: OwnedRecorder<'_>, id: &str, entry: &Bind) -> Result<(u64, Vec<PathBuf>), ShareError> {
        let what = format!("mounts[{}].source {:?}", entry.index, entry.source.display());
        let (file, source) = Source::open(entry).map_err(mount_error(what.clone(), &self.dir))?;
        let below = source.paths_below().filter(|_| entry.own_options).collect();
        let mut entries = lock(&self.entries);
        if let Some(number) = entries.reuse(&source, id, !entry.read_only) {
            return Ok((number, below));
        }
        let number = entries.add_volume(source, entry.is_dir, id, !entry.read_only);
        make(self.steps(&number.to_string(), SHARE_SOURCE, entry.is_dir, 0), |steps| {
            record(&Owner::Volume(number), steps)
        })?;
        entries.volume_waits(number, Waiting::for_bind(what, file, entry));
        Ok((number, below))
    }

    /// Mounts the folders and files of the host that wait for virtiofsd and that a container needs.
    ///
    /// # Errors
    /// When virtiofsd has exited, or a mount fails.
    pub(crate) fn attach(
        &self,
        server: Server<'_, impl FnOnce() -> io::Result<File>>,
        id: &str,
    ) -> Result<(), ShareError> {
        let mut entries = lock(&self.entries);
        let mut ready = Vec::new();
        for (entry, waiting, read_only) in entries.waiting(id) {
            let target = server.root.join(entry.to_string()).join(waiting.name);
            let tree = waiting.clone_tree(read_only).map_err(mount_error(waiting.what.clone(), &target))?;
            ready.push((entry, tree, target, waiting.what.clone()));
        }
        if ready.is_empty() {
            return Ok(());
        }
        let namespace = (server.open)().map_err(ShareError::Server)?;
        let entries = &mut *entries;
        let attached = in_namespace(&namespace, || {
            let attach = |(entry, tree, target, what): (u64, DetachedTree, PathBuf, String)| {
                tree.attach(&target).map_err(mount_error(what, &target))?;
                entries.attached(entry);
                Ok(())
            };
            Ok(ready.into_iter().try_for_each(attach))
        });
        attached.map_err(ShareError::Server)?
    }

    /// The sources that a container uses and whose changes by the host its programs notice.
    ///
    /// # Errors
    /// When virtiofsd has exited, or a source cannot be opened.
    pub(crate) fn watched(
        &self,
        server: Server<'_, impl FnOnce() -> io::Result<File>>,
        id: &str,
    ) -> Result<Vec<Watchable>, ShareError> {
        let watched = lock(&self.entries).watched(id);
        if watched.is_empty() {
            return Ok(Vec::new());
        }
        let open = |(entry, source): (u64, PathBuf)| {
            let path = server.root.join(entry.to_string()).join(SHARE_SOURCE);
            let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
            Ok(Watchable { entry, file, source })
        };
        let namespace = (server.open)().map_err(ShareError::Server)?;
        let opened = in_namespace(&namespace, || watched.into_iter().map(open).collect());
        opened.map_err(ShareError::Server)
    }

    /// Lets the guest write to the sources that a container may write to, and to no others.
    ///
    /// # Errors
    /// When a source cannot become writable. One that cannot become read-only, because the guest has a file in it open
    /// for writing, stays writable until the next call.
    pub(crate) fn settle(&self, server: Server<'_, impl FnOnce() -> io::Result<File>>) -> Result<(), ShareError> {
        let mut entries = lock(&self.entries);
        let mut unsettled = entries.unsettled().peekable();
        if unsettled.peek().is_none() {
            return Ok(());
        }
        let namespace = (server.open)().map_err(ShareError::Server)?;
        for volume in unsettled {
            let path = server.root.join(volume.number.to_string()).join(SHARE_SOURCE);
            match set_read_only(&namespace, &path, !volume.read_only) {
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

    /// Makes a container's root read-only for virtiofsd, and so for the guest, whatever privileges a program has there.
    ///
    /// # Errors
    /// When the mount cannot become read-only, for example because the guest keeps a file in it open for writing.
    pub(crate) fn protect_root(
        &self,
        server: Server<'_, impl FnOnce() -> io::Result<File>>,
        id: &str,
    ) -> Result<(), ShareError> {
        let Some(number) = lock(&self.entries).root(id) else { return Ok(()) };
        let path = server.root.join(number.to_string()).join(ROOTFS);
        let namespace = (server.open)().map_err(ShareError::Server)?;
        let deadline = Instant::now() + WRITERS_TIMEOUT;
        loop {
            match set_read_only(&namespace, &path, true) {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {}
                Err(source) => return Err(ShareError::ReadOnly { path, source }),
            }
            std::thread::sleep(WRITERS_PAUSE);
        }
    }

    /// Ends a container's use of the share, and renames the entries that nobody uses any more, so that the guest does
    /// not find them again. The caller makes the guest forget them, and then undoes their steps.
    pub(crate) fn release(&self, record: OwnedRecorder<'_>, id: &str) -> Released {
        let Unused { root, volumes } = lock(&self.entries).release(id);
        let root = root.map(|root| (Owner::Container(id.to_owned()), root.number, ROOTFS, true, root.filesystems));
        let volume = |(number, is_dir)| (Owner::Volume(number), number, SHARE_SOURCE, is_dir, 0);
        let mut released = Released::default();
        for (owner, number, child, is_dir, filesystems) in root.into_iter().chain(volumes.into_iter().map(volume)) {
            let name = number.to_string();
            let gone = format!("{name}.gone");
            let renamed = record(&owner, self.steps(&gone, child, is_dir, filesystems))
                .map_err(ShareError::from)
                .and_then(|()| {
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

    /// The steps that create an entry and mount filesystems in it.
    fn steps(&self, name: &str, child: &str, is_dir: bool, filesystems: usize) -> Vec<Step> {
        let folder = self.skeleton.join(name);
        let path = folder.join(child);
        let child_step = if is_dir { Step::Dir { path } } else { Step::File { path } };
        let mount = Step::Mount { path: self.dir.join(name).join(child) };
        [Step::Dir { path: folder }, child_step].into_iter().chain(std::iter::repeat_n(mount, filesystems)).collect()
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

#[cfg(test)]
mod tests;
