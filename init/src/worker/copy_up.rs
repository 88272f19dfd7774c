//! `tmpcopyup`: a tmpfs that begins with the contents of the folder that it covers.
//!
//! libcontainer knows nothing of it. So the worker mounts the tmpfs, copies, and lets libcontainer bind it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use husk_protos::chain::Chain;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, chown, symlinkat};
use oci_spec::runtime::Spec;

use super::mounts::CopyUp;
use super::stage::Stage;
use super::user_namespace::{self, Kind};
use crate::attributes::Entry;
use crate::cgroup;
use crate::error::{CallError, FailureKind};

/// How deep the folders may be nested: each level takes descriptors and stack.
const DEPTH_MAX: usize = 100;

/// Bytes that are copied at once.
const BUFFER: usize = 16 * 1024;

/// A file or a folder was not copied.
#[derive(Debug, thiserror::Error)]
#[error("copy {}", path.display())]
struct CopyError {
    path: PathBuf,
    source: io::Error,
}

fn failed(path: &Path, source: impl Into<io::Error>) -> CopyError {
    CopyError { path: path.to_owned(), source: source.into() }
}

/// The guest's user and group.
type Ids = (Option<u32>, Option<u32>);

/// Makes and fills the filesystems of one container.
pub(super) struct Filler<'a> {
    pub(super) id: &'a str,
    /// The owner of a new tmpfs.
    pub(super) owner: Ids,
    pub(super) stage: Stage,
}

impl Filler<'_> {
    /// The guest's IDs of root of the container.
    pub(super) fn owner(spec: &Spec) -> io::Result<Ids> {
        Ok((user_namespace::in_guest(spec, Kind::User, 0)?, user_namespace::in_guest(spec, Kind::Group, 0)?))
    }

    /// Makes and fills a filesystem, and returns its path.
    pub(super) fn fill(&mut self, copy: &CopyUp) -> Result<PathBuf, CallError> {
        self.try_fill(copy).map_err(|error| {
            let (index, destination) = (copy.index, copy.destination.display());
            let what = format!("mounts[{index}] {destination}: tmpcopyup: {}", Chain(error.as_ref()));
            CallError::new(FailureKind::Internal, what)
        })
    }

    fn try_fill(&mut self, copy: &CopyUp) -> Result<PathBuf, Box<dyn std::error::Error>> {
        let path = self.stage.mount_point(copy.index)?;
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(copy.data.join(",").as_str()))?;
        let sets = |name: &str| copy.data.iter().any(|option| option.starts_with(name));
        let id = |id: Option<u32>, name: &str| id.filter(|_| !sets(name));
        chown(&path, id(self.owner.0, "uid=").map(Uid::from_raw), id(self.owner.1, "gid=").map(Gid::from_raw))?;
        if let Some(from) = &copy.from {
            // The container pays for the memory.
            std::fs::write(cgroup::of(self.id).join("cgroup.procs"), "0")?;
            let copied =
                File::open(&path).map_err(|error| failed(&path, error)).and_then(|to| copy_contents(from, &to.into()));
            std::fs::write(Path::new(cgroup::OWN).join("cgroup.procs"), "0")?;
            copied?;
        }
        Ok(path)
    }
}

/// Copies the contents of a folder, opened with `O_PATH`, into an empty one.
fn copy_contents(from: &OwnedFd, to: &OwnedFd) -> Result<(), CopyError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let from = openat(from, c".", flags, Mode::empty()).map_err(|e| failed(Path::new("."), e))?;
    copy_folder(&from, to, Path::new(""), DEPTH_MAX)
}

/// Copies the contents of a folder. Follows no links: other containers may be able to change the folder. `path` is
/// for messages.
fn copy_folder(from: &OwnedFd, to: &OwnedFd, path: &Path, depth: usize) -> Result<(), CopyError> {
    if depth == 0 {
        return Err(failed(path, Errno::ELOOP));
    }
    let mut entries = from.try_clone().and_then(|fd| Ok(Dir::from_fd(fd)?)).map_err(|e| failed(path, e))?;
    for entry in entries.iter() {
        let entry = entry.map_err(|e| failed(path, e))?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let path = path.join(name.to_string_lossy().as_ref());
        let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(|e| failed(&path, e))?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR {
            let folders = open_folders(from, to, name).map_err(|e| failed(&path, e))?;
            copy_folder(&folders.0, &folders.1, &path, depth - 1)?;
        } else {
            copy_file(from, to, name, &stat).map_err(|e| failed(&path, e))?;
        }
        copy_attributes(to, name, &stat).map_err(|e| failed(&path, e))?;
    }
    Ok(())
}

