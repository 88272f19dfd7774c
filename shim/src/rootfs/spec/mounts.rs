//! Mounts of a spec: the guest mounts its kernel's filesystems itself, and finds the sources of bind mounts in the
//! share.

use std::path::{Path, PathBuf};

use husk_protos::changes::SHARE_SOURCE;
use husk_protos::{SHARE_PATH, SOCKETS_PATH};
use oci_spec::runtime::{Linux, LinuxIdMapping, Mount};

use super::context::{Context, FileKind, HostFile};
use super::devices::guest_path;
use super::findings::Findings;
use super::mount_options::rewrite_options;
use crate::host::id_map::{IdMap, MappedRange};
use crate::host::unix::Access;
use crate::rootfs::direct::DirectVolume;

/// The options of a mount that set its propagation.
const PROPAGATIONS: [&str; 8] =
    ["private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"];

/// The folders of the kubelet's volumes that it updates: the plugins' names, escaped.
const UPDATED_VOLUMES: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];
/// Options that restrict a mount, but not what is mounted below it. Options that recurse have other names.
const OWN_OPTIONS: [&str; 7] = ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "strictatime"];

/// Filesystems that the guest's kernel can mount without the host.
const KERNEL_FILESYSTEMS: [&str; 15] = [
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "proc",
    "ramfs",
    "securityfs",
    "sysfs",
    "tmpfs",
];

/// A folder or file of the host that the share contains beside the container's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bind {
    /// Index in the spec's `mounts`.
    pub(crate) index: usize,
    /// The source, with all symbolic links resolved.
    pub(crate) source: PathBuf,
    /// A folder; otherwise a regular file.
    pub(crate) is_dir: bool,
    /// The guest must not be able to write to the source.
    pub(crate) read_only: bool,
    /// Nor to anything that is mounted below it.
    pub(crate) read_only_below: bool,
    /// The mount has options that do not apply to what is mounted below it.
    pub(crate) own_options: bool,
    /// Includes what is mounted below the source.
    pub(crate) recursive: bool,
    /// Later mounts of the host below the source appear in the container (slave propagation).
    pub(crate) follows_host: bool,
    /// Programs in the guest notice changes by the host.
    pub(crate) watched: bool,
    /// The mapping of an ID-mapped mount.
    pub(crate) id_map: Option<MountIdMap>,
}

/// The mapping of an ID-mapped mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountIdMap {
    pub(crate) map: IdMap,
    /// What is mounted below has it too.
    pub(crate) recursive: bool,
}

/// A Unix socket of the host that the guest relays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SocketMount {
    /// Index in the spec's `mounts`, and name of the guest's socket.
    pub(crate) index: usize,
    /// The socket on the host, with all symbolic links resolved.
    pub(crate) path: PathBuf,
    pub(crate) access: Access,
}

/// A volume that the guest mounts from a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DirectMount {
    /// Index in the spec's `mounts`.
    pub(crate) index: usize,
    pub(crate) volume: DirectVolume,
}

/// What the host does for the mounts.
#[derive(Debug, Default)]
pub(super) struct HostMounts {
    pub(super) binds: Vec<Bind>,
    pub(super) direct: Vec<DirectMount>,
    pub(super) sockets: Vec<SocketMount>,
}

/// Stands in a spec for a path in the share or of a disk, until [`Rewritten::place`](super::Rewritten::place) or
/// [`Rewritten::place_disk`](super::Rewritten::place_disk) replaces it. None is longer, so the size of the spec can be
/// checked before.
pub(super) fn in_share() -> PathBuf {
    [SHARE_PATH, &u64::MAX.to_string(), SHARE_SOURCE].iter().collect()
}

/// Where the guest has the socket of the spec's mount `index`.
fn guest_socket(id: &str, index: usize) -> PathBuf {
    [SOCKETS_PATH, id, &index.to_string()].iter().collect()
}

/// Mappings in the form of a spec.
#[derive(Clone, Debug)]
pub(super) struct Mappings {
    users: Vec<LinuxIdMapping>,
    groups: Vec<LinuxIdMapping>,
}

impl Mappings {
    /// Those of a container's user namespace.
    pub(super) fn of_container(linux: &Linux) -> Option<Self> {
        let list = |mappings: &Option<Vec<LinuxIdMapping>>| mappings.clone().unwrap_or_default();
        let (users, groups) = (list(linux.uid_mappings()), list(linux.gid_mappings()));
        (!users.is_empty() && !groups.is_empty()).then_some(Self { users, groups })
    }

    /// Lets the guest map the IDs of a mount whose filesystem it mounts itself.
    pub(super) fn of_guest(self, mount: &mut Mount, recursive: bool) {
        mount.set_uid_mappings(Some(self.users)).set_gid_mappings(Some(self.groups));
        if recursive {
            mount.set_options(Some(mount.options().iter().flatten().cloned().chain(["ridmap".to_owned()]).collect()));
        }
    }

