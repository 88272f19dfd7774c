//! The extras disk: an image in memory. QEMU gets its descriptor; no other process sees it.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use husk_protos::extras::{self, SERIAL};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::files::OpenedFile;
use crate::vmm::Disk;

/// Why the extras disk cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image.
    #[error("create the extras disk")]
    Image(#[from] io::Error),
    /// A source file cannot be read any more.
    #[error("read {path:?}, the source of {destination:?} in the guest")]
    Read {
        /// The path on the host.
        path: std::path::PathBuf,
        /// The path in the guest.
        destination: String,
        /// The cause.
        source: io::Error,
    },
}

/// Writes the disk with these files. Returns none without files.
///
/// # Errors
///
/// When a file cannot be read or has shrunk since it was opened, or when memory runs out.
pub fn write(sources: &[OpenedFile]) -> Result<Option<Disk>, DiskError> {
    if sources.is_empty() {
        return Ok(None);
    }
    let mut image = File::from(memfd_create(c"husk-extras", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
    let entry = |source: &OpenedFile| extras::File {
        path: source.entry.destination.clone(),
        mode: source.entry.mode,
        size: source.size,
    };
    let head = extras::encode(&sources.iter().map(entry).collect::<Vec<_>>());
    image.write_all(&head)?;
    let mut at = extras::after(0, head.len() as u64).ok_or_else(too_large)?;
    for source in sources {
        image.seek(SeekFrom::Start(at))?;
        copy(source, &mut image).map_err(|error| DiskError::Read {
            path: source.entry.source.clone(),
            destination: source.entry.destination.clone(),
            source: error,
        })?;
        at = extras::after(at, source.size).ok_or_else(too_large)?;
    }
    // A disk has whole sectors: the guest would not see a partial last one.
    image.set_len(at)?;
    // QEMU opens the image itself, as its own user. That user must not change it.
    image.set_permissions(Permissions::from_mode(0o444))?;
    Ok(Some(Disk { serial: SERIAL.to_owned(), image: Arc::new(image) }))
}

fn too_large() -> io::Error {
    io::ErrorKind::FileTooLarge.into()
}

fn copy(source: &OpenedFile, image: &mut File) -> io::Result<()> {
    let mut file = &*source.file;
    // A failed boot may have read the file before.
    file.rewind()?;
    let copied = io::copy(&mut file.take(source.size), image)?;
    if copied < source.size {
        let why = format!("the file shrank from {} to {copied} bytes after it was checked", source.size);
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
    }
    Ok(())
}

/// Frees the memory of a disk that the guest has read: QEMU keeps the image open as long as the VM runs.
///
/// # Errors
///
/// When fallocate(2) fails.
pub(crate) fn give_back(disk: &Disk) -> io::Result<()> {
    let size = disk.image.metadata()?.len();
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(&*disk.image, hole, 0, size.try_into().map_err(io::Error::other)?)?)
}
