//! A file without a name for data that ends with the VM: nothing of it remains, however the VM ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::format::{EXT4, FormatError, Life, ext4, ext4_to_encrypt, find};
use super::image::Image;
use super::written;
use super::{GuestLayer, GuestMount};

/// Mount options of the filesystem. It ends with the VM: nothing has to reach the host's disk, an inode can be used again
/// as soon as its file is deleted (kernel-config/patches/ext4-throwaway.patch), and no table of inodes has to be cleared.
const MOUNT_OPTIONS: &str = "nobarrier,noinit_itable";

/// Why there is no scratch disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScratchError {
    /// The file cannot be created.
    #[error("create a scratch file in {}", folder.display())]
    Create { folder: PathBuf, source: io::Error },
    /// It has no filesystem.
    #[error("format a scratch file")]
    Format(#[from] FormatError),
    /// It cannot be encrypted.
    #[error("look for what is to be encrypted of a scratch file")]
    Written(#[source] io::Error),
}

/// Creates an image with an ext4 filesystem of this size in `folder`. It takes as much of the host's disk as is written.
/// Returns with it what the guest has to set up to encrypt it, if it is to be encrypted.
///
/// # Errors
/// See [`ScratchError`].
pub(crate) async fn create(
    folder: &Path,
    mib: u64,
    encrypted: bool,
) -> Result<(Image, Option<GuestLayer>), ScratchError> {
    let failed = |source| ScratchError::Create { folder: folder.to_owned(), source };
    let create = || {
        let file = File::options().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(folder)?;
        file.set_len(mib << 20)?;
        Image::private(file, folder)
    };
    let image = create().map_err(failed)?;
    if !encrypted {
        ext4(&image, Life::OfVm).await?;
        return Ok((image, None));
    }
    ext4_to_encrypt(&image).await?;
    let written = written::find(image.file()).map_err(ScratchError::Written)?;
    Ok((image, Some(GuestLayer::Encrypted { written })))
}

/// How the guest mounts an image that [`create`] has made with this layer.
pub(crate) fn mount(layer: Option<GuestLayer>) -> GuestMount {
    GuestMount { fs_type: "ext4".to_owned(), data: MOUNT_OPTIONS.to_owned(), layer, ..GuestMount::default() }
}

/// Whether the host has the program that [`create`] runs.
///
/// # Errors
/// It is missing.
pub(crate) fn check_host() -> Result<(), FormatError> {
    find(EXT4).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    /// What is encrypted must be all that the filesystem consists of: the rest decrypts to something random.
    #[tokio::test]
    async fn what_was_written_is_a_whole_filesystem_on_a_disk_with_anything() {
        for mib in [16, 300] {
            let folder = tempfile::tempdir().unwrap();
            let (image, layer) = create(folder.path(), mib, true).await.unwrap();
            let Some(GuestLayer::Encrypted { written }) = layer else { panic!("not encrypted") };
            let used = folder.path().join("used");
            let disk = File::options().read(true).write(true).create_new(true).open(&used).unwrap();
            let rubbish: Vec<u8> = (0..1 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            for at in 0..mib {
                disk.write_all_at(&rubbish, at << 20).unwrap();
            }
            for extent in &written {
                let mut part = vec![0; usize::try_from(extent.length).unwrap()];
                image.file().read_exact_at(&mut part, extent.offset).unwrap();
                disk.write_all_at(&part, extent.offset).unwrap();
            }
            let bytes: u64 = written.iter().map(|extent| extent.length).sum();
            assert!(bytes < 4 << 20, "{mib} MiB: {bytes} bytes are to be encrypted");
            let checked = Command::new("e2fsck").args(["-fn"]).arg(&used).output().unwrap();
            assert!(checked.status.success(), "{mib}: {}", String::from_utf8_lossy(&checked.stdout));
        }
    }
}
