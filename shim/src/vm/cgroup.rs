//! The host cgroup that QEMU and virtiofsd live in: the one that the container's spec names, on cgroup v1, v2, and both
//! at once. No limit is set here: containerd's, the kubelet's and systemd's limits are on the parents, and the
//! container's own are applied in the guest.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::state::{Recorder, StateError, Step};

/// How often making a cgroup begins anew when another shim removes an empty parent at that very moment.
const CREATE_ATTEMPTS: u32 = 16;
/// The extended attribute of the cgroups that husk made. cgroupfs keeps `trusted.` ones, in both versions.
const MARK: &CStr = c"trusted.husk";

/// Why the cgroup could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Neither the form of cgroupfs nor of systemd.
    #[error("linux.cgroupsPath {0:?}: must be an absolute path without \"..\", or <name>.slice:<prefix>:<name>")]
    Path(String),
    /// The host's hierarchies could not be found.
    #[error("read /proc/self/mountinfo: {0}")]
    Mounts(io::Error),
    /// The cgroup could not be made.
    #[error("create cgroup {}: {source}", path.display())]
    Create {
        /// Its folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The step could not be written down.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Where this host has its cgroup hierarchies mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchies {
    roots: Vec<PathBuf>,
    unified: bool,
}

/// A cgroup in each of the host's hierarchies.
#[derive(Clone, Debug)]
pub struct HostCgroup {
    procs: Vec<PathBuf>,
}

impl HostCgroup {
    /// The files that a process joins by writing its pid into each, or 0 for itself.
    pub fn procs_files(&self) -> &[PathBuf] {
        &self.procs
    }
}

/// The spec's `linux.cgroupsPath` as a path below the hierarchies: as it is, or, in systemd's form
/// `slice:prefix:name`, as systemd lays its units out (`a-b.slice` lies in `a.slice`; systemd.slice(5)).
///
/// # Errors
/// [`CgroupError::Path`].
pub fn relative_path(cgroups_path: &str) -> Result<PathBuf, CgroupError> {
    let refused = || CgroupError::Path(cgroups_path.chars().take(4096).collect());
    let plain = |name: &str| !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    if let [slice, prefix, name] = cgroups_path.split(':').collect::<Vec<_>>()[..] {
        // runc's default when none is given, for root.
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let unit = match (prefix, name) {
            (_, name) if name.ends_with(".slice") => name.to_owned(),
            ("", name) => format!("{name}.scope"),
            (prefix, name) => format!("{prefix}-{name}.scope"),
        };
        if !plain(slice) || !plain(&unit) || name.is_empty() {
            return Err(refused());
        }
        return Ok(slice_path(slice).ok_or_else(refused)?.join(unit));
    }
    let path = cgroups_path.strip_prefix('/').ok_or_else(refused)?;
    let names: Vec<_> = path.split('/').filter(|name| !name.is_empty()).collect();
    if names.is_empty() || !names.iter().all(|name| plain(name)) {
        return Err(refused());
    }
    Ok(names.iter().collect())
}

/// `a-b-c.slice` is `a.slice/a-b.slice/a-b-c.slice`, and `-.slice` is the root.
fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut so_far = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        so_far = if so_far.is_empty() { part.to_owned() } else { format!("{so_far}-{part}") };
        path.push(format!("{so_far}.slice"));
    }
    Some(path)
}

impl Hierarchies {
    /// Finds the host's hierarchies.
    ///
    /// # Errors
    /// [`CgroupError::Mounts`].
    pub fn of_host() -> Result<Self, CgroupError> {
        fs::read_to_string("/proc/self/mountinfo").map(|text| Self::from_mountinfo(&text)).map_err(CgroupError::Mounts)
    }

