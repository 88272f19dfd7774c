//! Prepares a container: reads and checks the request, the spec, the annotations, the configuration and the host, and
//! reports all problems at once, before anything is created.
//!
//! | file           | contents                                                             |
//! |----------------|----------------------------------------------------------------------|
//! | `boot_files.rs` | the digests of the guest's kernel and initramfs                     |
//! | `bootable.rs`  | a machine that can be booted, for a sandbox or for the pool          |
//! | `disks.rs`     | the disks that the container asks for (pure)                         |
//! | `host.rs`      | what the host provides: the guest's files, programs, the accelerator |
//! | `ids.rs`       | whether the VMs' user IDs are others' too                            |
//! | `network.rs`   | whether the container is in user mode, and with which ports          |
//! | `overhead.rs`  | what a sandbox takes on the host besides its containers (pure)       |
//! | `pod.rs`       | what the CRI plugin says of a pod (pure)                             |
//! | `pod_files.rs` | the files that a pod's containers find in `/etc`                     |
//! | `pooled.rs`    | VMs of the pool: what they are booted with, and whom they serve      |
//! | `root.rs`      | how the guest gets the root filesystem                               |
//! | `sandbox.rs`   | what containerd's Sandbox API says of a sandbox (pure)               |
//! | `size.rs`      | the size of the VM (pure)                                            |
//! | `sysctls.rs`   | the sysctls of a pod without a pause container (pure)                |
//! | `update.rs`    | updates of a sandbox (pure)                                          |

pub mod boot_files;
mod bootable;
pub(crate) mod disks;
pub mod host;
mod ids;
mod network;
pub(crate) mod overhead;
mod pod;
mod pod_files;
pub(crate) mod pooled;
pub(crate) mod root;
mod sandbox;
pub(crate) mod size;
mod sysctls;
mod update;

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use husk_protos::chain::Chain;
use husk_protos::sandbox_update::UpdateSandboxRequest;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::config::annotations::{self, Annotations};
use crate::config::extras::Extras;
use crate::config::load;
use crate::config::names;
use crate::config::problem::Problem;
use crate::config::settings::Config;
use crate::config::values::MAX_SPARE_NICS;
use crate::config::workspace::Workspace;
use crate::containerd::options;
use crate::extras::files::{self, OpenedFile};
use crate::network::user::{UserNetwork, resolv_conf};
use crate::network::{Claim, claim};
pub use crate::prepare::bootable::Attachments;
pub(crate) use crate::prepare::bootable::Bootable;
use crate::prepare::disks::RequestedDisks;
use crate::prepare::host::Places;
pub(crate) use crate::prepare::network::RequestedNetwork;
use crate::prepare::pod::Role;
use crate::prepare::pod_files::Node;
pub(crate) use crate::prepare::pod_files::{PodFile, RESOLV_CONF};
use crate::prepare::root::PlannedRoot;
use crate::prepare::sandbox::SandboxRequest;
use crate::prepare::size::Size;
use crate::rootfs::direct;
use crate::rootfs::plan::{self, HostView, RootFacts};
use crate::rootfs::socket;
use crate::rootfs::spec::parse::{Parsed, parse};
use crate::rootfs::spec::resources::HostResources;
use crate::rootfs::spec::{Context, HostNetwork, Rewritten, Sibling, rewrite};
use crate::vm::BootPlan;
use crate::vm::cgroup::Hierarchies;
use crate::vmm::Vmm;

/// All problems of a request.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct PrepareError(pub(crate) Vec<String>);

