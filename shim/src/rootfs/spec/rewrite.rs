//! Rewrites a spec for the guest.

use std::path::{Path, PathBuf};

use husk_protos::{CONTAINERS_CGROUP, SANDBOX_SHM};
use oci_spec::runtime::{Capability, Linux, LinuxNamespace, LinuxNamespaceType, Mount, Spec};

use super::context::Context;
use super::devices::{BlockDevice, rewrite_devices};
use super::findings::{Findings, SpecProblems};
use super::host_hooks::{announced_links, take_host_hooks};
use super::limits::{Demand, SpecLimits, limits};
use super::mounts::{Bind, DirectMount, HostMounts, Mappings, SocketMount, in_share, is_cgroup_mount, rewrite_mounts};
use super::namespaces::{self, Target};
use super::resources::{HostResources, rewrite_resources};
use super::size::check_size;
use crate::host::hooks::Hooks;

/// Where POSIX shared memory is (shm_overview(7)).
const DEV_SHM: &str = "/dev/shm";

/// A network namespace of the host that a spec names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostNetwork {
    /// The spec's field, for messages.
    pub(crate) field: String,
    pub(crate) path: PathBuf,
}

/// The network that a spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NetworkRequest {
    /// No namespace of its own: with runc, the container would use the host's network. It uses the VM's.
    Shared,
    /// A new network namespace.
    New,
    /// A network namespace of the host. The container uses the VM's own instead.
    OfHost(HostNetwork),
}

impl NetworkRequest {
    /// The network namespace of the host.
    pub(crate) fn of_host(&self) -> Option<&HostNetwork> {
        match self {
            Self::OfHost(network) => Some(network),
            Self::Shared | Self::New => None,
        }
    }
}

/// Where the guest finds the files of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    /// The root filesystem.
    pub(crate) root: PathBuf,
    /// Index in the spec's mounts, and the source.
    pub(crate) binds: Vec<(usize, PathBuf)>,
    /// What is mounted below sources, if the guest has to mount it before it mounts the source in the container: a
    /// filesystem that the guest's kernel mounts when a path leads into it has the options of the mount above.
    pub(crate) below: Vec<PathBuf>,
}

/// A spec for the guest, and what the host does for the container. It does not say where the files in the share are,
/// until [`Rewritten::place`] was called.
#[derive(Clone, Debug)]
pub struct Rewritten {
    /// The spec for the guest.
    pub spec: Spec,
    /// The bind mounts, in the order of the spec's mounts.
    pub(crate) binds: Vec<Bind>,
    /// The bind mounts whose sources the guest mounts from block devices.
    pub(crate) direct: Vec<DirectMount>,
    /// The Unix sockets of the host that the guest relays.
    pub(crate) sockets: Vec<SocketMount>,
    /// The block devices of the host. In the spec, they have the host's numbers until they are placed.
    pub(crate) block_devices: Vec<BlockDevice>,
    /// The root folder that the spec names on the host, used when containerd passes no mounts.
    pub(crate) rootfs: PathBuf,
    /// The container may not write to its root filesystem.
    pub(crate) read_only: bool,
    /// How eagerly the host's OOM killer takes the VM's processes, if the spec says so.
    pub(crate) oom_score_adj: Option<i32>,
    /// The cgroup that the spec names on the host.
    pub(crate) cgroups_path: Option<String>,
    pub(crate) limits: SpecLimits,
    /// What the limits require of the VM's size.
    pub(crate) demand: Demand,
    /// What the spec's resources require of the host.
    pub(crate) host_resources: HostResources,
    /// The network that the spec asks for.
    pub(crate) network: NetworkRequest,
    /// The links that hooks will add to the network namespace, as far as the spec says so.
    pub(crate) announced_links: usize,
    /// The hooks that the host runs.
    pub(crate) hooks: Hooks,
    /// What was changed or removed, for the log.
    pub(crate) notes: Vec<String>,
}

impl Rewritten {
    /// Puts the container into the VM's own network namespace, instead of an empty one.
    pub(crate) fn use_network_of_vm(&mut self) {
        let Some(linux) = self.spec.linux_mut() else { return };
        let namespaces = linux.namespaces_mut().take().unwrap_or_default();
        let is_new =
            |namespace: &LinuxNamespace| namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none();
        linux.set_namespaces(Some(namespaces.into_iter().filter(|namespace| !is_new(namespace)).collect()));
    }