    /// Reads mountinfo's lines (proc_pid_mountinfo(5)). A hierarchy without a controller that accounts something (systemd's
    /// own, on v1) is left out: its keeper would not expect foreign cgroups there.
    fn from_mountinfo(text: &str) -> Self {
        let mut roots: Vec<PathBuf> = Vec::new();
        let (mut v1, mut v2) = (false, false);
        for line in text.lines() {
            let Some((place, kind)) = line.split_once(" - ") else { continue };
            let (place, kind): (Vec<_>, Vec<_>) = (place.split(' ').collect(), kind.split(' ').collect());
            let (Some(&root), Some(&path), Some(&fs_type)) = (place.get(3), place.get(4), kind.first()) else {
                continue;
            };
            let wanted = match fs_type {
                "cgroup2" => {
                    v2 = true;
                    true
                }
                "cgroup" => {
                    v1 = true;
                    !kind.get(2).is_some_and(|options| options.split(',').any(|option| option.starts_with("name=")))
                }
                _ => false,
            };
            // A bind mount of a part of a hierarchy into some container's root is not the hierarchy.
            if wanted && root == "/" && !roots.iter().any(|known| known == Path::new(path)) {
                roots.push(path.into());
            }
        }
        Self { roots, unified: v2 && !v1 }
    }

    /// Whether the host has cgroup v2 alone.
    pub fn unified(&self) -> bool {
        self.unified
    }

    /// Makes the cgroup that the spec names, in every hierarchy. What was there before is used, and not removed in the end.
    ///
    /// # Errors
    /// When the path is malformed, or a cgroup cannot be made.
    pub(crate) fn create(&self, record: Recorder<'_>, cgroups_path: &str) -> Result<HostCgroup, CgroupError> {
        let relative = relative_path(cgroups_path)?;
        let mut procs = Vec::new();
        for root in &self.roots {
            let leaf = root.join(&relative);
            make(record, root, &leaf)?;
            procs.push(leaf.join("cgroup.procs"));
        }
        Ok(HostCgroup { procs })
    }
}

fn make(record: Recorder<'_>, root: &Path, leaf: &Path) -> Result<(), CgroupError> {
    // Those that another sandbox of husk made are recorded too: whichever of the two ends last removes them.
    let mut ours: Vec<PathBuf> = leaf
        .ancestors()
        .take_while(|path| *path != root)
        .filter(|path| !path.exists() || is_marked(path))
        .map(Into::into)
        .collect();
    ours.reverse();
    let steps = ours.iter().map(|path| match path == leaf {
        true => Step::Cgroup { path: path.clone() },
        false => Step::CgroupParent { path: path.clone() },
    });
    record(steps.collect())?;
    let mut result = Ok(());
    for _ in 0..CREATE_ATTEMPTS {
        result = fs::create_dir_all(leaf);
        match &result {
            // Another sandbox's end removed an empty parent in between.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            _ => break,
        }
    }
    result.map_err(|source| CgroupError::Create { path: leaf.into(), source })?;
    for path in &ours {
        mark(path).map_err(|source| CgroupError::Create { path: path.clone(), source })?;
    }
    inherit_cpuset(root, &ours)
}

fn path_for_c(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(Into::into)
}

/// Notes on the cgroup itself that husk made it.
fn mark(path: &Path) -> io::Result<()> {
    let path = path_for_c(path)?;
    // SAFETY: both strings end with a zero and outlive the call; an empty value is not read.
    let result = unsafe { libc::setxattr(path.as_ptr(), MARK.as_ptr(), std::ptr::null(), 0, 0) };
    Errno::result(result).map(drop).map_err(Into::into)
}

