//! Opens and locks the image of a disk: a regular file or a block device.

use std::fmt::Display;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{major, minor};

use crate::vmm::Cache;

/// What a VM may do with an image, and who else may have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read an image that never changes, and that all VMs share through the host's page cache.
    Shared,
    /// Read, while nobody writes.
    ReadOnly,
    /// Read and write, alone.
    Exclusive,
}

/// An image cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// It cannot be opened or examined.
    #[error("open the disk image {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// It is a folder, a pipe or something else.
    #[error("the disk image {} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// The host has no such device.
    #[error("linux.devices: find the block device {major}:{minor} of the host")]
    Device { major: i64, minor: i64, source: io::Error },
    /// The host or another VM has the device.
    #[error("the block device {} is in use on the host: it is mounted, or part of another device", .0.display())]
    Busy(PathBuf),
}

/// An opened image.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    path: PathBuf,
    access: Access,
    is_device: bool,
    id: String,
}

impl Image {
    /// Opens the image at `path`, following symbolic links.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub(crate) fn open(path: &Path, access: Access) -> Result<Self, ImageError> {
        let mut options = File::options();
        options.read(true).write(access == Access::Exclusive);
        Self::open_with(&options, 0, path, access)
    }

    /// Opens the block device of the host with these numbers.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub(crate) fn open_device(major: i64, minor: i64, access: Access) -> Result<Self, ImageError> {
        let missing = |source| ImageError::Device { major, minor, source };
        // The path in a spec is the container's. The kernel knows the device's name (sysfs-dev in its ABI/stable).
        let properties = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).map_err(missing)?;
        let name = properties.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let name = name.ok_or_else(|| missing(io::Error::other("it has no name")))?;
        let image = Self::open(&Path::new("/dev").join(name), access)?;
        if image.id != Self::id_of_device(major, minor) {
            return Err(missing(io::Error::other(format!("{} is another device", image.path.display()))));
        }
        Ok(image)
    }

    /// Opens the image with these options, and these flags of open(2).
    pub(super) fn open_with(
        options: &OpenOptions,
        flags: i32,
        path: &Path,
        access: Access,
    ) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Open { path: path.to_owned(), source };
        let open = |more| options.clone().custom_flags(flags | more).open(path);
        // O_NONBLOCK: a fifo does not block.
        let mut file = open(libc::O_NONBLOCK).map_err(failed)?;
        let mut metadata = file.metadata().map_err(failed)?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(ImageError::Kind(path.to_owned()));
        }
        if is_device && access == Access::Exclusive {
            // Excludes the host's own use of the device (open(2)), by whatever name.
            file = open(libc::O_EXCL).map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => ImageError::Busy(path.to_owned()),
                _ => failed(error),
            })?;
            metadata = file.metadata().map_err(failed)?;
        }
        Ok(Self::of(file, path, access, is_device, &metadata))
    }

    fn of(file: File, path: &Path, access: Access, is_device: bool, metadata: &Metadata) -> Self {
        Self { file, path: path.to_owned(), access, is_device, id: Self::id_of(metadata) }
    }

    /// The [`id`](Self::id) of an image that need not be open.
    pub(crate) fn id_of(metadata: &Metadata) -> String {
        match metadata.file_type().is_block_device() {
            true => Self::id_of_device(major(metadata.rdev()), minor(metadata.rdev())),
            false => format!("{}-{}", metadata.dev(), metadata.ino()),
        }
    }

    /// The same for the block device with these numbers.
    pub(crate) fn id_of_device(major: impl Display, minor: impl Display) -> String {
        format!("device-{major}-{minor}")
    }

    /// An image that is this file, whose name for messages is `path`. No other process can open it.
    pub(super) fn private(file: File, path: &Path) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self::of(file, path, Access::Exclusive, false, &metadata))
    }

    /// An image that is this file, which never changes, opened at `path`.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub(super) fn held(file: File, path: &Path) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self::of(file, path, Access::Shared, false, &metadata))
    }

    /// Locks the image, for as long as a descriptor of it is open: that of this value, or of the machine. Returns false
    /// if another process has it.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub(crate) fn lock(&self) -> io::Result<bool> {
        let kind = match self.access {
            Access::Shared => return Ok(true),
            Access::ReadOnly => libc::F_RDLCK,
            Access::Exclusive => libc::F_WRLCK,
        };
        let whole = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Identifies the image on this host, by whatever path it was opened.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Where it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the VM may do with it.
    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// Whether it is a block device.
    pub(crate) fn is_device(&self) -> bool {
        self.is_device
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// How the machine reads and writes it.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub(crate) fn cache(&self) -> io::Result<Cache> {
        if self.access == Access::Shared {
            return Ok(Cache::Shared);
        }
        let flags = OFlag::from_bits_retain(fcntl(&self.file, FcntlArg::F_GETFL)?);
        match fcntl(&self.file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)) {
            Ok(_) => Ok(Cache::Bypassed),
            // Its filesystem does not support it.
            Err(Errno::EINVAL) => Ok(Cache::Shared),
            Err(error) => Err(error.into()),
        }
    }

    /// The descriptor, for the machine.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.file.into()
    }

    /// A path that opens the same file in a process that has inherited the descriptor as `number`.
    pub(super) fn inherited(number: i32) -> String {
        format!("/proc/self/fd/{number}")
    }

    /// The descriptor's number, for messages.
    pub(super) fn number(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_excludes_all_others_and_readers_only_writers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [0; 512]).unwrap();
        let open = |access| Image::open(&path, access).unwrap();
        let table = [
            (Access::Exclusive, Access::Exclusive, false),
            (Access::Exclusive, Access::ReadOnly, false),
            (Access::ReadOnly, Access::ReadOnly, true),
            (Access::ReadOnly, Access::Exclusive, false),
            (Access::Exclusive, Access::Shared, true),
        ];
        for (first, second, expected) in table {
            let (one, other) = (open(first), open(second));
            assert!(one.lock().unwrap());
            assert_eq!(other.lock().unwrap(), expected, "{first:?}, {second:?}");
            // The machine's copy keeps the lock.
            let machine = one.into_fd();
            assert_eq!(other.lock().unwrap(), expected, "{first:?}, {second:?}");
            drop(machine);
            assert!(other.lock().unwrap());
        }
    }

    #[test]
    fn only_files_and_block_devices_are_images() {
        let folder = tempfile::tempdir().unwrap();
        let error = Image::open(folder.path(), Access::ReadOnly).unwrap_err();
        assert!(matches!(error, ImageError::Kind(_)), "{error}");
        let error = Image::open(Path::new("/dev/null"), Access::Exclusive).unwrap_err();
        assert!(matches!(error, ImageError::Kind(_)), "{error}");
        let error = Image::open(&folder.path().join("missing"), Access::ReadOnly).unwrap_err();
        assert!(matches!(error, ImageError::Open { .. }), "{error}");
    }
}