    /// Mounts the folder that the sandbox's containers share at /dev/shm, where the spec has a tmpfs of the container's
    /// own or nothing.
    pub(crate) fn share_dev_shm(&mut self) {
        let mut mounts = self.spec.mounts_mut().take().unwrap_or_default();
        let at_dev_shm = |mount: &Mount| mount.destination() == Path::new(DEV_SHM);
        let own = |mount: &Mount| at_dev_shm(mount) && mount.typ().as_deref() == Some("tmpfs");
        if mounts.iter().any(|mount| at_dev_shm(mount) && !own(mount)) {
            self.spec.set_mounts(Some(mounts));
            return;
        }
        let mut shared = Mount::default();
        shared.set_destination(DEV_SHM.into());
        shared.set_typ(Some("bind".to_owned()));
        shared.set_source(Some(SANDBOX_SHM.into()));
        shared.set_options(Some(["rbind", "nosuid", "nodev", "noexec"].map(str::to_owned).to_vec()));
        match mounts.iter_mut().find(|mount| own(mount)) {
            Some(mount) => *mount = shared,
            None => mounts.push(shared),
        }
        self.spec.set_mounts(Some(mounts));
    }

    /// Sets the paths of the files in the share.
    pub(crate) fn place(&mut self, places: Places) {
        if let Some(root) = self.spec.root_mut() {
            root.set_path(places.root);
        }
        let mut mounts = self.spec.mounts_mut().take().unwrap_or_default();
        for (index, path) in places.binds {
            if let Some(mount) = mounts.get_mut(index) {
                mount.set_source(Some(path));
            }
        }
        self.spec.set_mounts(Some(mounts));
    }

    /// Mounts a file of the host in the container, read-only.
    pub(crate) fn add_file(&mut self, source: PathBuf, destination: &Path) {
        let mut mounts = self.spec.mounts_mut().take().unwrap_or_default();
        let index = mounts.len();
        let mut mount = Mount::default();
        mount.set_destination(destination.to_owned());
        mount.set_typ(Some("bind".to_owned()));
        mount.set_source(Some(in_share()));
        mount.set_options(Some(["rbind", "rprivate", "ro"].map(str::to_owned).to_vec()));
        mounts.push(mount);
        self.spec.set_mounts(Some(mounts));
        self.binds.push(Bind {
            index,
            source,
            is_dir: false,
            read_only: true,
            read_only_below: false,
            own_options: true,
            recursive: false,
            follows_host: false,
            watched: false,
            id_map: None,
        });
    }

    /// Whether the spec mounts something at one of these paths.
    pub(crate) fn mounts_any(&self, paths: &[&str]) -> bool {
        let mut mounts = self.spec.mounts().iter().flatten();
        mounts.any(|mount| paths.iter().any(|path| mount.destination() == Path::new(path)))
    }

    /// Whether nothing of the container is left in the guest when its init process has exited: no other process, because
    /// all die with the first of their PID namespace, and no mount of its programs that has data to write.
    pub(crate) fn ends_with_init(&self) -> bool {
        let mut namespaces = self.spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
        let own_pids = namespaces.any(|ns| ns.typ() == LinuxNamespaceType::Pid && ns.path().is_none());
        let capabilities = self.spec.process().as_ref().and_then(|process| process.capabilities().as_ref());
        let mounts = capabilities.is_none_or(|sets| {
            let sets = [sets.bounding(), sets.permitted(), sets.effective()];
            sets.into_iter().flatten().any(|set| set.contains(&Capability::SysAdmin))
        });
        own_pids && !mounts
    }

    /// Whether the container uses the VM's network namespace, and not one of its own in the guest.
    pub(crate) fn in_vms_network(&self) -> bool {
        let mut namespaces = self.spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
        !namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::Network)
    }
}

