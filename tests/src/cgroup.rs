//! The cgroups of a private containerd's containers, found by the token in their names.

use std::path::{Path, PathBuf};

use crate::walk::walk;

/// Directories of all cgroup hierarchies at or below one whose name contains `token`, parents first.
pub fn find(token: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), &[], &mut |path, kind| {
        if kind == "folder" && path.to_string_lossy().contains(token) {
            found.push(path.to_path_buf());
        }
    });
    found
}
