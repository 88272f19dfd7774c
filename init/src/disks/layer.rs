//! What lies between a disk and its filesystem: nothing, a hash tree, or an encryption.

use std::fs::File;
use std::io;

use husk_protos::disks::DiskMount;

use super::mapper::Mapped;
use super::{corruption, encrypted, verity};

/// Sets up what a request asks for over the disk `name`, whose device is open. The new device's name is the disk's serial.
/// A failure leaves nothing behind.
///
/// # Errors
/// The disk has no valid hash tree, or the kernel rejects the device.
pub(super) fn set_up(
    serial: &str,
    name: &str,
    device: &File,
    (numbers, bytes): (&str, u64),
    mount: &DiskMount,
) -> io::Result<Option<Mapped>> {
    match (mount.verity.as_ref(), mount.encryption.as_ref()) {
        (None, None) => Ok(None),
        (Some(verity), None) => {
            corruption::watch();
            Mapped::create(serial, &verity::target(device, numbers, bytes, verity)?).map(Some)
        }
        (None, Some(encryption)) => {
            let mapped = Mapped::create(serial, &encrypted::target(numbers, bytes)?)?;
            let encrypted = File::options().write(true).open(mapped.path());
            let done = encrypted.and_then(|encrypted| encrypted::encrypt(device, &encrypted, bytes, encryption));
            match done {
                Ok(()) => Ok(Some(mapped)),
                Err(error) => {
                    if let Err(error) = mapped.remove() {
                        tracing::error!(serial, %error, "failed to remove the encryption of a disk");
                    }
                    Err(io::Error::new(error.kind(), format!("encrypt /dev/{name}: {error}")))
                }
            }
        }
        (Some(_), Some(_)) => Err(io::Error::other("a disk cannot be both verified and encrypted")),
    }
}
