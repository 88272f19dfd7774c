//! Root filesystems that consist of folders of disks: one folder, or an overlay of several.
//!
//! A stranger may have written the disk's filesystem. Its symbolic links are not followed: they could lead to the guest's
//! own files, which belong to all containers.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_protos::ROOTS_PATH;
use husk_protos::bundle::{DiskFolder, DiskRoot};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount as mount_at, umount2};
use nix::sys::stat::{Mode, fchmod, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, fchown};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, move_mount,
};

use crate::attributes::{Entry, copy_xattrs, is_overlays};

/// Longest message of the kernel about a filesystem, bytes.
const MESSAGE_MAX: usize = 1024;

/// Why a root cannot be mounted.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(crate) struct RootError {
    what: String,
    source: io::Error,
}

fn failed(what: String) -> impl FnOnce(io::Error) -> RootError {
    move |source| RootError { what, source }
}

/// Where a container's root is mounted.
fn path_of(container: &str) -> PathBuf {
    Path::new(ROOTS_PATH).join(container)
}

/// Whether a container's root is mounted here, or has been.
pub(crate) fn is_mounted(container: &str) -> bool {
    path_of(container).exists()
}

/// Mounts a container's root. If it fails, nothing remains.
///
/// # Errors
/// When a folder does not exist on its disk, or the kernel rejects the mount.
pub(crate) fn mount(container: &str, root: &DiskRoot) -> Result<(), RootError> {
    let target = path_of(container);
    fs::create_dir_all(ROOTS_PATH).map_err(failed(format!("create {ROOTS_PATH}")))?;
    fs::create_dir(&target).map_err(failed(format!("create {}", target.display())))?;
    mount_on(&target, root).inspect_err(|_| {
        if let Err(error) = fs::remove_dir(&target) {
            tracing::error!(container, %error, "failed to remove the mount point of a root");
        }
    })
}

fn mount_on(target: &Path, root: &DiskRoot) -> Result<(), RootError> {
    for folder in &root.folders {
        let place = folder.folder.as_ref().unwrap_or_default();
        create(place, folder.mode, (folder.uid, folder.gid)).map_err(failed(format!("create {}", shown(place))))?;
    }
    let open = |place: &DiskFolder| open(place).map_err(failed(format!("open {}", shown(place))));
    let lower = root.lower.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    // MsFlags keeps unknown bits, which the kernel rejects.
    let flags = MsFlags::from_bits_retain(root.flags);
    if root.overlay {
        let upper = [("upperdir", &root.upper), ("workdir", &root.work)];
        let upper = upper.into_iter().filter_map(|(option, place)| Some((option, place.as_ref()?)));
        let upper = upper.map(|(option, place)| Ok((option, open(place)?))).collect::<Result<Vec<_>, RootError>>()?;
        if let (Some(like), Some((_, folder))) = (root.attributes_of.as_ref(), upper.first()) {
            give_attributes(&open(like)?, folder)
                .map_err(failed(format!("give the upper folder the attributes of {}", shown(like))))?;
        }
        return overlay(target, &lower, &upper, &root.options, flags);
    }
    let [folder] = &lower[..] else {
        let why = io::Error::new(ErrorKind::InvalidInput, format!("{} folders", lower.len()));
        return Err(failed("mount a root".into())(why));
    };
    bind(folder, target, flags).map_err(failed(format!("mount {}", root.lower.first().map(shown).unwrap_or_default())))
}

/// Unmounts a container's root, if it has one here. What is still in use disappears when its last user does.
///
/// # Errors
/// When the root cannot be unmounted.
pub(crate) fn unmount(container: &str) -> io::Result<()> {
    let target = path_of(container);
    match umount2(&target, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => {}
        Err(Errno::ENOENT) => return Ok(()),
        // An earlier call has unmounted it.
        Err(Errno::EINVAL) => {}
        Err(Errno::EBUSY) => {
            tracing::warn!(container, "a program outside of the container uses its root filesystem");
            umount2(&target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)?;
        }
        Err(error) => return Err(error.into()),
    }
    crate::paths::allow_missing(fs::remove_dir(&target))
}

/// Unmounts all roots, before the guest ends. A failure is logged.
pub(crate) fn unmount_all() {
    for root in fs::read_dir(ROOTS_PATH).into_iter().flatten().flatten() {
        let container = root.file_name();
        if let Err(error) = unmount(&container.to_string_lossy()) {
            tracing::warn!(?container, %error, "failed to unmount a root at the guest's end");
        }
    }
}

