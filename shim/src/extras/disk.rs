//! The disk on which extras travel: an image in memory, which QEMU gets by descriptor and nothing else ever sees.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use husk_protos::extras::{self, SERIAL};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::files::OpenedFile;
use crate::vmm::Disk;

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image.
    #[error("make the disk for extras: {0}")]
    Image(#[from] io::Error),
    /// A file that could be opened before.
    #[error("read {path:?}, which is to be {destination:?} in the guest: {source}")]
    Source {
        /// On the host.
        path: std::path::PathBuf,
        /// In the guest.
        destination: String,
        /// Why not.
        source: io::Error,
    },
}

/// Writes the disk with these files; none if there is no file.
///
/// # Errors
///
/// When one cannot be read, or has become shorter since it was opened; or when memory runs out.
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
        copy(source, &mut image).map_err(|error| DiskError::Source {
            path: source.entry.source.clone(),
            destination: source.entry.destination.clone(),
            source: error,
        })?;
        at = extras::after(at, source.size).ok_or_else(too_large)?;
    }
    // Whole sectors, or the last ones would not be there.
    image.set_len(at)?;
    // QEMU opens it by itself, as a user of its own, who may not change it.
    image.set_permissions(Permissions::from_mode(0o444))?;
    Ok(Some(Disk { serial: SERIAL.to_owned(), image: Arc::new(image) }))
}

fn too_large() -> io::Error {
    io::ErrorKind::FileTooLarge.into()
}

fn copy(source: &OpenedFile, image: &mut File) -> io::Result<()> {
    let mut file = &*source.file;
    // Another boot, that has failed, may have read it.
    file.rewind()?;
    let copied = io::copy(&mut file.take(source.size), image)?;
    if copied < source.size {
        let why = format!("it had {} bytes when it was checked, and has {copied} now", source.size);
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
    }
    Ok(())
}

/// Gives the memory of a disk back that has been read: QEMU holds the image as long as the VM lives.
///
/// # Errors
///
/// fallocate(2)'s.
pub fn give_back(disk: &Disk) -> io::Result<()> {
    let size = disk.image.metadata()?.len();
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(&*disk.image, hole, 0, size.try_into().map_err(io::Error::other)?)?)
}