/// Rewrites `spec` for the guest.
///
/// # Errors
/// All problems at once.
pub(crate) fn rewrite(mut spec: Spec, context: &Context<'_>) -> Result<Rewritten, SpecProblems> {
    let mut findings = Findings::default();
    check_platform(&spec, &mut findings);
    let hooks = take_host_hooks(&mut spec, &mut findings);
    rewrite_process(&mut spec, &mut findings);
    let mut mounts = spec.mounts_mut().take().unwrap_or_default();
    let own = spec.linux().as_ref().and_then(Mappings::of_container);
    let HostMounts { binds, direct, sockets } = rewrite_mounts(&mut mounts, own.as_ref(), context, &mut findings);
    let has_cgroup_mount = mounts.iter().any(is_cgroup_mount);
    spec.set_mounts(Some(mounts));
    let rootfs = rewrite_root(&mut spec, context, &mut findings);
    let linux = rewrite_linux(&mut spec, context, has_cgroup_mount, &mut findings);
    check_size(&spec, &mut findings);
    let announced_links = announced_links(&spec);
    let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let oom_score_adj = spec.process().as_ref().and_then(|process| process.oom_score_adj());
    match (rootfs, linux) {
        (Some(rootfs), Some(linux)) if findings.problems.is_empty() => {
            let LinuxOfHost { block_devices, cgroups_path, limits, demand, host_resources, network } = linux;
            Ok(Rewritten {
                spec,
                binds,
                direct,
                sockets,
                block_devices,
                rootfs,
                read_only,
                oom_score_adj,
                cgroups_path,
                limits,
                demand,
                host_resources,
                network,
                announced_links,
                hooks,
                notes: findings.notes,
            })
        }
        _ => Err(SpecProblems(findings.problems)),
    }
}

fn check_platform(spec: &Spec, findings: &mut Findings) {
    let other_systems =
        [("windows", spec.windows().is_some()), ("solaris", spec.solaris().is_some()), ("zos", spec.zos().is_some())];
    for (field, _) in other_systems.iter().filter(|(_, present)| *present) {
        findings.reject(*field, None, "only Linux containers are supported");
    }
    if spec.vm().is_some() {
        findings.reject(
            "vm",
            None,
            "the VM is configured by husk's configuration file and annotations, not by the spec",
        );
    }
}

/// Removes security labels. The guest's kernel supports neither AppArmor nor SELinux, and the host's could not look
/// into the VM. The VM confines the container better than they would.
fn rewrite_process(spec: &mut Spec, findings: &mut Findings) {
    let Some(process) = spec.process_mut() else {
        findings.reject("process", None, "is missing");
        return;
    };
    if let Some(profile) = process.apparmor_profile().clone() {
        process.set_apparmor_profile(None);
        findings.note(format!("process.apparmorProfile {profile:?}: removed, the VM confines the container"));
    }
    if process.exec_cpu_affinity().is_some() {
        process.set_exec_cpu_affinity(None);
        findings.note("process.execCPUAffinity: removed, it names CPUs of the host, which are not the VM's");
    }
    if let Some(label) = process.selinux_label().clone() {
        process.set_selinux_label(None);
        findings.note(format!("process.selinuxLabel {label:?}: removed, the VM confines the container"));
    }
}

/// Sets the root's path in the guest, and returns its path on the host.
fn rewrite_root(spec: &mut Spec, context: &Context<'_>, findings: &mut Findings) -> Option<PathBuf> {
    let Some(root) = spec.root_mut() else {
        findings.reject("root", None, "is missing");
        return None;
    };
    let host = context.bundle.join(root.path());
    root.set_path(in_share());
    Some(host)
}

/// What the part `linux` names on the host.
struct LinuxOfHost {
    block_devices: Vec<BlockDevice>,
    cgroups_path: Option<String>,
    limits: SpecLimits,
    demand: Demand,
    host_resources: HostResources,
    network: NetworkRequest,
}