fn is_marked(path: &Path) -> bool {
    let Ok(path) = path_for_c(path) else { return false };
    // SAFETY: both strings end with a zero and outlive the call; a size of 0 means that no value is written.
    unsafe { libc::getxattr(path.as_ptr(), MARK.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

/// A new cpuset of v1 is empty, and joining it fails until it has processors and memory nodes.
fn inherit_cpuset(root: &Path, made: &[PathBuf]) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        // On v2 an empty file means the parent's, so it stays empty; v2 alone has the `.effective` ones in the root.
        if !root.join(file).exists() {
            continue;
        }
        for path in made {
            let copy = || -> io::Result<()> {
                let parent = path.parent().ok_or(io::ErrorKind::NotFound)?;
                match fs::read_to_string(path.join(file))?.trim().is_empty() {
                    true => fs::write(path.join(file), fs::read_to_string(parent.join(file))?.trim()),
                    false => Ok(()),
                }
            };
            copy().map_err(|source| CgroupError::Create { path: path.join(file), source })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::state::{Owner, State};

    #[test]
    fn paths_of_both_forms() {
        for (given, want) in [
            ("/default/x", Some("default/x")),
            ("/default//x/", Some("default/x")),
            ("/kubepods/burstable/pod1/abc", Some("kubepods/burstable/pod1/abc")),
            ("system.slice:docker:abc", Some("system.slice/docker-abc.scope")),
            (":cri-containerd:abc", Some("system.slice/cri-containerd-abc.scope")),
            ("-.slice:x:abc", Some("x-abc.scope")),
            ("a.slice::abc", Some("a.slice/abc.scope")),
            ("a.slice::b.slice", Some("a.slice/b.slice")),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope"),
            ),
            ("", None),
            ("/", None),
            ("default/x", None),
            ("/default/../x", None),
            ("/./x", None),
            ("a.slice:b", None),
            ("a:b:c", None),
            ("a--b.slice:x:y", None),
            ("a.slice:x:", None),
            ("a.slice:../x:y", None),
            ("a.slice:x:y:z", None),
        ] {
            assert_eq!(relative_path(given).ok(), want.map(PathBuf::from), "{given}");
        }
    }

    #[test]
    fn hierarchies_of_the_three_kinds_of_host() {
        let v2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let v1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                  40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
        let hybrid = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let bound = "90 31 0:29 /docker/x /run/x/sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let cpu = "/sys/fs/cgroup/cpu";
        for (text, roots, unified) in [
            (v2.to_owned(), vec!["/sys/fs/cgroup"], true),
            (format!("{v1}{bound}"), vec![cpu], false),
            (format!("{v1}{hybrid}{v1}"), vec![cpu, "/sys/fs/cgroup/unified"], false),
            ("nonsense\n".to_owned(), vec![], false),
        ] {
            let want = Hierarchies { roots: roots.into_iter().map(PathBuf::from).collect(), unified };
            assert_eq!(Hierarchies::from_mountinfo(&text), want, "{text}");
        }
    }

    #[test]
    fn a_cgroup_is_made_joined_and_removed_and_a_shared_parent_stays() {
        let base = tempfile::tempdir().unwrap();
        let mut states = ["s1", "s2"].map(|id| State::create(base.path(), "ns", id).unwrap());
        let host = Hierarchies::of_host().unwrap();
        assert!(!host.roots.is_empty());
        let [one, two] = [0, 1].map(|n| {
            let record = &mut |steps| states[n].record(&Owner::Sandbox, steps);
            host.create(record, &format!("/husk-test-cgroup/s{n}")).unwrap().procs
        });
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        for procs in &one {
            fs::write(procs, child.id().to_string()).unwrap();
            assert_eq!(fs::read_to_string(procs).unwrap().trim(), child.id().to_string(), "{}", procs.display());
        }
        let [first, second] = states;
        first.undo_all(Duration::from_secs(5)).unwrap();
        assert!(!child.wait().unwrap().success());
        let exists = |procs: &[PathBuf]| procs.iter().map(|p| p.parent().unwrap().exists()).collect::<Vec<_>>();
        assert_eq!(exists(&one), vec![false; one.len()]);
        assert_eq!(exists(&two), vec![true; two.len()]);
        second.undo_all(Duration::from_secs(5)).unwrap();
        let parents: Vec<_> = two.iter().map(|p| p.ancestors().nth(2).unwrap().to_path_buf()).collect();
        assert!(parents.iter().all(|p| !p.exists()), "{parents:?}");
    }
}
