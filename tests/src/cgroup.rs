//! The cgroups of a private containerd's containers, found by the token in their names.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

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

/// Removes the cgroups of containers with `token` in their ids.
pub fn remove(token: &str) {
    for folder in find(token).iter().rev() {
        // A cgroup that is in use or already gone is no longer ours to remove.
        let _ = fs::remove_dir(folder);
    }
}

/// The number in the first of these files that one of a container's cgroups has; none if it is unlimited.
pub fn limit(id: &str, files: &[&str]) -> Result<Option<u64>> {
    let groups = find(id);
    let mut found = groups.iter().flat_map(|group| files.iter().map(move |file| group.join(file)));
    let file = found.find(|file| file.exists()).with_context(|| format!("no cgroup of {id} has one of {files:?}"))?;
    let text = fs::read_to_string(&file)?;
    let number = text.split_whitespace().next().unwrap_or_default().parse().ok();
    // cgroup v1 has a huge number for no limit of memory.
    Ok(number.filter(|number| *number < 1 << 50))
}
