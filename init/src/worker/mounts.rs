//! Adapts a spec's mounts to libcontainer, so that they end up where runc would mount them.
//!
//! - Destinations may contain `..` and links whose targets do not exist; libcontainer rejects both.
//! - A tmpfs keeps the mode of the folder that it covers, unless the spec sets one.
//! - A tmpfs with `tmpcopyup` is filled by [`super::copy_up`] and then bound.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use husk_protos::SHARE_PATH;
use husk_protos::chain::Chain;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, fstat};
use oci_spec::runtime::Mount;
use pathrs::Root;
use pathrs::flags::OpenFlags;

use crate::error::{CallError, FailureKind};
use crate::paths;

/// As many links as the kernel follows in one path (path_resolution(7)).
const LINKS_MAX: usize = 40;
const COPY_UP: &str = "tmpcopyup";

/// A tmpfs that begins with the contents of the folder that it covers.
#[derive(Debug)]
pub(super) struct CopyUp {
    /// Index in the spec's mounts.
    pub(super) index: usize,
    /// Where the container sees it.
    pub(super) destination: PathBuf,
    /// The folder in the guest, opened with `O_PATH`, if there is anything to copy. Not its path: other containers may
    /// be able to replace the folder by a link.
    pub(super) from: Option<OwnedFd>,
    /// The options of the filesystem.
    pub(super) data: Vec<String>,
}

/// Mounts the sources that are in the share in PID 1's mount namespace, which this process uses. The kernel mounts them
/// when a path leads into them. If it did so in the namespace of each container, every container would see a filesystem
/// of its own, without the others' locks, sockets and pages.
pub(super) fn mount_sources(mounts: &[Mount]) -> Result<(), CallError> {
    let bound = mounts.iter().filter(|mount| is_bind(mount)).filter_map(|mount| mount.source().as_deref());
    for source in bound.filter(|source| source.starts_with(SHARE_PATH)) {
        match open(source, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
            // The source is a file, which belongs to the share's own filesystem.
            Ok(_) | Err(Errno::ENOTDIR) => {}
            Err(error) => return Err(CallError::internal(format_args!("mounts: open {}", source.display()), &error)),
        }
    }
    Ok(())
}

/// Makes the kernel mount what the host has mounted at folders of the share, which the host has named in the bundle. They
/// stay mounted as long as the descriptors exist.
pub(super) fn mount_below(bundle: &Path) -> Result<Vec<OwnedFd>, CallError> {
    let file = bundle.join(paths::MOUNTS_BELOW);
    let folders = match fs::read(&file) {
        Ok(folders) => folders,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(CallError::internal(format_args!("read {}", file.display()), &error)),
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    // What cannot be opened is a file, or hidden by another mount, or broken on the host: then the container's own access
    // fails too.
    let folders = folders.split(|byte| *byte == 0).map(|folder| Path::new(OsStr::from_bytes(folder)));
    Ok(folders.filter_map(|folder| open(folder, flags, Mode::empty()).ok()).collect())
}

/// Adapts the mounts of a container with the root folder `root`. `fill` makes and fills a tmpfs, and returns its path.
/// Returns whether anything has changed.
pub(super) fn adapt(
    mounts: &mut [Mount],
    root: &Path,
    mut fill: impl FnMut(&CopyUp) -> Result<PathBuf, CallError>,
) -> Result<bool, CallError> {
    let mut changed = false;
    let mut view = View { root, mounts: Vec::new() };
    for (index, mount) in mounts.iter_mut().enumerate() {
        // libcontainer insists that these two are mounted on folders that no link leads to (CVE-2019-19921).
        if !matches!(mount.typ().as_deref(), Some("proc" | "sysfs")) {
            let destination = view.resolve(mount.destination());
            changed |= destination.as_os_str() != mount.destination().as_os_str();
            mount.set_destination(destination);
        }
        if mount.typ().as_deref() == Some("tmpfs") && !is_bind(mount) {
            changed |= adapt_tmpfs(index, mount, &view, &mut fill)?;
        }
        let shown = if is_bind(mount) { mount.source().clone() } else { None };
        if shown.as_ref().is_some_and(|source| !source.is_dir()) {
            view.create_file(mount.destination());
        }
        view.mounts.push((mount.destination().clone(), shown));
    }
    Ok(changed)
}

fn adapt_tmpfs(
    index: usize,
    mount: &mut Mount,
    view: &View<'_>,
    fill: &mut impl FnMut(&CopyUp) -> Result<PathBuf, CallError>,
) -> Result<bool, CallError> {
    let mut options = mount.options().clone().unwrap_or_default();
    let mut changed = false;
    let failed = |error: Errno| {
        let what = format!("mounts[{index}] {}: open the folder: {}", mount.destination().display(), Chain(&error));
        CallError::new(FailureKind::Internal, what)
    };
    let folder = view.open_folder(mount.destination()).map_err(failed)?;
    if let Some(folder) = &folder
        && !options.iter().any(|option| option.starts_with("mode="))
    {
        options.push(format!("mode={:o}", fstat(folder).map_err(failed)?.st_mode & 0o7777));
        changed = true;
    }
    if options.iter().any(|option| option == COPY_UP) {
        options.retain(|option| option != COPY_UP);
        let data: Vec<String> = options.iter().filter(|option| is_data(option)).cloned().collect();
        let destination = mount.destination().clone();
        let source = fill(&CopyUp { index, destination, from: folder, data: data.clone() })?;
        options.retain(|option| !data.contains(option));
        options.push("bind".into());
        mount.set_typ(Some("bind".into())).set_source(Some(source));
        changed = true;
    }
    mount.set_options(Some(options));
    Ok(changed)
}

/// Whether libcontainer would pass an option to the filesystem.
fn is_data(option: &str) -> bool {
    let mut probe = Mount::default();
    probe.set_options(Some(vec![option.to_owned()]));
    libcontainer::rootfs::utils::parse_mount(&probe).is_ok_and(|parsed| !parsed.data.is_empty())
}

fn is_bind(mount: &Mount) -> bool {
    libcontainer::rootfs::utils::is_bind(mount)
}

/// What the container will see.
struct View<'a> {
    root: &'a Path,
    /// The mounts so far: where, and which file or folder of the guest. None for a filesystem of the kernel.
    mounts: Vec<(PathBuf, Option<PathBuf>)>,
}

