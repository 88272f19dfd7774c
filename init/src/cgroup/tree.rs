//! Walks the groups below a container's group. The container controls them: they may be arbitrarily deep or threaded,
//! and may change during the walk.
//!
//! A walk holds one open directory and the names that it has yet to visit, never a path: the kernel limits a path to
//! PATH_MAX, but not the depth of a tree. [`DESCENDANTS_MAX`] bounds the number of groups.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::file::is_gone;

/// Limit of the groups below a container's group (`cgroup.max.descendants`), unless the spec's `unified` overrides it.
/// A Kubernetes node with 250 pods, run in a container, has about a thousand. Visiting a group takes PID 1 0.14 ms
/// under TCG, so a walk delays the guest's other containers by 0.6 s at most.
const DESCENDANTS_MAX: &str = "4096";

/// Limits the number of groups below a group. A container with a cgroup namespace cannot lift the limit: with
/// `nsdelegate` it cannot write this file of its namespace's root (cgroup-v2.rst, "Delegation Containment").
pub(crate) fn limit(group: &Path) -> io::Result<()> {
    std::fs::write(group.join("cgroup.max.descendants"), DESCENDANTS_MAX)
}

/// The open directory of a group.
pub(super) struct Group(Dir);

impl Group {
    fn open(at: impl AsFd, name: &(impl nix::NixPath + ?Sized)) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(Self(Dir::openat(at, name, flags, Mode::empty())?))
    }

    fn enter(&self, name: &CStr) -> io::Result<Self> {
        Self::open(&self.0, name)
    }

    /// Reads one of the group's files.
    pub(super) fn read(&self, file: &str) -> io::Result<String> {
        let mut text = String::new();
        let file = openat(&self.0, file, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }

    /// The names of the groups directly below.
    fn children(&mut self) -> impl Iterator<Item = nix::Result<CString>> {
        let named = |entry: &nix::dir::Entry| !matches!(entry.file_name().to_bytes(), b"." | b"..");
        self.0.iter().filter_map(move |entry| match entry {
            Ok(entry) => {
                (entry.file_type() == Some(Type::Directory) && named(&entry)).then(|| Ok(entry.file_name().into()))
            }
            Err(error) => Some(Err(error)),
        })
    }
}

/// Calls `visitor` for a group and all groups below it, parents first. Skips groups that disappear during the walk; the
/// first group must exist.
pub(super) fn visit(group: &Path, mut visitor: impl FnMut(&Group) -> io::Result<()>) -> io::Result<()> {
    let mut at = Group::open(AT_FDCWD, group)?;
    visitor(&at)?;
    // For each level down to the current one: the groups that are yet to be visited.
    let mut pending: Vec<Vec<CString>> = vec![at.children().collect::<Result<_, _>>()?];
    while let Some(level) = pending.last_mut() {
        let Some(name) = level.pop() else {
            pending.pop();
            if !pending.is_empty() {
                // Works for a removed directory too: while it is open, it keeps its parent.
                at = at.enter(c"..")?;
            }
            continue;
        };
        let entered = at.enter(&name).and_then(|mut group| {
            visitor(&group)?;
            let children = group.children().collect::<Result<_, _>>()?;
            Ok((group, children))
        });
        match entered {
            Ok((group, children)) => {
                at = group;
                pending.push(children);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes a group and all groups below it, children first. Yields between steps, and may be cancelled at any time.
///
/// # Errors
/// `ResourceBusy` when a group contains processes.
pub(super) async fn remove(group: &Path) -> io::Result<()> {
    let mut at = Group::open(AT_FDCWD, group)?;
    let mut path: Vec<CString> = Vec::new();
    loop {
        tokio::task::yield_now().await;
        let first = at.children().next().transpose()?;
        match (first, path.pop()) {
            (Some(name), above) => {
                path.extend(above);
                at = at.enter(&name)?;
                path.push(name);
            }
            (None, Some(name)) => {
                at = at.enter(c"..")?;
                match unlinkat(&at.0, name.as_c_str(), UnlinkatFlags::RemoveDir) {
                    Ok(()) | Err(Errno::ENOENT) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            (None, None) => return std::fs::remove_dir(group),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Creates a chain of directories whose path exceeds PATH_MAX, each with `width` siblings.
    fn create_deep(top: &Path, depth: usize, width: usize) {
        let name = CString::new("d".repeat(200)).unwrap();
        let mut at = Group::open(AT_FDCWD, top).unwrap();
        for _ in 0..depth {
            for sibling in 0..width {
                nix::sys::stat::mkdirat(&at.0, sibling.to_string().as_str(), Mode::S_IRWXU).unwrap();
            }
            nix::sys::stat::mkdirat(&at.0, name.as_c_str(), Mode::S_IRWXU).unwrap();
            at = at.enter(&name).unwrap();
        }
    }

    #[tokio::test]
    async fn trees_deeper_than_path_max_are_visited_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("top");
        fs::create_dir(&top).unwrap();
        create_deep(&top, 100, 1);
        let count = || {
            let mut count = 0;
            visit(&top, |_| {
                count += 1;
                Ok(())
            })
            .unwrap();
            count
        };
        assert_eq!(count(), 1 + 100 * 2);
        remove(&top).await.unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn a_group_that_disappears_during_the_walk_is_skipped() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a/b", "c/d"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        let mut visited = 0;
        visit(folder.path(), |_| {
            visited += 1;
            if visited == 2 {
                // Remove both, whichever of the two the walk is in.
                fs::remove_dir_all(folder.path().join("a"))?;
                fs::remove_dir_all(folder.path().join("c"))?;
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(visited, 2);
        let absent = visit(&folder.path().join("a"), |_| Ok(())).unwrap_err();
        assert!(is_gone(&absent));
    }

    #[tokio::test]
    async fn a_busy_group_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("top");
        fs::create_dir_all(top.join("a")).unwrap();
        // A plain file stands in for a process: its directory cannot be removed either.
        fs::write(top.join("a/process"), "").unwrap();
        remove(&top).await.unwrap_err();
        assert!(top.join("a/process").exists());
    }
}