    /// What the host maps.
    fn of_host(&self, recursive: bool) -> MountIdMap {
        let range = |one: &LinuxIdMapping| MappedRange {
            inside: one.container_id(),
            outside: one.host_id(),
            count: one.size(),
        };
        let [users, groups] = [&self.users, &self.groups].map(|list| list.iter().map(range).collect());
        MountIdMap { map: IdMap { users, groups }, recursive }
    }
}

/// Rewrites the mounts, and returns what the host must do for them. `own` is the mapping of the container's user
/// namespace.
pub(super) fn rewrite_mounts(
    mounts: &mut [Mount],
    own: Option<&Mappings>,
    context: &Context<'_>,
    findings: &mut Findings,
) -> HostMounts {
    let mut host = HostMounts::default();
    for (index, mount) in mounts.iter_mut().enumerate() {
        let is_bind = is_bind(mount);
        rewrite_options(index, mount, is_bind, findings);
        let mappings = take_mappings(index, mount, own, is_bind, findings);
        if is_bind {
            rewrite_bind(index, mount, mappings, context, &mut host, findings);
        } else {
            check_filesystem(index, mount, findings);
        }
    }
    host
}

/// Takes the mappings out of a mount, and whether they apply to what is mounted below. Without mappings, the options mean
/// those of the container.
fn take_mappings(
    index: usize,
    mount: &mut Mount,
    own: Option<&Mappings>,
    is_bind: bool,
    findings: &mut Findings,
) -> Option<(Mappings, bool)> {
    let mut options = mount.options().clone().unwrap_or_default();
    let taken: Vec<String> = options.extract_if(.., |option| option == "idmap" || option == "ridmap").collect();
    let users = mount.uid_mappings().clone().unwrap_or_default();
    let groups = mount.gid_mappings().clone().unwrap_or_default();
    if taken.is_empty() && users.is_empty() && groups.is_empty() {
        return None;
    }
    mount.set_options(Some(options)).set_uid_mappings(None).set_gid_mappings(None);
    let recursive = taken.last().is_some_and(|last| last == "ridmap");
    let mut reject = |field: &str, value: Option<&str>, why: &str| {
        findings.reject(format!("mounts[{index}].{field}"), value, why);
        None
    };
    if !is_bind {
        return reject("uidMappings", None, "only bind mounts can be ID-mapped");
    }
    match (users.is_empty(), groups.is_empty(), own) {
        (false, false, _) => Some((Mappings { users, groups }, recursive)),
        (true, true, Some(own)) => Some((own.clone(), recursive)),
        (true, true, None) => {
            let why = "the container has no user namespace with mappings that the mount could have";
            reject("options", taken.last().map(String::as_str), why)
        }
        (true, false, _) => reject("uidMappings", None, "is missing beside gidMappings"),
        (false, true, _) => reject("gidMappings", None, "is missing beside uidMappings"),
    }
}

/// Recognizes a bind mount as runc and the guest's libcontainer do.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

fn check_filesystem(index: usize, mount: &mut Mount, findings: &mut Findings) {
    let field = format!("mounts[{index}].type");
    match mount.typ().as_deref() {
        Some(kind) if KERNEL_FILESYSTEMS.contains(&kind) => {
            // Such a mount needs no source, but libcontainer does, and mountinfo shows it.
            if mount.source().as_ref().is_none_or(|source| source.as_os_str().is_empty()) {
                let source = Some(PathBuf::from(kind));
                mount.set_source(source);
            }
        }
        Some(kind) => {
            let known = KERNEL_FILESYSTEMS.join(", ");
            findings.reject(field, Some(kind), format!("in a VM, a mount must be a bind mount or one of {known}"));
        }
        None => findings.reject(field, None, "is missing, and the options are not those of a bind mount"),
    }
}

