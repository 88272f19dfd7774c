//! Roots that consist of the host's folders, and of overlays of them.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::PathBuf;

use containerd_shim_protos::types::mount::Mount;

use super::options::NewFolder;
use super::part::{Kind, Part};
use super::root::HostRoot;
use crate::config::problem::Problem;

/// Why a folder that a mount requires cannot be created.
#[derive(Debug, thiserror::Error)]
#[error("X-containerd.mkdir.path: create {}", path.display())]
pub(crate) struct FolderError {
    path: PathBuf,
    source: io::Error,
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