/// Makes a folder, and opens it and the one that it is a copy of.
fn open_folders(from: &OwnedFd, to: &OwnedFd, name: &std::ffi::CStr) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    mkdirat(to, name, Mode::S_IRWXU)?;
    Ok((openat(from, name, flags, Mode::empty())?, openat(to, name, flags, Mode::empty())?))
}

/// Copies anything but a folder.
fn copy_file(from: &OwnedFd, to: &OwnedFd, name: &std::ffi::CStr, stat: &FileStat) -> io::Result<()> {
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFLNK {
        return Ok(symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?);
    }
    if kind != SFlag::S_IFREG {
        return Ok(mknodat(to, name, kind, Mode::empty(), stat.st_rdev)?);
    }
    // O_NONBLOCK: the file may have been replaced by a FIFO.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let source = openat(from, name, flags, Mode::empty())?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let mut copy = File::from(openat(to, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
    // Not io::copy, which adds 10 KiB to the init.
    let mut buffer = [0; BUFFER];
    loop {
        match nix::unistd::read(&source, &mut buffer)? {
            0 => return Ok(()),
            length => copy.write_all(&buffer[..length])?,
        }
    }
}

/// Copies owner, mode and times. Nobody else can replace the new file by a link.
fn copy_attributes(to: &OwnedFd, name: &std::ffi::CStr, stat: &FileStat) -> io::Result<()> {
    let entry = Entry { folder: to, name };
    entry.set_owner_and_mode(stat)?;
    entry.set_times(stat)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn copy_between(from: &Path, to: &Path) -> Result<(), CopyError> {
        let from = nix::fcntl::open(from, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        copy_contents(&from, &File::open(to).unwrap().into())
    }

    #[test]
    fn a_copy_has_the_contents_the_modes_and_the_times() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("deep/er")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("deep/er/file"), "text").unwrap();
        fs::set_permissions(from.join("deep/er/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(from.join("deep"), fs::Permissions::from_mode(0o1705)).unwrap();
        symlink("/nowhere", from.join("deep/link")).unwrap();
        nix::unistd::mkfifo(&from.join("fifo"), Mode::from_bits_truncate(0o640)).unwrap();
        let modified = fs::metadata(from.join("deep")).unwrap().mtime_nsec();
        copy_between(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("deep/er/file")).unwrap(), "text");
        let mode = |path: &str| fs::symlink_metadata(to.join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("deep/er/file"), mode("deep"), mode("fifo")), (0o4751, 0o1705, 0o640));
        assert_eq!(fs::read_link(to.join("deep/link")).unwrap(), Path::new("/nowhere"));
        assert!(fs::symlink_metadata(to.join("fifo")).unwrap().file_type().is_fifo());
        assert_eq!(fs::metadata(to.join("deep")).unwrap().mtime_nsec(), modified);
    }

    #[test]
    fn a_copy_that_fails_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("a")).unwrap();
        fs::write(from.join("a/file"), "").unwrap();
        fs::create_dir(&to).unwrap();
        copy_between(&from, &to).unwrap();
        let error = copy_between(&from, &to).unwrap_err();
        assert!(Chain(&error).to_string().starts_with("copy a: File exists"), "{}", Chain(&error));
        let deep = folder.path().join("deep");
        fs::create_dir_all(deep.join("d/".repeat(DEPTH_MAX))).unwrap();
        fs::create_dir(folder.path().join("copy")).unwrap();
        let error = copy_between(&deep, &folder.path().join("copy")).unwrap_err();
        assert!(error.to_string().ends_with(&"/d".repeat(DEPTH_MAX - 1)), "{error}");
        assert_eq!(error.source.raw_os_error(), Some(libc::ELOOP));
    }
}
