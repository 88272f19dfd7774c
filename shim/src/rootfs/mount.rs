//! The system calls behind a mount: trees that are finished before anybody can see them, and containerd's mounts with
//! their options.
//!
//! A bind mount that is made first and made read-only afterwards would have been writable meanwhile, and would stay so in
//! virtiofsd's mount namespace: a change of flags does not propagate, only mounting does. So it is cloned unattached,
//! restricted, and attached last. This needs Linux 5.12 (mount_setattr(2)).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// The kernel takes one page of options, with its final zero.
const MAX_DATA: usize = 4095;
const LOWERDIR: &str = "lowerdir=";
/// Nothing of the host runs from, or opens devices in, what a guest can write to.
const ALWAYS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// A tree of mounts that is attached nowhere yet.
#[derive(Debug)]
pub struct Detached(OwnedFd);

/// How a tree passes mounts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Neither gives nor takes.
    Private,
    /// Takes from what it was cloned from.
    Slave,
    /// Gives and takes, in a group of its own.
    Shared,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(Into::into)
}

impl Detached {
    /// Clones the mount at `source`, which is not followed if it is a link; with what is mounted below it if `recursive`.
    ///
    /// # Errors
    /// open_tree(2)'s.
    pub fn clone_of(source: &Path, recursive: bool) -> io::Result<Self> {
        let source = c_path(source)?;
        let depth = if recursive { libc::AT_RECURSIVE as libc::c_uint } else { 0 };
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_SYMLINK_NOFOLLOW as libc::c_uint | depth;
        // SAFETY: the path is a string that ends with a zero and outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) };
        // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(Errno::result(fd)? as RawFd) }))
    }

    /// Sets flags (`MOUNT_ATTR_*`) and propagation of all mounts in the tree. Setuid programs and devices never work in it.
    ///
    /// # Errors
    /// mount_setattr(2)'s.
    pub fn restrict(&self, flags: u64, propagation: Propagation) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: flags | ALWAYS,
            // The way access times are kept is one number, not flags: setting it needs clearing it.
            attr_clr: if flags & libc::MOUNT_ATTR__ATIME == 0 { 0 } else { libc::MOUNT_ATTR__ATIME },
            propagation: match propagation {
                Propagation::Private => libc::MS_PRIVATE,
                Propagation::Slave => libc::MS_SLAVE,
                Propagation::Shared => libc::MS_SHARED,
            },
            userns_fd: 0,
        };
        // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor, and the structure is passed with its true size.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        Errno::result(result).map(drop).map_err(Into::into)
    }

    /// Attaches the tree at `target`.
    ///
    /// # Errors
    /// move_mount(2)'s.
    pub fn attach(self, target: &Path) -> io::Result<()> {
        let target = c_path(target)?;
        // SAFETY: both paths are strings that end with a zero and outlive the call.
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

/// What containerd's options for one mount mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// A bind mount: `Some(true)` with what is below.
    pub bind: Option<bool>,
    /// `MOUNT_ATTR_*`.
    pub attributes: u64,
    /// For mount(2).
    pub flags: MsFlags,
    /// For the filesystem.
    pub data: Vec<String>,
}

/// Sorts the options of one of containerd's mounts. Later ones win.
///
/// # Errors
/// The first option that husk cannot honour.
pub fn parse_options(options: &[String]) -> Result<Options, &str> {
    let mut parsed = Options { bind: None, attributes: 0, flags: MsFlags::empty(), data: Vec::new() };
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
            // The defaults, and those that `ALWAYS` overrides.
            "defaults" | "relatime" | "async" | "suid" | "dev" | "private" | "rprivate" => continue,
            refused @ ("loop" | "remount" | "slave" | "rslave" | "shared" | "rshared" | "unbindable"
            | "runbindable") => {
                return Err(refused);
            }
            // For containerd's mount manager, or for id-mapped mounts that containerd's own library makes.
            refused if ["X-containerd.", "uidmap=", "gidmap="].iter().any(|start| refused.starts_with(start)) => {
                return Err(refused);
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

/// Options as one string, and the folder to be in so that its paths are right. An overlay of many layers has more than fits
/// in a page, but its layers have a long beginning in common.
///
/// # Errors
/// The length, when it does not fit.
pub fn mount_data(fs_type: &str, options: &[String]) -> Result<(Option<PathBuf>, String), usize> {
    let plain = options.join(",");
    if plain.len() <= MAX_DATA {
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
        Some((folder, data)) if data.len() <= MAX_DATA => Ok((folder, data)),
        _ => Err(plain.len()),
    }
}

/// The deepest folder that all layers lie in, and the layers relative to it.
fn common_folder(lower: &str) -> Option<(PathBuf, String)> {
    // A backslash escapes a colon or a comma in a name (overlayfs.rst): such names are left alone, and so are relative ones.
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

/// mount(2) of a filesystem, from `folder` if its options are relative to one.
///
/// # Errors
/// mount(2)'s.
pub fn mount_filesystem(
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
    // The working folder is the process's, unless a thread asks for one of its own; that thread is not used again.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mount".into()).spawn_scoped(scope, || {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(folder)?;
            mount()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn options_of_containerds_mounts() {
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
            let want = Options { bind, attributes, flags, data: strings(data) };
            assert_eq!(parse_options(&strings(options)), Ok(want), "{options:?}");
        }
        for refused in ["loop", "rshared", "X-containerd.mkdir.path=/a", "uidmap=0:1:2"] {
            assert_eq!(parse_options(&strings(&["ro", refused])), Err(refused));
        }
    }

    #[test]
    fn long_lists_of_layers_are_told_relative_to_their_folder() {
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
        // One layer inside another: the folder is above both.
        assert_eq!(common_folder("/a/b:/a/b/c"), Some(("/a".into(), "b:b/c".into())));
        assert_eq!(common_folder("/a:/b"), Some(("/".into(), "a:b".into())));
        assert_eq!(common_folder("a:/b"), None);
    }
}
