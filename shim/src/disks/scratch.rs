//! A file without a name for data that ends with the VM: nothing of it remains, however the VM ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::format::{FormatError, ext4};
use super::image::Image;

/// Why there is no scratch disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScratchError {
    /// The file cannot be created.
    #[error("create a scratch file in {}", folder.display())]
    Create { folder: PathBuf, source: io::Error },
    /// It has no filesystem.
    #[error("format a scratch file")]
    Format(#[from] FormatError),
}

/// Creates an image with an ext4 filesystem of this size in `folder`. It takes as much of the host's disk as is written.
///
/// # Errors
/// See [`ScratchError`].
pub(crate) async fn create(folder: &Path, mib: u64) -> Result<Image, ScratchError> {
    let failed = |source| ScratchError::Create { folder: folder.to_owned(), source };
    let create = || {
        let file = File::options().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(folder)?;
        file.set_len(mib << 20)?;
        Image::private(file, folder)
    };
    let image = create().map_err(failed)?;
    ext4(&image).await?;
    Ok(image)
}