fn rewrite_bind(
    index: usize,
    mount: &mut Mount,
    mappings: Option<(Mappings, bool)>,
    context: &Context<'_>,
    host: &mut HostMounts,
    findings: &mut Findings,
) {
    let field = format!("mounts[{index}].source");
    let Some(source) = mount.source().clone() else {
        findings.reject(field, None, "is missing");
        return;
    };
    match (context.direct)(&source) {
        Ok(None) => {}
        Ok(Some(volume)) => {
            host.direct.push(DirectMount { index, volume });
            mount.set_source(Some(in_share()));
            if let Some((mappings, recursive)) = mappings {
                mappings.of_guest(mount, recursive);
            }
            return;
        }
        Err(why) => {
            findings.reject_path(field, &source, why);
            return;
        }
    }
    let found = match (context.inspect)(&context.bundle.join(&source)) {
        Ok(found) => found,
        Err(error) => {
            findings.reject_path(field, &source, format!("on the host: {error}"));
            return;
        }
    };
    match found.kind {
        FileKind::Dir | FileKind::File => {
            let id_map = mappings.map(|(mappings, recursive)| mappings.of_host(recursive));
            host.binds.push(Bind { id_map, ..bind(index, mount, found, context, findings) });
            mount.set_source(Some(in_share()));
        }
        _ if mappings.is_some() => findings.reject_path(field, &source, "only folders and files can be ID-mapped"),
        FileKind::CharDevice { major, minor } => match guest_path(major, minor) {
            Some(path) => {
                mount.set_source(Some(path.to_owned()));
            }
            None => findings.reject_path(field, &source, "a device of the host cannot be used in a VM"),
        },
        FileKind::BlockDevice => {
            findings.reject_path(field, &source, "a device of the host cannot be used in a VM");
        }
        FileKind::Socket => match (context.check_socket)(&found.path) {
            Ok(access) => {
                host.sockets.push(SocketMount { index, path: found.path, access });
                mount.set_source(Some(guest_socket(context.id, index)));
            }
            Err(why) => findings.reject_path(field, &source, why),
        },
        FileKind::Fifo => findings.reject_path(
            field,
            &source,
            "a fifo of the host does not work in a VM: its other end is in the host's kernel",
        ),
    }
}

/// The option that sets a mount's propagation: the last one counts.
pub(crate) fn propagation(mount: &Mount) -> Option<&str> {
    let options = mount.options().as_deref().unwrap_or_default();
    options.iter().rfind(|option| PROPAGATIONS.contains(&option.as_str())).map(String::as_str)
}

/// The bind mount of a folder or file, according to the mount's options.
fn bind(index: usize, mount: &Mount, source: HostFile, context: &Context<'_>, findings: &mut Findings) -> Bind {
    let options = mount.options().as_deref().unwrap_or_default();
    let last_of = |names: &[&str]| options.iter().rfind(|o| names.contains(&o.as_str())).map(String::as_str);
    let propagation = propagation(mount);
    if let Some(shared @ ("shared" | "rshared")) = propagation {
        findings.note(format!(
            "mounts[{index}].options {shared:?}: later mounts of the host appear in the container, but the container's mounts do not appear on the host"
        ));
    }
    // Recursive options are applied last.
    let recursively = last_of(&["rro", "rrw"]);
    Bind {
        index,
        watched: is_updated_by_kubelet(&source.path) || context.watch.contains(mount.destination()),
        source: source.path,
        is_dir: source.kind == FileKind::Dir,
        read_only: matches!(recursively.or(last_of(&["ro", "rw"])), Some("ro" | "rro")),
        read_only_below: recursively == Some("rro"),
        own_options: last_of(&OWN_OPTIONS).is_some(),
        recursive: !options.iter().any(|o| o == "bind") || options.iter().any(|o| o == "rbind"),
        follows_host: matches!(propagation, Some("slave" | "rslave" | "shared" | "rshared")),
        id_map: None,
    }
}

/// Whether a path is that of a volume that the kubelet updates while containers use it:
/// `<kubelet's folder>/pods/<pod>/volumes/kubernetes.io~<kind>/<volume>`.
fn is_updated_by_kubelet(source: &Path) -> bool {
    let mut parts = source.components().rev().filter_map(|part| part.as_os_str().to_str());
    let (Some(_volume), Some(kind), Some(volumes), Some(_pod), Some(pods)) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    UPDATED_VOLUMES.contains(&kind) && volumes == "volumes" && pods == "pods"
}

/// Whether a mount shows cgroups.
pub(super) fn is_cgroup_mount(mount: &Mount) -> bool {
    matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_that_the_kubelet_updates_are_found_below_any_folder_of_the_kubelet() {
        let table = [
            ("/var/lib/kubelet/pods/0a-1b/volumes/kubernetes.io~configmap/settings", true),
            ("/var/lib/k0s/kubelet/pods/0a-1b/volumes/kubernetes.io~secret/key", true),
            ("/var/lib/kubelet/pods/0a-1b/volumes/kubernetes.io~projected/kube-api-access-x", true),
            ("/var/lib/kubelet/pods/0a-1b/volumes/kubernetes.io~downward-api/info", true),
            ("/var/lib/kubelet/pods/0a-1b/volumes/kubernetes.io~empty-dir/cache", false),
            ("/var/lib/kubelet/pods/0a-1b/volumes/kubernetes.io~configmap", false),
            ("/var/lib/kubelet/pods/0a-1b/volumes/kubernetes.io~configmap/settings/..data", false),
            // A subPath, which the kubelet does not update.
            ("/var/lib/kubelet/pods/0a-1b/volume-subpaths/settings/web/0", false),
            ("/volumes/kubernetes.io~configmap/settings", false),
            ("/", false),
        ];
        for (path, expected) in table {
            assert_eq!(is_updated_by_kubelet(Path::new(path)), expected, "{path}");
        }
    }
}