fn shown(place: &DiskFolder) -> String {
    format!("{:?} on the disk at {}", place.path, place.disk)
}

/// Gives a folder the attributes of another.
fn give_attributes(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let (from, to) = (Entry { folder: from, name: c"." }, Entry { folder: to, name: c"." });
    let stat = fstatat(from.folder, from.name, AtFlags::empty())?;
    to.set_owner_and_mode(&stat)?;
    let rename = |name: &CStr| Some(name.to_owned()).filter(|name| !is_overlays(name));
    copy_xattrs(from, to, rename, |name, error| {
        tracing::warn!(?name, %error, "the root of a container lacks an extended attribute");
    })?;
    to.set_times(&stat)
}

/// Opens a folder of a disk, without following links.
pub(crate) fn open(place: &DiskFolder) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let disk = openat2(AT_FDCWD, place.disk.as_str(), OpenHow::new().flags(flags | OFlag::O_NOFOLLOW))?;
    if place.path.is_empty() {
        return Ok(disk);
    }
    let stay = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    Ok(openat2(disk, place.path.as_str(), OpenHow::new().flags(flags).resolve(stay))?)
}

/// Creates a folder on a disk, unless it exists.
fn create(place: &DiskFolder, mode: u32, (uid, gid): (u32, u32)) -> io::Result<()> {
    let (parent, name) = place.path.rsplit_once('/').unwrap_or(("", &place.path));
    let parent = open(&DiskFolder { path: parent.to_owned(), ..place.clone() })?;
    match mkdirat(&parent, name, Mode::from_bits_truncate(mode)) {
        Ok(()) => {}
        // Something else with this name is an error when the folder is opened.
        Err(Errno::EEXIST) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let how = OpenHow::new().flags(OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC);
    let folder = openat2(&parent, name, how)?;
    fchown(&folder, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    // Regardless of the umask.
    Ok(fchmod(&folder, Mode::from_bits_truncate(mode))?)
}

/// A descriptor as a path: mounts take no descriptors of folders.
fn link(folder: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", folder.as_raw_fd())
}

fn bind(folder: &OwnedFd, target: &Path, flags: MsFlags) -> io::Result<()> {
    mount_at(Some(link(folder).as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    if flags.is_empty() {
        return Ok(());
    }
    let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
    let restricted = mount_at(None::<&str>, target, None::<&str>, flags, None::<&str>);
    restricted.inspect_err(|_| {
        if let Err(error) = umount2(target, MntFlags::MNT_DETACH) {
            tracing::error!(%error, "failed to unmount an incomplete root");
        }
    })?;
    Ok(())
}

/// Mounts an overlay. Not with mount(2), whose options are limited to a page: an image may have a hundred layers.
fn overlay(
    target: &Path,
    lower: &[OwnedFd],
    upper: &[(&str, OwnedFd)],
    options: &[String],
    flags: MsFlags,
) -> Result<(), RootError> {
    let context =
        fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| failed("open overlayfs".into())(e.into()))?;
    let configure = || {
        fsconfig_set_string(&context, "source", "overlay")?;
        for layer in lower {
            fsconfig_set_string(&context, "lowerdir+", link(layer))?;
        }
        for (option, folder) in upper {
            fsconfig_set_string(&context, *option, link(folder))?;
        }
        for option in options {
            match option.split_once('=') {
                Some((name, value)) => fsconfig_set_string(&context, name, value)?,
                None => fsconfig_set_flag(&context, option.as_str())?,
            }
        }
        if flags.contains(MsFlags::MS_RDONLY) {
            fsconfig_set_flag(&context, "ro")?;
        }
        fsconfig_create(&context)?;
        let mounted = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(flags))?;
        move_mount(&mounted, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    configure().map_err(|error| {
        let why = messages(context.as_fd());
        failed(format!("mount the overlay{}{why}", if why.is_empty() { "" } else { ": " }))(error.into())
    })
}

/// The attributes of a mount that correspond to flags of mount(2).
fn attributes(flags: MsFlags) -> MountAttrFlags {
    let table = [
        (MsFlags::MS_RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (MsFlags::MS_NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        (MsFlags::MS_STRICTATIME, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
    ];
    table.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, attribute)| *attribute).collect()
}

/// What the kernel says about a failed mount.
fn messages(context: std::os::fd::BorrowedFd<'_>) -> String {
    let Ok(context) = context.try_clone_to_owned() else { return String::new() };
    let mut log = File::from(context);
    let mut text = String::new();
    let mut message = [0; MESSAGE_MAX];
    // One message per read, and ENODATA after the last.
    while text.len() < MESSAGE_MAX
        && let Ok(length @ 1..) = log.read(&mut message)
    {
        text.push_str(if text.is_empty() { "" } else { "; " });
        text.push_str(String::from_utf8_lossy(&message[..length]).trim());
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use husk_protos::bundle::NewFolder;
    use husk_protos::chain::Chain;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// A filesystem that stands for a disk, in a mount namespace that ends with the test.
    fn disk() -> tempfile::TempDir {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace, which needs root");
        mount_at(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
        let disk = tempfile::tempdir().unwrap();
        mount_at(Some("disk"), disk.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        disk
    }

    fn at(disk: &tempfile::TempDir, path: &str) -> DiskFolder {
        DiskFolder { disk: disk.path().to_str().unwrap().into(), path: path.into(), ..Default::default() }
    }

    fn new(folder: DiskFolder) -> NewFolder {
        NewFolder { folder: Some(folder).into(), mode: 0o751, uid: 7, gid: 8, ..Default::default() }
    }

    #[test]
    fn an_overlay_of_a_hundred_layers_is_a_root() {
        let disk = disk();
        let target = tempfile::tempdir().unwrap();
        for layer in 0..100 {
            let folder = disk.path().join(format!("layers/{layer}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(layer.to_string()), "").unwrap();
            fs::write(folder.join("top"), layer.to_string()).unwrap();
        }
        let root = DiskRoot {
            folders: vec![new(at(&disk, "upper")), new(at(&disk, "work")), new(at(&disk, "upper"))],
            lower: (0..100).map(|layer| at(&disk, &format!("layers/{layer}"))).collect(),
            overlay: true,
            upper: Some(at(&disk, "upper")).into(),
            work: Some(at(&disk, "work")).into(),
            options: vec!["index=off".into()],
            ..Default::default()
        };
        mount_on(target.path(), &root).unwrap();
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 101);
        assert_eq!(fs::read(target.path().join("top")).unwrap(), b"0");
        fs::write(target.path().join("new"), "").unwrap();
        let upper = disk.path().join("upper");
        assert!(upper.join("new").exists());
        let upper = upper.metadata().unwrap();
        assert_eq!((upper.mode() & 0o7777, upper.uid(), upper.gid()), (0o751, 7, 8));
        umount2(target.path(), MntFlags::empty()).unwrap();

        let wrong = DiskRoot { options: vec!["index=maybe".into()], ..root };
        let error = Chain(&mount_on(target.path(), &wrong).unwrap_err()).to_string();
        assert!(error.starts_with("mount the overlay: ") && error.contains("index"), "{error}");
    }

    #[test]
    fn a_folder_of_a_disk_is_a_root_and_links_on_the_disk_lead_nowhere() {
        let disk = disk();
        let target = tempfile::tempdir().unwrap();
        fs::create_dir_all(disk.path().join("a/b")).unwrap();
        symlink("/etc", disk.path().join("out")).unwrap();
        symlink("a", disk.path().join("in")).unwrap();
        let root = |place| DiskRoot { lower: vec![place], ..Default::default() };
        let read_only = DiskRoot { flags: MsFlags::MS_RDONLY.bits(), ..root(at(&disk, "a/b")) };
        mount_on(target.path(), &read_only).unwrap();
        assert_eq!(fs::write(target.path().join("x"), "").unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
        umount2(target.path(), MntFlags::empty()).unwrap();
        for path in ["out", "in", "in/b", "out/ssl", "../x", "missing"] {
            assert!(mount_on(target.path(), &root(at(&disk, path))).is_err(), "{path}");
        }
        for path in ["out/new", "in/new", "../new"] {
            let root = DiskRoot { folders: vec![new(at(&disk, path))], ..root(at(&disk, "a")) };
            assert!(mount_on(target.path(), &root).is_err(), "{path}");
        }
        assert!(!Path::new("/etc/new").exists());
    }
}