impl PrepareError {
    fn one(error: &(dyn std::error::Error + 'static)) -> Self {
        Self(vec![Chain(error).to_string()])
    }
}

/// A container that is ready to be created.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The spec for the guest, and what the host does for the container.
    pub rewritten: Rewritten,
    /// Its root filesystem.
    pub(crate) root: PlannedRoot,
    /// What the spec contains, but husk does not know, for the log.
    pub(crate) ignored: Vec<String>,
    /// The runtime's options that have nothing to do here, for the log.
    pub(crate) ignored_options: Vec<String>,
    /// The machine, if it has to be booted for this container.
    pub(crate) boot: Bootable,
    /// The host's network namespace that the spec names.
    pub(crate) network: Option<Claim>,
    /// The sandbox's network, if it is in user mode.
    pub(crate) user: Option<UserNetwork>,
    /// What the annotations request. A VM that is already booted must have it.
    pub(crate) requested: RequestedNetwork,
    /// Files for the guest itself. A VM that is already booted must have them.
    pub(crate) extras: Extras,
    /// The disks that the annotations request.
    pub(crate) disks: RequestedDisks,
    /// The opened files of the extras, for a VM that has to be booted.
    pub(crate) sources: Vec<OpenedFile>,
    workspace: Option<Workspace>,
    /// In a pod, the kubelet limits the cgroup above the sandbox's.
    role: Role,
}

impl Prepared {
    /// What the VM has if it is booted for this container.
    pub(crate) fn booting_with(&self) -> BootedWith {
        BootedWith { extras: self.extras.clone(), user: self.user.clone() }
    }

    /// The most memory that the sandbox's processes may take on the host, bytes, if its cgroup is to be limited.
    pub(crate) fn host_memory(&self) -> Option<u64> {
        let Bootable { machine, host, .. } = &self.boot;
        let cache = self.boot.vmm().cache_mib(machine);
        (self.role == Role::None)
            .then(|| overhead::memory(machine.memory_mib, cache, host.open_files.limit, self.boot.copied_files()))
    }

    /// The score of a program in the container, for the host's OOM killer. The CRI plugin protects a pod's sandbox
    /// container, which would protect all other containers of its VM too.
    pub(crate) fn oom_score_adj(&self) -> Option<i32> {
        self.rewritten.oom_score_adj.filter(|_| !self.is_pods_sandbox())
    }

    /// How long the guest may take to end what has to end.
    pub(crate) fn kill_timeout(&self) -> Duration {
        self.boot.config.kill_timeout
    }

    fn root_facts(&self) -> RootFacts {
        RootFacts {
            read_only: self.rewritten.read_only,
            of_pods_sandbox: self.role == Role::Sandbox,
            of_kubernetes: self.role == Role::Container,
        }
    }

    /// Whether it is a pod's sandbox container.
    pub(crate) fn is_pods_sandbox(&self) -> bool {
        self.role == Role::Sandbox
    }

    /// What this container requests and the sandbox's VM lacks.
    pub(crate) fn beyond(&self, booted: &BootedWith) -> Vec<Problem> {
        let mut problems = self.extras.beyond(&booted.extras);
        if self.rewritten.network.of_host().is_none() {
            problems.extend(self.requested.beyond(booted.user.as_ref()));
        }
        problems
    }
}

/// What the sandbox's VM was booted with and later containers cannot change.
#[derive(Debug, Clone, Default)]
pub struct BootedWith {
    /// The files for the guest itself.
    pub(crate) extras: Extras,
    /// Its network, if it is in user mode.
    pub(crate) user: Option<UserNetwork>,
}

/// The sandbox of a bundle's container: its pod, or a sandbox of its own.
///
/// # Errors
///
/// When the bundle cannot be read.
pub(crate) fn sandbox_of(bundle: &Path, id: &str) -> Result<String, PrepareError> {
    let spec = read_spec(bundle)?.spec;
    let pod = spec.annotations().as_ref().and_then(|annotations| annotations.get(pod::SANDBOX_ID));
    Ok(pod.map_or_else(|| id.to_owned(), Clone::clone))
}

/// What a container's preparation needs to know about its sandbox.
#[derive(Clone, Copy)]
pub struct Siblings<'a> {
    /// The container is the sandbox's first.
    pub first: bool,
    /// Finds a running container of the sandbox by the PID of its holder.
    pub find: &'a dyn Fn(u32) -> Option<Sibling>,
    /// The sandbox's VM, if it is booted.
    pub booted_with: Option<&'a BootedWith>,
    /// The sandbox's VM, if it boots at the moment. The boot may still fail.
    pub booting_with: Option<&'a BootedWith>,
}

