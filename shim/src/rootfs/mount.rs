//! Mount trees that are complete before they become visible, and containerd's mounts with their options.
//!
//! If a bind mount were attached first and made read-only afterwards, it would be writable in between. So a tree is
//! cloned, restricted, and attached last. This requires Linux 5.12 (mount_setattr(2)).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};

use crate::host::thread::with_own_root;

/// Size limit of a filesystem's options, bytes: one page, minus the terminating zero.
pub(super) const MAX_OPTIONS: usize = 4095;
const LOWERDIR: &str = "lowerdir=";
/// Set on every mount: the guest can write to these files, so the host must not run setuid programs or open devices
/// there.
const ALWAYS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// A tree of mounts that is not attached yet.
#[derive(Debug)]
pub(crate) struct DetachedTree(OwnedFd);

/// How mount events propagate to and from a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Propagation {
    /// Neither sends nor receives.
    Private,
    /// Receives from the original.
    Slave,
    /// Sends and receives, in a peer group of its own.
    Shared,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(Into::into)
}

impl DetachedTree {
    /// Clones the mount at `source` without following a symbolic link; if `recursive`, with everything mounted below
    /// it.
    ///
    /// # Errors
    /// When open_tree(2) fails.
    pub(crate) fn clone_of(source: &Path, recursive: bool) -> io::Result<Self> {
        Self::open_tree(libc::AT_FDCWD, &c_path(source)?, libc::AT_SYMLINK_NOFOLLOW, recursive)
    }

    /// Clones the mount of an open file or folder; if `recursive`, with everything mounted below it.
    ///
    /// # Errors
    /// When open_tree(2) fails.
    pub(crate) fn clone_of_file(file: &File, recursive: bool) -> io::Result<Self> {
        Self::open_tree(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH, recursive)
    }

    fn open_tree(folder: RawFd, path: &CStr, flags: libc::c_int, recursive: bool) -> io::Result<Self> {
        let depth = if recursive { libc::AT_RECURSIVE } else { 0 };
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | (flags | depth) as libc::c_uint;
        // SAFETY: the path is a zero-terminated string that outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, folder, path.as_ptr(), flags) };
        // SAFETY: the kernel has just created the descriptor, so nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(Errno::result(fd)? as RawFd) }))
    }

    /// Sets flags (`MOUNT_ATTR_*`) and propagation of all mounts in the tree, and disables setuid programs and devices.
    ///
    /// # Errors
    /// When mount_setattr(2) fails.
    pub(crate) fn restrict(&self, flags: u64, propagation: Propagation) -> io::Result<()> {
        self.set(flags, propagation, libc::AT_RECURSIVE)
    }

    /// Does the same with the topmost mount only.
    ///
    /// # Errors
    /// When mount_setattr(2) fails.
    pub(crate) fn restrict_top(&self, flags: u64, propagation: Propagation) -> io::Result<()> {
        self.set(flags, propagation, 0)
    }

    fn set(&self, flags: u64, propagation: Propagation, depth: libc::c_int) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: flags | ALWAYS,
            // The access time mode is a number within the flags, so the old number must be cleared.
            attr_clr: if flags & libc::MOUNT_ATTR__ATIME == 0 { 0 } else { libc::MOUNT_ATTR__ATIME },
            propagation: match propagation {
                Propagation::Private => libc::MS_PRIVATE,
                Propagation::Slave => libc::MS_SLAVE,
                Propagation::Shared => libc::MS_SHARED,
            },
            userns_fd: 0,
        };
        mount_setattr(self.0.as_raw_fd(), c"", libc::AT_EMPTY_PATH | depth, &attributes)
    }

    /// Makes the topmost mount ID-mapped, or, if `recursive`, all mounts in the tree.
    ///
    /// # Errors
    /// When mount_setattr(2) fails.
    pub(crate) fn map_ids(&self, namespace: &File, recursive: bool) -> io::Result<()> {
        let depth = if recursive { libc::AT_RECURSIVE } else { 0 };
        let userns_fd = namespace.as_raw_fd() as u64;
        let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
        let mapped = mount_setattr(self.0.as_raw_fd(), c"", libc::AT_EMPTY_PATH | depth, &attributes);
        mapped.map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::EINVAL) => ": the host's kernel does not support it for this filesystem",
                Some(libc::EPERM) => ": it is mapped already, or its filesystem belongs to another user namespace",
                _ => "",
            };
            io::Error::new(error.kind(), format!("map the IDs of the mount: {error}{hint}"))
        })
    }

    /// Attaches the tree at `target`.
    ///
    /// # Errors
    /// When move_mount(2) fails.
    pub(crate) fn attach(self, target: &Path) -> io::Result<()> {
        let target = c_path(target)?;
        // SAFETY: both paths are zero-terminated strings that outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        Errno::result(result).map(drop).map_err(Into::into)
    }
}

