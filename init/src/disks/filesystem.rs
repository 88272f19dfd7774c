//! The filesystem of a disk: mounted, grown, frozen, unmounted.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_protos::disks::DiskMount;
use husk_protos::lock::lock;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use nix::unistd::syncfs;

/// ioctl_fsfreeze(2): _IOWR('X', 119, int).
const FIFREEZE: u64 = 0xc004_5877;
/// _IOWR('X', 120, int).
const FITHAW: u64 = 0xc004_5878;
/// Grows an ext4 filesystem to a number of blocks: _IOW('f', 16, __u64) in the kernel's fs/ext4/ext4.h.
const EXT4_IOC_RESIZE_FS: u64 = 0x4008_6610;
/// Makes an ext4 filesystem drop what is not written: _IOR('X', 125, __u32) in the kernel's fs/ext4/ext4.h.
const EXT4_IOC_SHUTDOWN: u64 = 0x8004_587d;
/// With nothing written before (EXT4_GOING_FLAGS_NOLOGFLUSH).
static NOTHING_WRITTEN: u32 = 2;

/// A mounted filesystem.
#[derive(Debug)]
pub(super) struct Filesystem {
    path: PathBuf,
    freeze: Mutex<Freeze>,
    /// Nobody reads the disk after this guest.
    temporary: bool,
}

/// Whether a filesystem is frozen.
#[derive(Debug, Default)]
struct Freeze {
    /// It is to be frozen.
    wanted: bool,
    /// It is frozen: this descriptor thaws it.
    frozen: Option<File>,
}

impl Filesystem {
    /// Mounts a device's filesystem at a new folder, and grows it to `bytes` if the request says so.
    pub(super) fn mount(device: &str, path: PathBuf, request: &DiskMount, bytes: u64) -> io::Result<Self> {
        fs::create_dir_all(&path)?;
        let flags = MsFlags::from_bits(request.flags)
            .ok_or_else(|| io::Error::other(format!("mount flags {:#x} are unknown", request.flags)))?;
        let data = (!request.data.is_empty()).then_some(request.data.as_str());
        let kind = request.type_.as_str();
        let mounted = mount(Some(device), &path, Some(kind), flags, data).map_err(io::Error::from);
        let mounted = mounted.map_err(|error| {
            let with = if request.data.is_empty() { String::new() } else { format!(" with {:?}", request.data) };
            let hint = match error.raw_os_error() {
                Some(libc::EINVAL) => format!(": it has no valid {kind} filesystem, or an option is invalid"),
                Some(libc::ENODEV) => format!(": the guest's kernel does not support {kind}"),
                _ => String::new(),
            };
            io::Error::new(error.kind(), format!("mount {device} as {kind}{with}: {error}{hint}"))
        });
        let filesystem = Self { temporary: request.temporary, ..Self::at(path) };
        let prepared = mounted.and_then(|()| {
            if request.grow && !flags.contains(MsFlags::MS_RDONLY) {
                let grown = filesystem.grow(bytes);
                return grown.map_err(|error| io::Error::new(error.kind(), format!("grow the filesystem: {error}")));
            }
            Ok(())
        });
        match prepared {
            Ok(()) => Ok(filesystem),
            Err(error) => {
                if let Err(error) = filesystem.unmount() {
                    tracing::error!(path = %filesystem.path.display(), %error, "failed to unmount a disk");
                }
                Err(error)
            }
        }
    }

    /// The filesystem that is mounted at `path`.
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path, freeze: Mutex::default(), temporary: false }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Does nothing if it has this size already. A filesystem in which the kernel has found errors cannot grow, and is used
    /// as it is.
    fn grow(&self, bytes: u64) -> io::Result<()> {
        let blocks: u64 = bytes / statvfs(&self.path)?.block_size() as u64;
        let root = File::open(&self.path)?;
        // SAFETY: the argument is a number of 64 bits, as the request says, and outlives the call.
        let done = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS as _, &raw const blocks) };
        match Errno::result(done) {
            // ext4_resize_begin in the kernel's fs/ext4/resize.c.
            Err(Errno::EPERM) => {
                let path = self.path.display();
                tracing::warn!(%path, "a filesystem has errors and keeps its size: check it with e2fsck on the host");
                Ok(())
            }
            done => Ok(done.map(drop)?),
        }
    }

    /// Freezes it: blocks until everything is written back. If it was thawed meanwhile, it stays so.
    pub(super) fn freeze(&self) -> io::Result<()> {
        if self.temporary {
            return Ok(());
        }
        {
            let mut freeze = lock(&self.freeze);
            if freeze.frozen.is_some() {
                return Ok(());
            }
            freeze.wanted = true;
        }
        let root = File::open(&self.path)?;
        match fs_ioctl(&root, FIFREEZE) {
            Ok(()) => {}
            // A read-only filesystem, or one that cannot be frozen, such as erofs.
            Err(Errno::EOPNOTSUPP | Errno::EROFS) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let mut freeze = lock(&self.freeze);
        freeze.frozen = Some(root);
        if !freeze.wanted {
            thaw(&mut freeze, &self.path);
        }
        Ok(())
    }

    /// Thaws it, and a freeze that is under way. A failure is logged.
    pub(super) fn thaw(&self) {
        let mut freeze = lock(&self.freeze);
        freeze.wanted = false;
        thaw(&mut freeze, &self.path);
    }

    /// Writes everything back, unless nobody reads it, and unmounts it. Succeeds if it is not mounted any more.
    pub(super) fn unmount(&self) -> io::Result<()> {
        match File::open(&self.path) {
            Ok(root) if self.temporary => shut_down(&root)?,
            // What is written is safe even if the mount is in use.
            Ok(root) => syncfs(OwnedFd::from(root))?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        match umount2(&self.path, MntFlags::UMOUNT_NOFOLLOW) {
            // EINVAL: it is not a mount point.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(error) => return Err(error.into()),
        }
        fs::remove_dir(&self.path)
    }

    /// Takes the mount away although its disk is gone. What uses it sees errors.
    pub(super) fn abandon(&self) -> io::Result<()> {
        self.thaw();
        match umount2(&self.path, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
            // It is not a mount point any more.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        crate::paths::allow_missing(fs::remove_dir(&self.path))
    }
}

/// Makes an ext4 filesystem drop what is not written. An earlier call may have done so.
fn shut_down(root: &File) -> io::Result<()> {
    // SAFETY: the argument is a number of 32 bits, as the request says, and outlives the call.
    let done = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_SHUTDOWN as _, &raw const NOTHING_WRITTEN) };
    match Errno::result(done) {
        // ENOTTY: it has been unmounted, and this is the folder below.
        Ok(_) | Err(Errno::ENOTTY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn thaw(freeze: &mut Freeze, path: &Path) {
    let Some(root) = freeze.frozen.take() else { return };
    match fs_ioctl(&root, FITHAW) {
        // EINVAL: somebody else has thawed it.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(error) => tracing::error!(path = %path.display(), %error, "failed to thaw a filesystem"),
    }
}

/// FIFREEZE and FITHAW.
fn fs_ioctl(root: &File, request: u64) -> Result<(), Errno> {
    // SAFETY: the kernel ignores the argument (ioctl_fsfreeze(2)).
    Errno::result(unsafe { libc::ioctl(root.as_raw_fd(), request as _, 0) }).map(drop)
}
