//! What a plan needs to know of the host.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::config::verity::Verity;

/// What the plan needs to know of the host.
pub(crate) struct HostView<'a> {
    /// Whether a path leads to a block device or a regular file.
    pub(crate) is_image: &'a dyn Fn(&Path) -> bool,
    /// Whether the host uses a block device, for example because it has mounted it.
    pub(crate) is_busy: &'a dyn Fn(&Path) -> bool,
    /// The hash tree that a file with containerd's metadata describes; none if there is no such file.
    pub(crate) verity: &'a dyn Fn(&Path) -> Result<Option<Verity>, String>,
}

impl HostView<'static> {
    /// The host itself.
    pub(crate) fn of_host() -> Self {
        Self { is_image: &is_image, is_busy: &is_busy, verity: &Verity::of_containerd }
    }
}

/// Whether a path leads to a block device or a regular file.
fn is_image(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_block_device())
}

/// Whether the host uses a block device, for example because it has mounted it. open(2): with O_EXCL, opening such a
/// device fails.
fn is_busy(path: &Path) -> bool {
    let is_device = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let open = || OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path);
    is_device && open().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}
