//! Walks a directory tree.

use std::fs;
use std::path::{Path, PathBuf};

/// Visits everything below `folder` except the contents of `except`, parents first, without following links.
pub(crate) fn walk(folder: &Path, except: &[PathBuf], visit: &mut impl FnMut(&Path, &str)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        visit(&path, if kind.is_dir() { "folder" } else { "file" });
        if kind.is_dir() && !except.contains(&path) {
            walk(&path, except, visit);
        }
    }
}
