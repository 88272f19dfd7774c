//! The groups below a container's, which are its own to make: as deep as it likes, threaded, and others from one moment to the next.
//!
//! A walk holds one open folder and the names that are still before it, never a path: a path of the kernel's ends at PATH_MAX, a tree does not.
//! [`DESCENDANTS_MAX`] bounds how many there are.

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

use super::is_gone;

/// Groups below a container's own (`cgroup.max.descendants`), unless its spec's `unified` says otherwise. A Kubernetes node with 250 pods, run in
/// a container, has some thousand. PID 1 looks at each in 0.14 ms under TCG, so that all containers of the guest wait 0.6 s for it at most.
pub const DESCENDANTS_MAX: &str = "4096";

/// Limits what may be made below a group. With a cgroup namespace its container cannot take that back: the file of the namespace's root is not
/// among those that `nsdelegate` leaves to it (cgroup-v2.rst, "Delegation Containment").
pub fn limit(group: &Path) -> io::Result<()> {
    std::fs::write(group.join("cgroup.max.descendants"), DESCENDANTS_MAX)
}

/// The open folder of a group.
pub struct Group(Dir);

impl Group {
    fn open(at: impl AsFd, name: &(impl nix::NixPath + ?Sized)) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(Self(Dir::openat(at, name, flags, Mode::empty())?))
    }

    fn enter(&self, name: &CStr) -> io::Result<Self> {
        Self::open(&self.0, name)
    }

    /// What is in one of its files.
    pub fn read(&self, file: &str) -> io::Result<String> {
        let mut text = String::new();
        let file = openat(&self.0, file, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }

    /// The names of the groups in it.
    fn below(&mut self) -> impl Iterator<Item = nix::Result<CString>> {
        let named = |entry: &nix::dir::Entry| !matches!(entry.file_name().to_bytes(), b"." | b"..");
        self.0.iter().filter_map(move |entry| match entry {
            Ok(entry) => {
                (entry.file_type() == Some(Type::Directory) && named(&entry)).then(|| Ok(entry.file_name().into()))
            }
            Err(error) => Some(Err(error)),
        })
    }
}

/// Shows a group and all below it to `look`, each before those in it. One that goes meanwhile is left out; the first has to be there.
pub fn visit(group: &Path, mut look: impl FnMut(&Group) -> io::Result<()>) -> io::Result<()> {
    let mut at = Group::open(AT_FDCWD, group)?;
    look(&at)?;
    // Of each level from the first to where the walk is: the groups whose turn is still to come.
    let mut before: Vec<Vec<CString>> = vec![at.below().collect::<Result<_, _>>()?];
    while let Some(level) = before.last_mut() {
        let Some(name) = level.pop() else {
            before.pop();
            if !before.is_empty() {
                // Also out of a folder that is removed: it keeps its parent as long as it is open.
                at = at.enter(c"..")?;
            }
            continue;
        };
        let below = at.enter(&name).and_then(|mut group| {
            look(&group)?;
            let below = group.below().collect::<Result<_, _>>()?;
            Ok((group, below))
        });
        match below {
            Ok((group, below)) => {
                at = group;
                before.push(below);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes a group without members, and all below it, each after those in it. Lets others run in between, and may be given up at any time.
///
/// # Errors
/// `ResourceBusy` when one of them has members.
pub async fn remove(group: &Path) -> io::Result<()> {
    let mut at = Group::open(AT_FDCWD, group)?;
    let mut path: Vec<CString> = Vec::new();
    loop {
        tokio::task::yield_now().await;
        let first = at.below().next().transpose()?;
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

    /// A chain of folders whose path is longer than any that the kernel takes, with `width` others beside each.
    fn deep(top: &Path, depth: usize, width: usize) {
        let name = CString::new("d".repeat(200)).unwrap();
        let mut at = Group::open(AT_FDCWD, top).unwrap();
        for _ in 0..depth {
            for other in 0..width {
                nix::sys::stat::mkdirat(&at.0, other.to_string().as_str(), Mode::S_IRWXU).unwrap();
            }
            nix::sys::stat::mkdirat(&at.0, name.as_c_str(), Mode::S_IRWXU).unwrap();
            at = at.enter(&name).unwrap();
        }
    }

    #[tokio::test]
    async fn trees_deeper_than_a_path_are_seen_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("top");
        fs::create_dir(&top).unwrap();
        deep(&top, 100, 1);
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
    fn a_group_that_goes_while_it_is_looked_at_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a/b", "c/d"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        let mut seen = 0;
        visit(folder.path(), |_| {
            seen += 1;
            if seen == 2 {
                // Whichever of the two it is in, neither is there any more.
                fs::remove_dir_all(folder.path().join("a"))?;
                fs::remove_dir_all(folder.path().join("c"))?;
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, 2);
        let absent = visit(&folder.path().join("a"), |_| Ok(())).unwrap_err();
        assert!(is_gone(&absent));
    }

    #[tokio::test]
    async fn what_is_busy_stays() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("top");
        fs::create_dir_all(top.join("a")).unwrap();
        // A plain file stands for members: the kernel refuses the removal of its folder.
        fs::write(top.join("a/member"), "").unwrap();
        remove(&top).await.unwrap_err();
        assert!(top.join("a/member").exists());
    }
}
