//! Which sources of bind mounts are the same files.
//!
//! virtiofsd identifies a file by its device, its inode and its mount, and the guest makes a filesystem of its own of
//! every mount in the share. Two mounts of one folder are therefore two filesystems for the guest, between which locks,
//! sockets, fifos and shared memory do not work. So sources that are the same share one mount.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::rootfs::spec::{Bind, MountIdMap};

/// Identifies what a bind mount shows: bind mounts with the same value can share one mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    device: u64,
    inode: u64,
    /// Flags of the host's mount, such as `ro` and `noexec`, which apply to its copies.
    flags: Vec<u8>,
    /// The mounts below the source.
    below: Vec<Below>,
    /// Whether what is mounted below has been made read-only. Each mount has flags of its own, so a copy of all of them
    /// cannot be made as writable as the originals again.
    read_only_below: bool,
    /// The host's mount whose later mounts appear.
    follows: Option<u64>,
    /// The mapping of an ID-mapped mount: the kernel maps a mount once.
    id_map: Option<MountIdMap>,
}

/// A mount below a source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Below {
    /// The path from the source.
    path: Vec<u8>,
    device: Vec<u8>,
    root: Vec<u8>,
    flags: Vec<u8>,
}

impl Source {
    /// Opens and identifies the source of a bind mount.
    ///
    /// # Errors
    /// When the source does not exist, or `/proc` cannot be read.
    pub(super) fn open(bind: &Bind) -> io::Result<(File, Self)> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(&bind.source)?;
        let metadata = file.metadata()?;
        let mount = mount_id(&file)?;
        let table = fs::read("/proc/self/mountinfo")?;
        let mounts: Vec<Mount<'_>> = table.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect();
        let flags = mounts.iter().find(|entry| entry.id == mount).map(|entry| entry.flags.to_vec());
        let flags = flags.ok_or_else(|| io::Error::other(format!("mount {mount} is not in /proc/self/mountinfo")))?;
        let below = if bind.recursive { below(&mounts, &bind.source) } else { Vec::new() };
        let source = Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            flags,
            read_only_below: bind.read_only_below && !below.is_empty(),
            below,
            follows: bind.follows_host.then_some(mount),
            id_map: bind.id_map.clone(),
        };
        Ok((file, source))
    }

    /// The paths from the source to what is mounted below it, outer mounts first.
    pub(super) fn paths_below(&self) -> impl Iterator<Item = PathBuf> {
        self.below.iter().map(|mount| unescaped(&mount.path))
    }
}

/// The ID of the mount that a file was opened through.
fn mount_id(file: &File) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("fdinfo contains no mnt_id"))
}

/// The mounts below a folder, in the kernel's order.
fn below(mounts: &[Mount<'_>], folder: &Path) -> Vec<Below> {
    let folder = escaped(folder);
    let folder = folder.strip_suffix(b"/").unwrap_or(&folder);
    let entry = |mount: &Mount<'_>| {
        let path = mount.point.strip_prefix(folder)?.strip_prefix(b"/")?;
        (!path.is_empty()).then(|| Below {
            path: path.to_vec(),
            device: mount.device.to_vec(),
            root: mount.root.to_vec(),
            flags: mount.flags.to_vec(),
        })
    };
    mounts.iter().filter_map(entry).collect()
}

/// A path in the form of mountinfo (proc_pid_mountinfo(5)).
fn escaped(path: &Path) -> Vec<u8> {
    let mut escaped = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => escaped.extend(format!("\\{byte:03o}").bytes()),
            _ => escaped.push(byte),
        }
    }
    escaped
}

/// Reverts [`escaped`].
fn unescaped(path: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let (byte, length) = match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => (byte, 4),
            None => (*first, 1),
        };
        bytes.push(byte);
        rest = &rest[length..];
    }
    OsString::from_vec(bytes).into()
}

/// A line of mountinfo. By hand, because paths need not be UTF-8.
struct Mount<'a> {
    id: u64,
    device: &'a [u8],
    root: &'a [u8],
    point: &'a [u8],
    flags: &'a [u8],
}

impl<'a> Mount<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let (device, root, point, flags) = (fields.nth(1)?, fields.next()?, fields.next()?, fields.next()?);
        Some(Self { id, device, root, point, flags })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_below_a_source_are_part_of_its_identity() {
        let table = b"21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            30 21 0:40 / /data\\040x rw - tmpfs t rw\n\
            31 30 0:41 /a /data\\040x/sub ro,nosuid shared:7 master:2 - tmpfs t rw\n\
            32 21 0:42 / /data\\040xy rw - tmpfs t rw\n\
            33 21 0:43 / /\xff rw - tmpfs t rw\n";
        let mounts: Vec<_> = table.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect();
        assert_eq!(mounts.iter().map(|mount| mount.id).collect::<Vec<_>>(), [21, 30, 31, 32, 33]);
        let sub = Below {
            path: b"sub".to_vec(),
            device: b"0:41".to_vec(),
            root: b"/a".to_vec(),
            flags: b"ro,nosuid".to_vec(),
        };
        assert_eq!(below(&mounts, Path::new("/data x")), [sub]);
        let paths = |folder| below(&mounts, Path::new(folder)).into_iter().map(|one| one.path).collect::<Vec<_>>();
        assert_eq!(paths("/"), [&b"data\\040x"[..], b"data\\040x/sub", b"data\\040xy", b"\xff"]);
        assert_eq!(paths("/data"), Vec::<Vec<u8>>::new());
        for path in ["plain", "a b\tc\nd\\e", "\\"] {
            assert_eq!(unescaped(&escaped(Path::new(path))), Path::new(path));
        }
        assert_eq!(unescaped(b"a\\04"), Path::new("a\\04"));
    }
}