/// Rewrites the part `linux`.
fn rewrite_linux(
    spec: &mut Spec,
    context: &Context<'_>,
    has_cgroup_mount: bool,
    findings: &mut Findings,
) -> Option<LinuxOfHost> {
    let Some(linux) = spec.linux_mut() else {
        findings.reject("linux", None, "is missing");
        return None;
    };
    let limits = limits(linux);
    let demand = linux.resources().as_ref().map(Demand::of).unwrap_or_default();
    let cgroups_path = linux.cgroups_path().as_ref().map(|path| path.to_string_lossy().into_owned());
    linux.set_cgroups_path(Some([CONTAINERS_CGROUP, context.id].iter().collect()));
    if let Some(label) = linux.mount_label_mut().take() {
        findings.note(format!("linux.mountLabel {label:?}: removed, the VM confines the container"));
    }
    if linux.intel_rdt().is_some() {
        let why = "the host's cache and memory bandwidth cannot be partitioned from inside a VM";
        findings.reject("linux.intelRdt", None, why);
    }
    for name in linux.net_devices().iter().flat_map(|devices| devices.keys()) {
        findings.reject("linux.netDevices", Some(name), "a network device of the host cannot be moved into a VM");
    }
    let network = rewrite_namespaces(linux, context, has_cgroup_mount, findings);
    let block_devices = rewrite_devices(linux, findings);
    let host_resources =
        linux.resources_mut().as_mut().map(|resources| rewrite_resources(resources, findings)).unwrap_or_default();
    Some(LinuxOfHost { block_devices, cgroups_path, limits, demand, host_resources, network })
}

/// Rewrites the namespaces, and returns the network that they ask for.
fn rewrite_namespaces(
    linux: &mut Linux,
    context: &Context<'_>,
    has_cgroup_mount: bool,
    findings: &mut Findings,
) -> NetworkRequest {
    let mut namespaces = linux.namespaces_mut().take().unwrap_or_default();
    for namespace in &mut namespaces {
        // Some clients write an empty path for a new namespace.
        if namespace.path().as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            namespace.set_path(None);
        }
    }
    let network = resolve_namespaces(&mut namespaces, context, findings);
    // On cgroup v1, a container without a cgroup namespace sees only its own part of each hierarchy. The guest has v2,
    // where only the namespace has this effect: without it, the mount would show the cgroups of the whole guest.
    let has_cgroup_namespace = namespaces.iter().any(|ns| ns.typ() == LinuxNamespaceType::Cgroup);
    if has_cgroup_mount && !has_cgroup_namespace && !context.host_is_unified {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(LinuxNamespaceType::Cgroup);
        namespaces.push(namespace);
        findings.note(
            "linux.namespaces: added a cgroup namespace, so the container sees only its own cgroups, as on cgroup v1",
        );
    }
    linux.set_namespaces(Some(namespaces));
    network
}

/// Removes the network namespaces that the VM's own stands for: one of the host, that of a container which uses the VM's,
/// and a new one of the sandbox's first container, so that links that later appear in the sandbox's namespace on the
/// host reach that container. Other namespaces of containers get their paths in the guest. Returns the network that the
/// spec asks for.
fn resolve_namespaces(
    namespaces: &mut Vec<LinuxNamespace>,
    context: &Context<'_>,
    findings: &mut Findings,
) -> NetworkRequest {
    let has_user_namespace = namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let mut network = NetworkRequest::Shared;
    let mut kept = Vec::new();
    for (index, mut namespace) in namespaces.drain(..).enumerate() {
        let field = format!("linux.namespaces[{index}].path");
        let Some(path) = namespace.path().clone() else {
            let is_network = namespace.typ() == LinuxNamespaceType::Network;
            if is_network && network == NetworkRequest::Shared {
                network = NetworkRequest::New;
            }
            // The VM's network namespace belongs to the VM's first user namespace.
            if !(is_network && context.first && !has_user_namespace) {
                kept.push(namespace);
            }
            continue;
        };
        match namespaces::resolve(namespace.typ(), &path, context.sibling) {
            Ok(Target::VmNetwork) => {}
            Ok(Target::Guest(path)) => {
                namespace.set_path(Some(path));
                kept.push(namespace);
            }
            Ok(Target::HostNetwork) if matches!(network, NetworkRequest::OfHost(_)) => {
                findings.reject_path(field, &path, "the spec names another network namespace already");
            }
            // Sysfs, raw sockets and low ports would fail in odd ways: see above.
            Ok(Target::HostNetwork) if has_user_namespace => {
                let why = "a container with a user namespace cannot use a network namespace of the host yet";
                findings.reject_path(field, &path, why);
            }
            Ok(Target::HostNetwork) => network = NetworkRequest::OfHost(HostNetwork { field, path }),
            Err(why) => findings.reject_path(field, &path, why),
        }
    }
    *namespaces = kept;
    network
}
