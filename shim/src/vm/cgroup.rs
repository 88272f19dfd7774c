//! The host cgroup of the VM's processes: the one that the container's spec names, on cgroup v1, v2 and hybrid hosts.
//! It carries the limits that the sandbox's containers ask for together, with an overhead, unless the kubelet limits the
//! pod's cgroup above it. The guest applies each container's own.
//!
//! The crate `cgroups-rs` (0.5) does not fit:
//!
//! - On a hybrid host it uses only the v1 hierarchies of the controllers that it knows. The v2 hierarchy gets no
//!   cgroup, while systemd's own one (`name=systemd`) does.
//! - On v2 its `create` writes every controller to `cgroup.subtree_control` of the root and of all parents. husk must
//!   not change cgroups that belong to systemd or the kubelet.
//! - It creates all directories at once, without reporting which of them are new. husk records an undo step for each
//!   before it creates it, and marks its own, so that a parent shared by several sandboxes goes with the last of them.
//! - Processes join by PID through a file that the crate opens for each call. A child of husk writes to an open
//!   `cgroup.procs` between fork and exec, so its first allocation is already charged to the cgroup.
//! - It depends on `zbus`, a D-Bus client that brings some forty crates.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use procfs::process::MountInfo;

use crate::host::cgroup::{self, LimitError, Limits, User, enable_controller, home, is_marked, mark, write_value};
use crate::host::process::ProcessId;
use crate::state::{Recorder, StateError, Step};

/// Attempts to create a cgroup. One fails if another shim removes an empty parent at the same time.
const CREATE_ATTEMPTS: u32 = 16;