impl Siblings<'_> {
    /// Those of the first container.
    pub const NONE: Siblings<'static> =
        Siblings { first: true, find: &|_| None, booted_with: None, booting_with: None };
}

/// The sandbox that something is prepared for.
#[derive(Clone, Copy, Debug)]
pub struct SandboxName<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The sandbox's ID.
    pub id: &'a str,
}

/// Reads and checks everything that a container needs.
///
/// # Errors
///
/// All problems at once.
pub fn prepare(
    request: &CreateTaskRequest,
    sandbox: SandboxName<'_>,
    siblings: Siblings<'_>,
) -> Result<Prepared, PrepareError> {
    let options = options::read(request.options.as_ref()).map_err(PrepareError)?;
    let config = load::load_named(options.config_path.as_deref()).map_err(|error| PrepareError::one(&error))?;
    let mut prepared = prepare_with(config, &Places::of_process(), request, sandbox, siblings)?;
    prepared.boot.named_config = options.config_path;
    prepared.ignored_options = options.notes;
    Ok(prepared)
}

/// Reads and checks everything that a sandbox needs without a container.
///
/// # Errors
///
/// All problems at once.
pub(crate) fn prepare_sandbox(
    request: &CreateSandboxRequest,
    namespace: &str,
) -> Result<(SandboxRequest, Prepared), PrepareError> {
    let node = Node::read().map_err(|error| PrepareError::one(&error))?;
    let mut request = SandboxRequest::read(request, &node).map_err(all)?;
    let config = load::load().map_err(|error| PrepareError::one(&error))?;
    let parsed = Parsed { spec: request.spec.clone(), ignored: Vec::new() };
    let subject = Subject { id: &request.id, bundle: &request.bundle, parsed };
    let sandbox = SandboxName { namespace, id: &request.id };
    let mut prepared = prepare_spec(config, &Places::of_process(), subject, sandbox, Siblings::NONE)?;
    prepared.role = Role::Sandbox;
    prepared.boot.machine.guest.sandbox = true;
    // A container of the sandbox may need some.
    prepared.boot.machine.guest.disks = true;
    prepared.boot.machine.guest.hostname.clone_from(&request.hostname);
    if prepared.user.is_some() && !request.has_dns {
        request.set_resolv_conf(resolv_conf().map_err(|error| PrepareError::one(&error))?.into_bytes());
    }
    Ok((request, prepared))
}

/// Reads and checks an update of a sandbox whose spec is `spec`, JSON, and whose VM has this size. Returns what the host
/// has to do.
///
/// # Errors
///
/// All problems at once.
pub(crate) fn update_of_sandbox(
    request: &UpdateSandboxRequest,
    spec: &[u8],
    size: Size,
) -> Result<HostResources, PrepareError> {
    update::read(request, spec, size).map_err(all)
}

fn all(problems: Vec<impl ToString>) -> PrepareError {
    PrepareError(problems.iter().map(ToString::to_string).collect())
}

fn prepare_with(
    config: Config,
    places: &Places,
    request: &CreateTaskRequest,
    sandbox: SandboxName<'_>,
    siblings: Siblings<'_>,
) -> Result<Prepared, PrepareError> {
    let bundle = Path::new(&request.bundle);
    let subject = Subject { id: &request.id, bundle, parsed: read_spec(bundle)? };
    let root = plan::plan(&request.rootfs, &HostView::of_host()).map_err(all);
    match (prepare_spec(config, places, subject, sandbox, siblings), root) {
        (Ok(mut prepared), Ok(root)) => {
            prepared.disks.check_root(&root).map_err(all)?;
            let config = &prepared.boot.config;
            let mode = prepared.disks.rootfs.unwrap_or(config.rootfs.mode);
            let root = PlannedRoot::decide(root, mode, prepared.root_facts(), config).map_err(all)?;
            prepared.boot.machine.guest.disks |= root.needs_disks();
            Ok(Prepared { root, ..prepared })
        }
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
        (Err(first), Err(second)) => Err(PrepareError([first.0, second.0].concat())),
    }
}