impl View<'_> {
    /// Where the guest finds a file of the container, unless it is in a filesystem that is not mounted yet. `path`
    /// contains no links.
    fn locate(&self, path: &Path) -> Option<PathBuf> {
        let (base, rest) = self.split(path)?;
        // Without the slash that a join with an empty path would add.
        Some(if rest.as_os_str().is_empty() { base.to_owned() } else { base.join(rest) })
    }

    /// Splits a path of the container into a folder of the guest, which no container can replace, and the path from
    /// there.
    fn split<'p>(&self, path: &'p Path) -> Option<(&Path, &'p Path)> {
        // A later mount covers earlier ones.
        for (destination, shown) in self.mounts.iter().rev() {
            if let Ok(rest) = path.strip_prefix(destination) {
                return shown.as_ref().map(|folder| (folder.as_path(), rest));
            }
        }
        Some((self.root, path.strip_prefix("/").unwrap_or(path)))
    }

    /// Opens a folder of the container with `O_PATH`, if there is one. `path` contains no links. If another container
    /// has put one there since, it is not followed: it could lead to any folder of the guest.
    fn open_folder(&self, path: &Path) -> Result<Option<OwnedFd>, Errno> {
        let Some((base, rest)) = self.split(path) else { return Ok(None) };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let rest = if rest.as_os_str().is_empty() { Path::new(".") } else { rest };
        match open(base, flags, Mode::empty()).and_then(|base| openat2(base, rest, how)) {
            Ok(folder) => Ok(Some(folder)),
            // libcontainer reports what it cannot mount on.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates the mount point for a file, unless it exists, with the mode that runc gives it. libcontainer would choose
    /// another one, and it stays in the root filesystem.
    fn create_file(&self, path: &Path) {
        let Some((base, rest)) = self.split(path) else { return };
        let created = Root::open(base).and_then(|root| {
            root.mkdir_all(rest.parent().unwrap_or(rest), &Permissions::from_mode(0o755))?;
            root.create_file(rest, OpenFlags::O_EXCL | OpenFlags::O_NOFOLLOW, &Permissions::from_mode(0o755))
        });
        if let Err(error) = created {
            // Mostly because it exists. If it does not, libcontainer fails and reports why.
            tracing::debug!(path = %path.display(), error = %Chain(&error), "no mount point created");
        }
    }

    /// Follows the links of a path inside the container, whether their targets exist or not. `..` does not lead out of
    /// the root.
    fn resolve(&self, path: &Path) -> PathBuf {
        let mut rest: VecDeque<OsString> = parts(path);
        let (mut resolved, mut links) = (PathBuf::from("/"), 0);
        while let Some(part) = rest.pop_front() {
            if part == ".." {
                resolved.pop();
                continue;
            }
            let next = resolved.join(part);
            match self.locate(&next).and_then(|path| fs::read_link(path).ok()) {
                Some(target) if links < LINKS_MAX => {
                    links += 1;
                    if target.is_absolute() {
                        resolved = PathBuf::from("/");
                    }
                    for part in parts(&target).into_iter().rev() {
                        rest.push_front(part);
                    }
                }
                // With too many links, libcontainer reports the kernel's error.
                _ => resolved = next,
            }
        }
        resolved
    }
}

/// The names in a path, including `..`.
fn parts(path: &Path) -> VecDeque<OsString> {
    let part = |component: Component<'_>| match component {
        Component::Normal(_) | Component::ParentDir => Some(component.as_os_str().to_owned()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use serde_json::{Value, json};

    use super::*;

    fn mount(value: Value) -> Mount {
        serde_json::from_value(value).unwrap()
    }

    fn no_copy(copy: &CopyUp) -> Result<PathBuf, CallError> {
        panic!("{copy:?}")
    }

    #[test]
    fn destinations_are_resolved_inside_the_container() {
        let root = tempfile::tempdir().unwrap();
        let volume = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        for (link, target) in [
            ("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
            ("up", "../../../../outside"),
            ("var-run", "/run"),
            ("loop", "loop"),
            ("proc", "etc"),
            ("data-link", "/data/inner/file"),
        ] {
            symlink(target, root.path().join(link)).unwrap();
        }
        symlink("/elsewhere", volume.path().join("inner")).unwrap();
        let mut mounts = vec![
            mount(json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs"})),
            mount(json!({"destination": "/data", "type": "bind", "source": volume.path()})),
        ];
        let table = [
            ("/etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf"),
            ("/up/x", "/outside/x"),
            ("/var-run/x", "/run/x"),
            ("/etc/../a/./b/../c", "/a/c"),
            ("relative/../../x", "/x"),
            ("/new/file", "/new/file"),
            ("/loop/x", "/loop/x"),
            // A mount of the container hides the root's files, and shows its own.
            ("/data-link", "/elsewhere/file"),
            ("/", "/"),
        ];
        mounts.extend(table.map(|(given, _)| mount(json!({"destination": given, "type": "bind", "source": "/x"}))));
        assert!(adapt(&mut mounts, root.path(), no_copy).unwrap());
        for ((given, expected), mount) in table.iter().zip(&mounts[2..]) {
            assert_eq!(mount.destination(), Path::new(expected), "{given}");
        }
        // libcontainer has to see the link.
        let mut proc = vec![mount(json!({"destination": "/proc", "type": "proc", "source": "proc"}))];
        assert!(!adapt(&mut proc, root.path(), no_copy).unwrap());
    }

    #[test]
    fn a_tmpfs_keeps_the_mode_of_an_existing_folder() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("cache");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(0o2750)).unwrap();
        let table = [
            ("/cache", json!(null), json!(["mode=2750"])),
            ("/cache", json!(["ro", "mode=700"]), json!(["ro", "mode=700"])),
            ("/absent", json!(["ro"]), json!(["ro"])),
        ];
        for (destination, options, expected) in table {
            let mut mounts =
                [mount(json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options}))];
            adapt(&mut mounts, root.path(), no_copy).unwrap();
            assert_eq!(serde_json::to_value(mounts[0].options()).unwrap(), expected, "{destination} {options}");
        }
    }

    #[test]
    fn a_tmpfs_that_copies_is_filled_first_and_then_bound() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::set_permissions(root.path().join("etc"), Permissions::from_mode(0o755)).unwrap();
        let options = json!(["tmpcopyup", "ro", "size=1m", "sync=1", "rprivate", "rnosymfollow"]);
        let mut mounts = vec![
            mount(json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": options})),
            mount(json!({"destination": "/no", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]})),
        ];
        let mut copies = Vec::new();
        let fill = |copy: &CopyUp| {
            copies.push((copy.from.as_ref().map(|folder| fstat(folder).unwrap().st_ino), copy.data.clone()));
            Ok(PathBuf::from(format!("/filled/{}", copy.index)))
        };
        assert!(adapt(&mut mounts, root.path(), fill).unwrap());
        let data = ["size=1m", "sync=1", "mode=755"].map(str::to_owned).to_vec();
        let etc = fs::metadata(root.path().join("etc")).unwrap().ino();
        assert_eq!(copies, [(Some(etc), data), (None, vec![])]);
        let expected = json!({
            "destination": "/etc", "type": "bind", "source": "/filled/0",
            "options": ["ro", "rprivate", "rnosymfollow", "bind"]
        });
        assert_eq!(serde_json::to_value(&mounts[0]).unwrap(), expected);
    }

    #[test]
    fn a_folder_that_another_container_replaces_by_a_link_is_not_opened() {
        let (root, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(volume.path().join("sub/deep")).unwrap();
        let view = View { root: root.path(), mounts: vec![("/data".into(), Some(volume.path().to_owned()))] };
        // What `resolve` has returned for a folder that was still one.
        let opened = |path: &str| view.open_folder(Path::new(path)).unwrap();
        let inode = |folder: OwnedFd| fstat(folder).unwrap().st_ino;
        let expected = |path: &str| Some(fs::metadata(volume.path().join(path)).unwrap().ino());
        for (path, of) in [("/data", ""), ("/data/sub", "sub"), ("/data/sub/deep", "sub/deep")] {
            assert_eq!(opened(path).map(inode), expected(of), "{path}");
        }
        fs::rename(volume.path().join("sub"), volume.path().join("aside")).unwrap();
        for target in ["/", "..", "aside"] {
            symlink(target, volume.path().join("sub")).unwrap();
            assert!(opened("/data/sub").is_none(), "{target}");
            assert!(opened("/data/sub/deep").is_none(), "{target}");
            fs::remove_file(volume.path().join("sub")).unwrap();
        }
        fs::write(volume.path().join("sub"), "").unwrap();
        assert!(opened("/data/sub").is_none());
    }
}
