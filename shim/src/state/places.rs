//! Where the directories of sandboxes are: `<state>/<namespace>/<sandbox>/`, or in the pool, with a link from there.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::error::{StateError, check_identifier, io_error};
use super::tree;

/// The directory of the waiting VMs, and their namespace until they have one. No namespace begins with a dot.
pub const POOL: &str = ".pool";

/// Where a sandbox's directory is, or the link to it.
pub(super) fn sandbox_dir(base: &Path, namespace: &str, sandbox: &str) -> Result<PathBuf, StateError> {
    check_identifier("namespace", namespace)?;
    check_identifier("sandbox id", sandbox)?;
    Ok(base.join(namespace).join(sandbox))
}

/// Whether there is a symbolic link at a path.
pub(super) fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())
}

/// The directory itself, if `dir` is a link into the pool.
pub(super) fn resolved(base: &Path, dir: PathBuf) -> PathBuf {
    let Ok(target) = fs::read_link(&dir) else { return dir };
    let parts: Vec<Component<'_>> = target.components().collect();
    match parts.as_slice() {
        [Component::ParentDir, Component::Normal(pool), Component::Normal(id)] if *pool == POOL => {
            base.join(POOL).join(id)
        }
        _ => dir,
    }
}

/// Removes a directory of sandboxes, unless there are others.
pub(super) fn remove_empty(dir: &Path) -> Result<(), StateError> {
    match fs::remove_dir(dir) {
        Err(e) if !tree::is_gone(&e) && e.kind() != io::ErrorKind::DirectoryNotEmpty => Err(io_error("remove", dir)(e)),
        _ => Ok(()),
    }
}
