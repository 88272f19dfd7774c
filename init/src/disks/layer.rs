//! What lies between a disk and its filesystem: nothing, or a hash tree.

use std::fs::File;
use std::io;

use husk_protos::disks::DiskMount;

use super::mapper::Mapped;
use super::{corruption, verity};

/// Sets up what a request asks for over a disk, whose device is open. The new device's name is the disk's serial. A failure
/// leaves nothing behind.
///
/// # Errors
/// The disk has no valid hash tree, or the kernel rejects the device.
pub(super) fn set_up(
    serial: &str,
    device: &File,
    (numbers, bytes): (&str, u64),
    mount: &DiskMount,
) -> io::Result<Option<Mapped>> {
    let Some(verity) = mount.verity.as_ref() else { return Ok(None) };
    corruption::watch();
    Mapped::create(serial, &verity::target(device, numbers, bytes, verity)?).map(Some)
}