/// Why the cgroup could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path has neither cgroupfs's nor systemd's form.
    #[error("linux.cgroupsPath {0:?}: must be a path without \"..\", or <name>.slice:<prefix>:<name>")]
    Path(String),
    /// The host's hierarchies could not be determined.
    #[error("read /proc/self/mountinfo")]
    Mounts(#[source] io::Error),
    /// A directory or one of its files could not be created or written.
    #[error("create cgroup {}", path.display())]
    Create {
        /// The directory or file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The host's kernel rejects a value.
    #[error("{field} {value:?}: write {}", path.display())]
    Rejected {
        /// The spec's field.
        field: &'static str,
        /// What the sandbox's containers ask for together.
        value: String,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A list names CPUs that the host does not have.
    #[error("{field} {value:?}: {why}")]
    NoCpus {
        /// The spec's field.
        field: &'static str,
        /// Its value.
        value: String,
        /// The reason.
        why: String,
    },
    /// A cgroup that must exist does not.
    #[error("no cgroup of this name exists")]
    Absent,
    /// An undo step could not be recorded.
    #[error(transparent)]
    State(#[from] StateError),
}

/// The mount points of the host's cgroup hierarchies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchies {
    roots: Vec<PathBuf>,
    unified: bool,
}

/// A kind of resource of the host that a cpuset divides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cpuset {
    /// The spec's field.
    pub(crate) field: &'static str,
    /// The file of a cgroup.
    file: &'static str,
}

/// Processors.
pub(crate) const CPUS: Cpuset = Cpuset { field: "linux.resources.cpu.cpus", file: "cpuset.cpus" };
/// Memory nodes.
pub(crate) const MEMS: Cpuset = Cpuset { field: "linux.resources.cpu.mems", file: "cpuset.mems" };

/// A sandbox's cgroup: one directory in each of the host's hierarchies.
#[derive(Clone, Debug)]
pub(crate) struct HostCgroup {
    procs: Vec<PathBuf>,
    user: User,
    /// The mount points of the hierarchies.
    roots: Vec<PathBuf>,
}

impl Hierarchies {
    /// Moves a process with all its descendants to the cgroups of this process.
    ///
    /// # Errors
    /// See [`home::bring`].
    pub(crate) fn bring(&self, process: ProcessId) -> io::Result<()> {
        let mut all = vec![process];
        let mut next = 0;
        while let Some(parent) = all.get(next) {
            all.extend(parent.children()?);
            next += 1;
        }
        home::bring(&all, &self.roots)
    }
}

impl HostCgroup {
    /// Opens the `cgroup.procs` files. A process joins by writing its PID, or 0 for itself, to each.
    ///
    /// # Errors
    /// A file cannot be opened.
    pub(crate) fn open(&self) -> io::Result<Vec<File>> {
        open(&self.procs)
    }

    /// Restricts the cgroup to processors or memory nodes of the host. Returns false, and changes nothing, if husk did
    /// not create the cgroup or the host's cgroups have no such controller there.
    ///
    /// # Errors
    /// [`CgroupError::Rejected`].
    pub(crate) fn set_cpuset(&self, set: Cpuset, value: &str) -> Result<bool, CgroupError> {
        let groups = self.procs.iter().filter_map(|procs| procs.parent());
        for group in groups.filter(|group| is_marked(group)) {
            let path = group.join(set.file);
            if !path.exists() {
                enable_controller(group, "cpuset");
            }
            match write_value(&path, value) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(CgroupError::Rejected { field: set.field, value: value.into(), path, source });
                }
                Ok(()) => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Gives the cgroup all processors or memory nodes of its parent.
    ///
    /// # Errors
    /// [`CgroupError::Rejected`].
    pub(crate) fn clear_cpuset(&self, set: Cpuset) -> Result<(), CgroupError> {
        let groups = self.procs.iter().filter_map(|procs| procs.parent());
        for group in groups.filter(|group| is_marked(group)) {
            let (path, above) = (group.join(set.file), group.parent().unwrap_or(group).join(set.file));
            // Where a file is missing, nothing was restricted.
            let (Ok(now), Ok(all)) = (fs::read_to_string(&path), fs::read_to_string(above)) else { continue };
            let (now, all) = (now.trim(), all.trim());
            if now != all {
                write_value(&path, all).map_err(|source| CgroupError::Rejected {
                    field: set.field,
                    value: all.into(),
                    path,
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Limits the cgroup, together with what other sandboxes that use it ask for. Returns the fields whose limits it
    /// cannot carry, because husk did not create it, the host has no such controller there, or a cgroup above is limited
    /// more.
    ///
    /// # Errors
    /// [`CgroupError::Rejected`].
    pub(crate) fn limit(&self, wanted: &Limits) -> Result<Vec<&'static str>, CgroupError> {
        let (mut applied, mut missing) = (Vec::new(), wanted.fields());
        for group in self.procs.iter().filter_map(|procs| procs.parent()).filter(|group| is_marked(group)) {
            let rejected =
                |LimitError { field, value, path, source }| CgroupError::Rejected { field, value, path, source };
            applied.extend(cgroup::limit(group, &self.user, wanted).map_err(rejected)?);
        }
        missing.retain(|field| !applied.contains(field));
        Ok(missing)
    }

    /// Moves the calling process to the cgroup. [`home::come_back`] moves it back.
    ///
    /// # Errors
    /// When a file cannot be opened or written.
    pub(crate) fn enter(&self) -> io::Result<()> {
        home::leave_for(&self.open()?, &self.roots)
    }

    #[cfg(test)]
    pub(crate) fn procs_files(&self) -> &[PathBuf] {
        &self.procs
    }
}

fn open(procs: &[PathBuf]) -> io::Result<Vec<File>> {
    procs.iter().map(|path| OpenOptions::new().write(true).open(path)).collect()
}

/// Moves a process to a cgroup, through the files of [`HostCgroup::open`]. Does nothing if the process has exited. Blocks:
/// the kernel waits for a grace period, some milliseconds.
///
/// # Errors
/// A file cannot be written.
pub(crate) fn join(cgroups: &[File], process: ProcessId) -> io::Result<()> {
    for mut procs in cgroups {
        match procs.write_all(process.pid.to_string().as_bytes()) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            moved => moved?,
        }
    }
    Ok(())
}

/// Converts the spec's `linux.cgroupsPath` to a path below the hierarchies. It is that path, or `slice:prefix:name` for
/// a unit of systemd, whose slices nest (`a-b.slice` is in `a.slice`; systemd.slice(5)).
///
/// # Errors
/// [`CgroupError::Path`].
fn relative_path(cgroups_path: &str) -> Result<PathBuf, CgroupError> {
    let invalid = || CgroupError::Path(cgroups_path.chars().take(4096).collect());
    let plain = |name: &str| !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    if let [slice, prefix, name] = cgroups_path.split(':').collect::<Vec<_>>()[..] {
        // runc's default for root.
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let unit = match (prefix, name) {
            (_, name) if name.ends_with(".slice") => name.to_owned(),
            ("", name) => format!("{name}.scope"),
            (prefix, name) => format!("{prefix}-{name}.scope"),
        };
        if !plain(slice) || !plain(&unit) || name.is_empty() {
            return Err(invalid());
        }
        return Ok(slice_path(slice).ok_or_else(invalid)?.join(unit));
    }
    // A relative path is relative to where the runtime likes (runtime-spec, config-linux.md): here to the root, too.
    let names: Vec<_> = cgroups_path.split('/').filter(|name| !name.is_empty()).collect();
    let damaged_unit = !cgroups_path.starts_with('/') && cgroups_path.contains(':');
    if names.is_empty() || damaged_unit || !names.iter().all(|name| plain(name)) {
        return Err(invalid());
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
    /// Reads the host's mount table.
    ///
    /// # Errors
    /// [`CgroupError::Mounts`].
    pub(crate) fn of_host() -> Result<Self, CgroupError> {
        fs::read_to_string("/proc/self/mountinfo").map(|text| Self::from_mountinfo(&text)).map_err(CgroupError::Mounts)
    }

    /// Finds the hierarchies in a mount table (proc_pid_mountinfo(5)). Named v1 hierarchies, such as systemd's, are
    /// left out: they account nothing, and their owner expects no foreign cgroups there.
    fn from_mountinfo(text: &str) -> Self {
        let mut roots: Vec<PathBuf> = Vec::new();
        let (mut v1, mut v2) = (false, false);
        // Skip lines that procfs cannot parse: a mount unrelated to cgroups must not prevent containers. The first filter
        // saves the parsing of thousands of overlay mounts.
        let cgroups = text.lines().filter(|line| line.contains(" - cgroup"));
        for mount in cgroups.filter_map(|line| MountInfo::from_line(line).ok()) {
            let usable = match mount.fs_type.as_str() {
                "cgroup2" => {
                    v2 = true;
                    true
                }
                "cgroup" => {
                    v1 = true;
                    !mount.super_options.contains_key("name")
                }
                _ => false,
            };
            // A bind mount of a part of a hierarchy, as in a container's root, has another root than "/".
            if usable && mount.root == "/" && !roots.contains(&mount.mount_point) {
                roots.push(mount.mount_point);
            }
        }
        Self { roots, unified: v2 && !v1 }
    }

    /// Whether the host uses only cgroup v2.
    pub(crate) fn unified(&self) -> bool {
        self.unified
    }

    /// Opens the `cgroup.procs` files of a cgroup that exists in at least one hierarchy.
    ///
    /// # Errors
    /// When the path is malformed or the cgroup does not exist, or a file cannot be opened.
    pub(crate) fn open_existing(&self, cgroup: &str) -> Result<Vec<File>, CgroupError> {
        let relative = relative_path(cgroup)?;
        let procs = self.roots.iter().map(|root| root.join(&relative).join("cgroup.procs"));
        let procs: Vec<_> = procs.filter(|procs| procs.exists()).collect();
        match open(&procs) {
            Ok(files) if files.is_empty() => Err(CgroupError::Absent),
            opened => opened.map_err(|source| CgroupError::Create { path: relative, source }),
        }
    }

    /// Creates the cgroup at `cgroups_path` in every hierarchy for a sandbox, after recording how to remove it. Existing
    /// directories are used and stay when the sandbox ends, except those of husk's other sandboxes: the last one that
    /// uses them removes them.
    ///
    /// # Errors
    /// When the path is malformed, or a directory cannot be created.
    pub(crate) fn create(
        &self,
        record: Recorder<'_>,
        user: User,
        cgroups_path: &str,
    ) -> Result<HostCgroup, CgroupError> {
        let relative = relative_path(cgroups_path)?;
        let mut procs = Vec::new();
        for root in &self.roots {
            let leaf = root.join(&relative);
            create_in(root, &leaf, &user, record)?;
            procs.push(leaf.join("cgroup.procs"));
        }
        Ok(HostCgroup { procs, user, roots: self.roots.clone() })
    }
}

fn create_in(root: &Path, leaf: &Path, user: &User, record: Recorder<'_>) -> Result<(), CgroupError> {
    // Directories of husk's other sandboxes count as ours: the sandbox that ends last removes them.
    let mut ours: Vec<PathBuf> = leaf
        .ancestors()
        .take_while(|path| *path != root)
        .filter(|path| !path.exists() || is_marked(path))
        .map(Into::into)
        .collect();
    ours.reverse();
    let steps = ours.iter().map(|path| match path == leaf {
        true => Step::Cgroup { path: path.clone(), user: Some(user.clone()) },
        false => Step::CgroupParent { path: path.clone() },
    });
    record(steps.collect())?;
    let mut result = Ok(());
    for _ in 0..CREATE_ATTEMPTS {
        result = create_and_mark(leaf, &ours, user);
        match &result {
            // The end of another sandbox removed the cgroup, or an empty parent.
            Err((_, e)) if e.kind() == io::ErrorKind::NotFound => {}
            _ => break,
        }
    }
    result.map_err(|(path, source)| CgroupError::Create { path, source })?;
    inherit_cpuset(root, &ours)
}

/// Creates a cgroup and marks those of them that are husk's. An error names the directory.
fn create_and_mark(leaf: &Path, ours: &[PathBuf], user: &User) -> Result<(), (PathBuf, io::Error)> {
    fs::create_dir_all(leaf).map_err(|error| (leaf.to_owned(), error))?;
    for path in ours {
        let marked = match path == leaf {
            true => cgroup::enter(path, user).and_then(|entered| match entered {
                true => Ok(()),
                false => Err(io::ErrorKind::NotFound.into()),
            }),
            false => mark(path),
        };
        marked.map_err(|error| (path.clone(), error))?;
    }
    Ok(())
}

/// Copies the parent's processors and memory nodes to new v1 cpusets, which are empty: a process cannot join an empty
/// cpuset.
fn inherit_cpuset(root: &Path, created: &[PathBuf]) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        // Only v1 has this file in the root. On v2 an empty file means the parent's value.
        if !root.join(file).exists() {
            continue;
        }
        for path in created {
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
    fn both_forms_of_a_cgroups_path_are_parsed() {
        for (path, expected) in [
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
            ("default/x", Some("default/x")),
            ("./x", None),
            ("../x", None),
            ("/default/../x", None),
            ("/./x", None),
            ("a.slice:b", None),
            ("a:b:c", None),
            ("a--b.slice:x:y", None),
            ("a.slice:x:", None),
            ("a.slice:../x:y", None),
            ("a.slice:x:y:z", None),
        ] {
            assert_eq!(relative_path(path).ok(), expected.map(PathBuf::from), "{path}");
        }
    }

    #[test]
    fn the_hierarchies_of_v1_v2_and_hybrid_hosts_are_found() {
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
            let expected = Hierarchies { roots: roots.into_iter().map(PathBuf::from).collect(), unified };
            assert_eq!(Hierarchies::from_mountinfo(&text), expected, "{text}");
        }
    }

    #[test]
    fn a_cgroup_can_be_joined_and_its_removal_keeps_a_shared_parent() {
        let base = tempfile::tempdir().unwrap();
        let mut states = ["s1", "s2"].map(|id| State::create(base.path(), "ns", id).unwrap());
        let host = Hierarchies::of_host().unwrap();
        assert!(!host.roots.is_empty());
        let [one, two] = [0, 1].map(|n| {
            let record = &mut |steps| states[n].record(&Owner::Sandbox, steps);
            host.create(record, User::new("ns", &format!("s{n}")), &format!("/husk-test-cgroup/s{n}")).unwrap().procs
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
