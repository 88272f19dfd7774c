//! Create: turns a bundle into a container whose init waits for its start.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use husk_protos::chain::Chain;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use pathrs::Root;

use super::copy_up::Filler;
use super::devices::DeviceRulesError;
use super::executor::{StartFailure, Workload};
use super::hooks::StartHooks;
use super::libcontainer::{call_error, start_error};
use super::stage::Stage;
use super::{Created, devices, guard, id_map, mounts, namespaces, spec, streams, sysctls, user_namespace};
use crate::cgroup::limits;
use crate::error::{CallError, FailureKind};
use crate::{cgroup, paths};

/// Creates the container. If this fails, PID 1 removes the container's cgroup and state directory.
pub(super) fn create(id: &str, bundle: &Path, console: Option<&Path>) -> Result<Created, CallError> {
    let invalid = |what: String| CallError::new(FailureKind::InvalidArgument, format!("spec of {id}: {what}"));
    let config = bundle.join("config.json");
    let mut spec = Spec::load(&config).map_err(|e| invalid(Chain(&e).to_string()))?;
    spec::check(&spec).map_err(|problems| invalid(problems.join("; ")))?;
    spec::check_terminal(spec.process().as_ref(), console.is_some())?;
    user_namespace::prepare(&spec)?;
    let (changed, mut ignored) = spec::adapt(&mut spec, id);
    let network_sysctls = sysctls::take(&mut spec, sysctls::is_vms_namespace);
    let hooks = StartHooks::take(&mut spec, id, bundle)
        .map_err(|e| CallError::internal(format_args!("prepare the startContainer hooks of {id}"), &e))?;
    let start_hooks = hooks.is_some();
    prepare_root(&spec, bundle)?;
    create_cgroup(id, &spec)?;
    let absent = absent_page_sizes(&mut spec, id);
    // Until libcontainer has mounted them in the container.
    let _below = mounts::mount_below(bundle)?;
    let mounts_changed = adapt_mounts(&mut spec, id, bundle)?;
    let changed = changed || !absent.is_empty();
    ignored.extend(absent);
    if changed || start_hooks || !network_sysctls.is_empty() || mounts_changed {
        spec.save(&config).map_err(|e| CallError::internal(format_args!("write {}", config.display()), &e))?;
    }
    sysctls::write(&network_sysctls).map_err(|e| {
        let what = format!("create {id}: unable to start container process: error during container init: {e}");
        CallError::new(FailureKind::Internal, what)
    })?;
    let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
    streams::give_to(&spec, uid)
        .map_err(|e| CallError::internal(format_args!("change the owner of {id}'s pipes"), &e))?;
    guard::forbid_vsock_unless_allowed(&spec)?;

    let failure = StartFailure::new().map_err(|e| CallError::internal("create a memory file", &e))?;
    let container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(Workload::default().gated(console.is_some()).reporting(&failure).hooked(hooks))
        .with_console_socket(console)
        .with_root_path(paths::STATE)
        .and_then(|builder| builder.as_init(bundle).as_sibling(true).with_systemd(false).with_detach(true).build())
        .map_err(|e| start_error("create", id, &failure, &e))?;
    let created = record(container, &spec, start_hooks, ignored)?;
    namespaces::complete(&spec, id, created.pid)?;
    Ok(created)
}

/// Adapts the mounts, and fills those that begin with a copy. Returns whether anything has changed.
fn adapt_mounts(spec: &mut Spec, id: &str, bundle: &Path) -> Result<bool, CallError> {
    let Some(root) = spec.root().as_ref().map(|root| bundle.join(root.path())) else { return Ok(false) };
    let mut stage = Stage::default();
    let owner = Filler::owner(spec).map_err(|e| CallError::internal(format_args!("read {id}'s mapping"), &e))?;
    let mounts = spec.mounts_mut().as_deref_mut().unwrap_or_default();
    mounts::mount_sources(mounts)?;
    let mapped = id_map::apply(mounts, &mut stage)?;
    let mut filler = Filler { id, owner, stage };
    Ok(mounts::adapt(mounts, &root, |copy| filler.fill(copy))? || mapped)
}