/// What is prepared: a container, or a sandbox without one.
struct Subject<'a> {
    id: &'a str,
    bundle: &'a Path,
    parsed: Parsed,
}

fn prepare_spec(
    config: Config,
    places: &Places,
    Subject { id, bundle, parsed: Parsed { mut spec, ignored } }: Subject<'_>,
    sandbox: SandboxName<'_>,
    siblings: Siblings<'_>,
) -> Result<Prepared, PrepareError> {
    let mut problems = Vec::new();
    let annotations = collect(read_annotations(&spec, &config, sandbox.namespace), &mut problems);
    let extras = annotations.as_ref().map(|annotations| annotations.extras.clone()).unwrap_or_default();
    let sources =
        collect(open_extras(&extras, siblings.booted_with.map(|booted| &booted.extras), &config), &mut problems);
    remove_workspace(&mut spec);
    let replaced = pod::replace_pid_namespace_of_node(&mut spec, config.host_pid);
    problems.extend(pod::shares_node(&spec));
    problems.extend(forbidden_namespace(&spec, &config).map(|problem| problem.to_string()));
    let role = pod::role(&spec);
    let pod = collect(pod::limits(&spec), &mut problems).unwrap_or_default();
    let context = Context {
        id,
        bundle,
        host_is_unified: Hierarchies::of_host().map_err(|error| PrepareError::one(&error))?.unified(),
        inspect: &crate::rootfs::share::inspect,
        check_socket: &|path| socket::check(&config.sockets, path),
        direct: &|source| direct::find(config.direct_volume_dir.as_deref(), source),
        watch: annotations.as_ref().map_or(&[][..], |annotations| &annotations.watch),
        first: siblings.first,
        sibling: siblings.find,
    };
    let rewritten = collect(rewrite(spec, &context).map_err(|problems| problems.0), &mut problems);
    let named = rewritten.as_ref().and_then(|rewritten| rewritten.network.of_host());
    let network = collect(named.map(claim_network).transpose(), &mut problems);
    let requested = annotations.as_ref().map(requested_network).unwrap_or_default();
    let booted = siblings.booted_with.or(siblings.booting_with).map(|booted| booted.user.as_ref());
    let user = rewritten.as_ref().map(|rewritten| {
        let user = network::user_network(&requested, &config, rewritten, booted)?;
        if let Some(user) = user.as_ref().filter(|_| booted.is_none()) {
            network::check_ports(user, &places.state, sandbox.id)?;
        }
        Ok(user)
    });
    let user = collect(user.transpose(), &mut problems).flatten().flatten();
    let disks = requested_disks(annotations.as_ref(), rewritten.as_ref(), &config, &mut problems);
    let debug = annotations.as_ref().and_then(|annotations| annotations.debug).unwrap_or(config.debug);
    let host = collect(host::find(&config, places, debug), &mut problems);

    let (Some(annotations), Some(sources), Some(mut rewritten), Some(network), Some(host)) =
        (annotations, sources, rewritten, network, host)
    else {
        return Err(PrepareError(problems));
    };
    if !problems.is_empty() {
        return Err(PrepareError(problems));
    }
    rewritten.notes.extend(replaced);
    let config = of_boot(Config { debug, ..config }, &annotations, &rewritten);
    let size = size::size(&config, &annotations, pod, rewritten.limits, host::size());
    let mut boot = Bootable::new(sandbox.id, config, host, size, &extras);
    // A pod's later containers may need some.
    boot.machine.guest.disks = role != Role::None || disks.any() || rewritten.has_disks();
    if user.is_some() {
        rewritten.use_network_of_vm();
        boot.machine.user_network.clone_from(&user);
    }
    Ok(Prepared {
        rewritten,
        root: PlannedRoot::none(),
        ignored,
        ignored_options: Vec::new(),
        boot,
        network,
        user,
        requested,
        extras,
        disks,
        sources,
        workspace: annotations.workspace,
        role,
    })
}