fn mount_setattr(folder: RawFd, path: &CStr, flags: libc::c_int, attributes: &libc::mount_attr) -> io::Result<()> {
    let attributes: *const libc::mount_attr = attributes;
    // SAFETY: the path is a zero-terminated string, and the size is that of the structure. Both outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, folder, path.as_ptr(), flags, attributes, size_of::<libc::mount_attr>())
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// Makes the mount at `path` in another mount namespace read-only or writable, and nothing that is mounted below it.
///
/// # Errors
/// When the namespace cannot be entered or mount_setattr(2) fails, for example with EBUSY because a file of a mount that
/// becomes read-only is open for writing.
pub(crate) fn set_read_only(namespace: &File, path: &Path, read_only: bool) -> io::Result<()> {
    let path = c_path(path)?;
    let (set, clear) = if read_only { (libc::MOUNT_ATTR_RDONLY, 0) } else { (0, libc::MOUNT_ATTR_RDONLY) };
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    in_namespace(namespace, || mount_setattr(libc::AT_FDCWD, &path, libc::AT_SYMLINK_NOFOLLOW, &attributes))
}

/// Runs `work` in another mount namespace.
///
/// # Errors
/// When the namespace cannot be entered, or `work` fails.
pub(crate) fn in_namespace<T: Send>(namespace: &File, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    with_own_root(|| {
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        work()
    })
}

/// The parsed options of one of containerd's mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// A bind mount; `Some(true)` is recursive.
    pub(crate) bind: Option<bool>,
    /// `MOUNT_ATTR_*` flags.
    pub(crate) attributes: u64,
    /// mount(2) flags.
    pub(crate) flags: MsFlags,
    /// Options for the filesystem.
    pub(crate) data: Vec<String>,
}

/// Parses the options of one of containerd's mounts. Later options override earlier ones.
///
/// # Errors
/// The first option that husk does not support.
pub(crate) fn parse_options(options: &[String]) -> Result<MountOptions, &str> {
    let mut parsed = MountOptions { bind: None, attributes: 0, flags: MsFlags::empty(), data: Vec::new() };
    for option in options {
        let (attribute, flag, set) = match option.as_str() {
            "bind" | "rbind" => {
                parsed.bind = Some(parsed.bind == Some(true) || option == "rbind");
                continue;
            }
            "ro" => (libc::MOUNT_ATTR_RDONLY, MsFlags::MS_RDONLY, true),
            "rw" => (libc::MOUNT_ATTR_RDONLY, MsFlags::MS_RDONLY, false),
            "nosuid" => (libc::MOUNT_ATTR_NOSUID, MsFlags::MS_NOSUID, true),
            "nodev" => (libc::MOUNT_ATTR_NODEV, MsFlags::MS_NODEV, true),
            "noexec" => (libc::MOUNT_ATTR_NOEXEC, MsFlags::MS_NOEXEC, true),
            "exec" => (libc::MOUNT_ATTR_NOEXEC, MsFlags::MS_NOEXEC, false),
            "noatime" => (libc::MOUNT_ATTR_NOATIME, MsFlags::MS_NOATIME, true),
            "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, MsFlags::MS_NODIRATIME, true),
            "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, MsFlags::MS_STRICTATIME, true),
            "sync" => (0, MsFlags::MS_SYNCHRONOUS, true),
            "dirsync" => (0, MsFlags::MS_DIRSYNC, true),
            // Defaults, and options that `ALWAYS` overrides.
            "defaults" | "relatime" | "async" | "suid" | "dev" | "private" | "rprivate" => continue,
            unsupported @ ("loop" | "remount" | "slave" | "rslave" | "shared" | "rshared" | "unbindable"
            | "runbindable") => {
                return Err(unsupported);
            }
            // Options for containerd's mount manager, or for ID-mapped mounts, which have been taken where they are
            // supported.
            unsupported
                if ["X-containerd.", "uidmap=", "gidmap="].iter().any(|start| unsupported.starts_with(start)) =>
            {
                return Err(unsupported);
            }
            data => {
                parsed.data.push(data.to_owned());
                continue;
            }
        };
        parsed.flags.set(flag, set);
        parsed.attributes = if set { parsed.attributes | attribute } else { parsed.attributes & !attribute };
    }
    Ok(parsed)
}