/// Removes limits for huge pages that the guest does not have, and names them.
fn absent_page_sizes(spec: &mut Spec, id: &str) -> Vec<String> {
    let resources = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut());
    resources.map(|resources| limits::drop_absent_page_sizes(resources, &cgroup::of(id))).unwrap_or_default()
}

/// Checks that the root filesystem exists, links to it from the bundle, where an operator looks for it by the container's
/// ID, and like runc creates the process's working directory in it.
fn prepare_root(spec: &Spec, bundle: &Path) -> Result<(), CallError> {
    let Some(root) = spec.root().as_ref().map(|root| bundle.join(root.path())) else { return Ok(()) };
    let invalid = |e: &dyn std::error::Error| {
        let what = format!("root.path: {}: {}", root.display(), Chain(e));
        CallError::new(FailureKind::InvalidArgument, what)
    };
    if !fs::metadata(&root).map_err(|e| invalid(&e))?.is_dir() {
        return Err(invalid(&std::io::Error::from(ErrorKind::NotADirectory)));
    }
    if !root.starts_with(bundle) {
        symlink(&root, bundle.join("rootfs")).map_err(|e| CallError::internal("link to root.path", &e))?;
    }
    let Some(cwd) = spec.process().as_ref().map(|process| process.cwd()) else { return Ok(()) };
    // This quick check may follow a link out of the root. The creation below stays inside, whatever links the root
    // contains.
    if !root.join(cwd.strip_prefix("/").unwrap_or(cwd)).is_dir() {
        let created = Root::open(&root).and_then(|root| root.mkdir_all(cwd, &Permissions::from_mode(0o755)));
        if let Err(error) = created {
            // The root may be read-only, or a mount of the spec may provide the directory. If not, chdir fails later
            // and names it.
            tracing::debug!(cwd = %cwd.display(), error = %Chain(&error), "failed to create the working directory");
        }
    }
    Ok(())
}

/// Creates the container's cgroup before libcontainer does, which would enable every controller again at each level.
/// Like runc, applies the device rules before the first process enters the cgroup, so they also hold while the
/// container's devices are created.
fn create_cgroup(id: &str, spec: &Spec) -> Result<(), CallError> {
    let cgroup = cgroup::of(id);
    fs::create_dir(&cgroup).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => {
            CallError::new(FailureKind::AlreadyExists, format!("cgroup of {id} already exists"))
        }
        _ => CallError::internal(format_args!("create cgroup of {id}"), &e),
    })?;
    cgroup::tree::limit(&cgroup).map_err(|e| CallError::internal(format_args!("limit the cgroups of {id}"), &e))?;
    devices::restrict(&cgroup, &spec::device_rules(spec)).map_err(|e| match e {
        DeviceRulesError::TooMany(_) => {
            let what = format!("spec of {id}: linux.resources.devices: {}", Chain(&e));
            CallError::new(FailureKind::InvalidArgument, what)
        }
        DeviceRulesError::Bpf(_) => CallError::internal(format_args!("apply the device rules of {id}"), &e),
    })
}

/// Completes libcontainer's record of the container, and collects what PID 1 needs to know.
fn record(
    mut container: Container,
    spec: &Spec,
    start_hooks: bool,
    ignored: Vec<String>,
) -> Result<Created, CallError> {
    let id = container.id().to_owned();
    let pid = container
        .pid()
        .ok_or_else(|| CallError::new(FailureKind::Internal, format!("create {id}: libcontainer returned no pid")))?;
    let hooks = spec.hooks().as_ref();
    let poststart_hooks = hooks.is_some_and(|hooks| hooks.poststart().as_ref().is_some_and(|list| !list.is_empty()));
    let poststop_hooks = hooks.is_some_and(|hooks| hooks.poststop().as_ref().is_some_and(|list| !list.is_empty()));
    if !poststart_hooks {
        // Record the container as running before its start: PID 1 starts most containers without a worker, and
        // libcontainer reads the record only for execs.
        container.set_status(ContainerStatus::Running).save().map_err(|e| call_error("record", &id, &e))?;
    }
    let own_pid_namespace = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref())
        .is_some_and(|all| all.iter().any(|one| one.typ() == LinuxNamespaceType::Pid && one.path().is_none()));
    let start_hooks = start_hooks || poststart_hooks;
    Ok(Created { pid: pid.as_raw(), own_pid_namespace, start_hooks, poststop_hooks, ignored })
}
