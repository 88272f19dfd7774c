//! Which folders are layers that never change, and what a folder is recognized by.
//!
//! The `fs` folder of a committed snapshot never changes: containerd's overlayfs snapshotter writes it before the commit
//! and removes it as a whole, and overlayfs forbids changes below a mounted overlay. Other folders may change at any time.
//!
//! A folder is recognized by its filesystem, its file handle, its birth time and its ctime. The handle has the inode's
//! generation, which differs when a filesystem uses the number of a removed inode again, so the identity of a removed
//! folder does not return.

use std::ffi::CStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::errno::Errno;
use sha2::{Digest, Sha256};

use crate::host::digest::Sha256Digest;

/// The folder of a snapshot that has the layer's files.
const FS: &str = "fs";
/// The folder of all snapshots, beside the snapshotter's database.
const SNAPSHOTS: &str = "snapshots";
const DATABASE: &str = "metadata.db";

/// Why a folder is not recognized as a layer that never changes.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// It is not a snapshot of containerd's overlayfs snapshotter.
    #[error("{} is not a snapshot of containerd's overlayfs snapshotter", .0.display())]
    NotASnapshot(PathBuf),
    /// Something is mounted on it.
    #[error("{} is a mount point, as with snapshotters that fetch files on demand", .0.display())]
    MountPoint(PathBuf),
    /// The filesystem does not tell a folder from one that has taken its place.
    #[error("the filesystem of {} has no {what}", path.display())]
    Unrecognizable {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// It cannot be examined.
    #[error("examine the layer {}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// A layer's identity: 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity(String);

impl Identity {
    /// The identity of a layer's folder.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub(super) fn of(layer: &Path) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::Io { path: layer.to_owned(), source };
        let snapshots = snapshots_of(layer).ok_or_else(|| IdentityError::NotASnapshot(layer.to_owned()))?;
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW);
        let folder = options.open(layer).map_err(failed)?;
        let metadata = folder.metadata().map_err(failed)?;
        if metadata.dev() != fs::metadata(snapshots).map_err(failed)?.dev() {
            return Err(IdentityError::MountPoint(layer.to_owned()));
        }
        let missing = |what| IdentityError::Unrecognizable { path: layer.to_owned(), what };
        let born = birth(&metadata).ok_or_else(|| missing("birth times"))?;
        let handle = handle(folder.into()).map_err(failed)?.ok_or_else(|| missing("file handles"))?;
        let mut digest = Sha256::new();
        digest.update(metadata.dev().to_le_bytes());
        digest.update((handle.len() as u64).to_le_bytes());
        digest.update(handle);
        digest.update(born.to_le_bytes());
        digest.update(metadata.ctime().to_le_bytes());
        digest.update(metadata.ctime_nsec().to_le_bytes());
        Ok(Self(Sha256Digest::finish(digest).to_string()))
    }

    /// An identity that is the name of a file in the store.
    pub(super) fn named(name: &str) -> Option<Self> {
        is_digest(name).then(|| Self(name.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a text is a digest: a name in the store that is husk's.
pub(super) fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The folder of all snapshots, if this is the folder of one.
fn snapshots_of(layer: &Path) -> Option<&Path> {
    let snapshot =
        layer.parent().filter(|_| layer.is_absolute() && layer.file_name().is_some_and(|name| name == FS))?;
    let number = snapshot.file_name()?.to_str()?;
    let snapshots = snapshot.parent().filter(|folder| folder.file_name().is_some_and(|name| name == SNAPSHOTS))?;
    let is_numbered = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_numbered && snapshots.with_file_name(DATABASE).is_file()).then_some(snapshots)
}

/// Nanoseconds since 1970.
fn birth(metadata: &Metadata) -> Option<u128> {
    metadata.created().ok()?.duration_since(UNIX_EPOCH).ok().map(|born| born.as_nanos())
}

/// The file handle of a folder (name_to_handle_at(2)), with its type. None if the filesystem has none.
fn handle(folder: OwnedFd) -> io::Result<Option<Vec<u8>>> {
    #[repr(C)]
    struct Handle {
        length: libc::c_uint,
        kind: libc::c_int,
        bytes: [u8; libc::MAX_HANDLE_SZ as usize],
    }
    let mut handle = Handle { length: libc::MAX_HANDLE_SZ as libc::c_uint, kind: 0, bytes: [0; _] };
    let (mut mount, empty): (libc::c_int, &CStr) = (0, c"");
    // SAFETY: the structure has the layout of the kernel's, with room for as many bytes as it says, and the path is
    // zero-terminated. All outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            folder.as_raw_fd(),
            empty.as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    match Errno::result(result) {
        Ok(_) => {
            let length = (handle.length as usize).min(handle.bytes.len());
            let kind = handle.kind.to_le_bytes();
            Ok(Some(kind.into_iter().chain(handle.bytes[..length].iter().copied()).collect()))
        }
        Err(Errno::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A snapshotter's folder with one snapshot. Returns the layer's folder.
    pub(in crate::disks::layers) fn snapshot(folder: &Path, number: u32) -> PathBuf {
        fs::write(folder.join(DATABASE), "").unwrap();
        let layer = folder.join(SNAPSHOTS).join(number.to_string()).join(FS);
        fs::create_dir_all(&layer).unwrap();
        layer
    }

    #[test]
    fn a_folder_that_takes_the_place_of_another_has_another_identity() {
        let folder = tempfile::tempdir().unwrap();
        let layer = snapshot(folder.path(), 7);
        let first = Identity::of(&layer).unwrap();
        assert_eq!(Identity::of(&layer).unwrap(), first);
        assert!(Identity::named(first.as_str()).is_some());
        fs::write(layer.join("new"), "").unwrap();
        let changed = Identity::of(&layer).unwrap();
        assert_ne!(changed, first);
        fs::remove_dir_all(&layer).unwrap();
        fs::create_dir(&layer).unwrap();
        assert!(![first, changed].contains(&Identity::of(&layer).unwrap()));
    }

    #[test]
    fn only_snapshots_are_layers() {
        let folder = tempfile::tempdir().unwrap();
        let layer = snapshot(folder.path(), 7);
        let other = folder.path().join("snapshots/new-7/fs");
        fs::create_dir_all(&other).unwrap();
        std::os::unix::fs::symlink("7", folder.path().join("snapshots/8")).unwrap();
        for path in [&other, &layer.join(".."), folder.path(), Path::new("/usr"), Path::new("snapshots/7/fs")] {
            let error = Identity::of(path).unwrap_err();
            assert!(matches!(error, IdentityError::NotASnapshot(_)), "{error}");
        }
        fs::remove_file(folder.path().join(DATABASE)).unwrap();
        assert!(matches!(Identity::of(&layer).unwrap_err(), IdentityError::NotASnapshot(_)));
    }
}
