//! Roots that consist of the host's folders, and of overlays of them.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;

use super::part::{Kind, Part};
use super::{HostRoot, NewFolder};
use crate::config::problem::Problem;

/// Why a folder that a mount requires cannot be created.
#[derive(Debug, thiserror::Error)]
#[error("X-containerd.mkdir.path: create {}", path.display())]
pub(crate) struct FolderError {
    path: PathBuf,
    source: io::Error,
}

/// Whether a path leads to a block device or a regular file.
pub(super) fn is_image(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_block_device())
}

/// Whether the host uses a block device, for example because it has mounted it. open(2): with O_EXCL, opening such a
/// device fails.
pub(super) fn is_busy(path: &Path) -> bool {
    let is_device = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let open = || OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path);
    is_device && open().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// The root of mounts none of which is a disk. With transforms, the earlier mounts are only what the last one refers to.
pub(super) fn root(mounts: &[Mount], parts: Vec<Part>) -> Result<HostRoot, Problem> {
    if let Some(part) = parts.iter().find(|part| part.kind == Kind::Loop) {
        return Err(part.problem("type", &part.fs_type, "no mount of a filesystem refers to this image"));
    }
    let Some(part) = parts.into_iter().next_back().filter(|part| part.transformed) else {
        return Ok(HostRoot { mounts: mounts.to_vec(), folders: Vec::new() });
    };
    let folders = part.folders.into_iter().map(|folder| NewFolder {
        place: PathBuf::from(folder.place),
        mode: folder.mode,
        owner: folder.owner,
    });
    let folders = folders.collect();
    let mount = Mount { type_: part.fs_type, source: part.source, options: part.options, ..Default::default() };
    Ok(HostRoot { mounts: vec![mount], folders })
}

/// Creates the folders that do not exist. Like containerd's, they stay: they belong to the snapshot.
///
/// # Errors
/// When a folder cannot be created, or something else has its name.
pub(crate) fn create_folders(folders: &[NewFolder<PathBuf>]) -> Result<(), FolderError> {
    for folder in folders {
        let path = &folder.place;
        let create = || match DirBuilder::new().mode(folder.mode).create(path) {
            Ok(()) => {
                // Regardless of the umask.
                fs::set_permissions(path, Permissions::from_mode(folder.mode))?;
                chown(path, Some(folder.owner.0), Some(folder.owner.1))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            Err(error) => Err(error),
        };
        create().map_err(|source| FolderError { path: path.clone(), source })?;
    }
    Ok(())
}