/// The disks that a container asks for; none if other problems hide it.
fn requested_disks(
    annotations: Option<&Annotations>,
    rewritten: Option<&Rewritten>,
    config: &Config,
    problems: &mut Vec<String>,
) -> RequestedDisks {
    let requested = annotations.zip(rewritten).map(|(annotations, rewritten)| {
        collect(RequestedDisks::of(annotations, config, rewritten), problems).unwrap_or_default()
    });
    requested.unwrap_or_default()
}

/// The configuration for the VM of a container with these annotations.
fn of_boot(mut config: Config, annotations: &Annotations, rewritten: &Rewritten) -> Config {
    let announced = rewritten.announced_links.try_into().map_or(MAX_SPARE_NICS, |links: u32| links.min(MAX_SPARE_NICS));
    config.balloon_target_mib = annotations.balloon_target_mib.or(config.balloon_target_mib);
    config.spare_nics = annotations.spare_nics.unwrap_or(config.spare_nics.max(announced));
    config
}

/// The guest's kernel would reject the namespace with a message that does not explain it.
fn forbidden_namespace(spec: &Spec, config: &Config) -> Option<Problem> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let wanted = namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let why = "husk's configuration does not allow user namespaces: user_namespaces = false";
    (wanted && !config.user_namespaces).then(|| Problem::quoted("linux.namespaces[].type", "user", why))
}

/// A workspace may hold secrets: neither the guest's spec, nor hooks, nor the state may contain it.
fn remove_workspace(spec: &mut Spec) {
    if let Some(annotations) = spec.annotations_mut() {
        annotations.remove(names::WORKSPACE);
    }
}

/// Checks a network namespace that the spec names.
fn claim_network(network: &HostNetwork) -> Result<Claim, Vec<String>> {
    claim(&network.path).map_err(|error| vec![format!("{}: {}", network.field, Chain(&error))])
}

fn requested_network(annotations: &Annotations) -> RequestedNetwork {
    RequestedNetwork { mode: annotations.network, ports: annotations.ports.clone() }
}

/// Adds the problems of a failed check to `problems`.
fn collect<T, P: ToString>(checked: Result<T, Vec<P>>, problems: &mut Vec<String>) -> Option<T> {
    checked.map_err(|found| problems.extend(found.iter().map(ToString::to_string))).ok()
}

/// Reads a bundle's `config.json`.
fn read_spec(bundle: &Path) -> Result<Parsed, PrepareError> {
    let path = bundle.join("config.json");
    let bytes =
        std::fs::read(&path).map_err(|error| PrepareError(vec![format!("read {}: {error}", path.display())]))?;
    parse(&bytes).map_err(|problems| all(problems.0))
}

fn read_annotations(spec: &Spec, config: &Config, namespace: &str) -> Result<Annotations, Vec<Problem>> {
    let none = HashMap::new();
    annotations::read(spec.annotations().as_ref().unwrap_or(&none), config, namespace)
}

/// Opens the extras of a VM that has to be booted, or compares them with those of the booted VM.
fn open_extras(
    extras: &Extras,
    booted_with: Option<&Extras>,
    config: &Config,
) -> Result<Vec<OpenedFile>, Vec<Problem>> {
    if let Some(booted_with) = booted_with {
        let beyond = extras.beyond(booted_with);
        return if beyond.is_empty() { Ok(Vec::new()) } else { Err(beyond) };
    }
    match (files::open(extras, config.extras_max_mib), extras.missing()) {
        (Ok(sources), None) => Ok(sources),
        (opened, missing) => Err(opened.err().into_iter().flatten().chain(missing).collect()),
    }
}

/// The VMM and the plan that boot the machine of `prepared`.
pub fn plan(prepared: &Prepared, attachments: Attachments) -> (Box<dyn Vmm>, BootPlan) {
    prepared.boot.plan(attachments, prepared.oom_score_adj(), prepared.workspace.clone())
}

#[cfg(test)]
mod tests;