/// Joins options to one string. If it would be too long, the layers of an overlay are given relative to their common
/// folder; the mount must then be made from that folder.
///
/// # Errors
/// The length of the options, if they are too long.
pub(crate) fn mount_data(fs_type: &str, options: &[String]) -> Result<(Option<PathBuf>, String), usize> {
    let plain = options.join(",");
    if plain.len() <= MAX_OPTIONS {
        return Ok((None, plain));
    }
    let lower = options.iter().find_map(|option| option.strip_prefix(LOWERDIR));
    let shortened = (fs_type == "overlay").then_some(lower).flatten().and_then(|lower| {
        let (folder, relative) = common_folder(lower)?;
        let options = options.iter().map(|option| match option.starts_with(LOWERDIR) {
            true => format!("{LOWERDIR}{relative}"),
            false => option.clone(),
        });
        Some((Some(folder), options.collect::<Vec<_>>().join(",")))
    });
    match shortened {
        Some((folder, data)) if data.len() <= MAX_OPTIONS => Ok((folder, data)),
        _ => Err(plain.len()),
    }
}

/// The deepest folder that contains all layers, and the layers relative to it.
fn common_folder(lower: &str) -> Option<(PathBuf, String)> {
    // A backslash escapes a colon or a comma in a name (Documentation/filesystems/overlayfs.rst). Such names and
    // relative ones are not shortened.
    if lower.contains('\\') || !lower.split(':').all(|layer| layer.starts_with('/')) {
        return None;
    }
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut folder = layers.first()?.parent()?.to_path_buf();
    while !layers.iter().all(|layer| layer.starts_with(&folder) && **layer != *folder) {
        folder.pop().then_some(())?;
    }
    let relative = layers.iter().map(|layer| layer.strip_prefix(&folder).ok()?.to_str()).collect::<Option<Vec<_>>>()?;
    Some((folder, relative.join(":")))
}

/// Mounts a filesystem, with `folder` as working directory if its options are relative to one.
///
/// # Errors
/// When mount(2) fails.
pub(crate) fn mount_filesystem(
    fs_type: &str,
    source: &str,
    target: &Path,
    flags: MsFlags,
    data: &str,
    folder: Option<&Path>,
) -> io::Result<()> {
    let flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mount = || mount(Some(source), target, Some(fs_type), flags, Some(data)).map_err(io::Error::from);
    let Some(folder) = folder else { return mount() };
    with_own_root(|| {
        nix::unistd::chdir(folder)?;
        mount()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn mount_options_are_parsed_and_unsupported_ones_rejected() {
        let ro = libc::MOUNT_ATTR_RDONLY;
        let empty = MsFlags::empty();
        for (options, bind, attributes, flags, data) in [
            (&["rbind", "ro"][..], Some(true), ro, MsFlags::MS_RDONLY, &[][..]),
            (&["bind", "rw"], Some(false), 0, empty, &[]),
            (&["rbind", "bind", "ro", "rw"], Some(true), 0, empty, &[]),
            (&["index=off", "lowerdir=/a:/b"], None, 0, empty, &["index=off", "lowerdir=/a:/b"]),
            (&["ro", "noexec", "volatile"], None, ro | 8, MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC, &["volatile"]),
            (&["defaults", "rprivate"], None, 0, empty, &[]),
        ] {
            let expected = MountOptions { bind, attributes, flags, data: strings(data) };
            assert_eq!(parse_options(&strings(options)), Ok(expected), "{options:?}");
        }
        for unsupported in ["loop", "rshared", "X-containerd.mkdir.path=/a", "uidmap=0:1:2"] {
            assert_eq!(parse_options(&strings(&["ro", unsupported])), Err(unsupported));
        }
    }

    #[test]
    fn long_lists_of_layers_become_relative_to_their_common_folder() {
        let root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let layers = |n: u32, end: &str| (1..=n).map(|n| format!("{root}/{n}{end}")).collect::<Vec<_>>().join(":");
        let upper = format!("upperdir={root}/99/fs");
        let short = strings(&["index=off", &upper, &format!("lowerdir={}", layers(3, "/fs"))]);
        assert_eq!(mount_data("overlay", &short), Ok((None, short.join(","))));

        let long = strings(&["index=off", &upper, &format!("lowerdir={}", layers(100, "/fs"))]);
        let (folder, data) = mount_data("overlay", &long).unwrap();
        assert_eq!(folder.as_deref(), Some(Path::new(root)));
        assert!(data.starts_with(&format!("index=off,{upper},lowerdir=1/fs:2/fs:")), "{data}");
        assert!(data.ends_with(":99/fs:100/fs"), "{data}");

        assert!(mount_data("ext4", &long).is_err());
        assert!(mount_data("overlay", &strings(&[&format!("lowerdir={}", layers(900, "/fs"))])).is_err());
        assert!(mount_data("overlay", &strings(&[&format!("lowerdir={}", layers(100, "\\:/fs"))])).is_err());
        // One layer contains the other: the common folder is above both.
        assert_eq!(common_folder("/a/b:/a/b/c"), Some(("/a".into(), "b:b/c".into())));
        assert_eq!(common_folder("/a:/b"), Some(("/".into(), "a:b".into())));
        assert_eq!(common_folder("a:/b"), None);
    }
}
