//! Create: from a bundle to a container whose init waits for its start.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use pathrs::Root;

use super::executor::{Refusal, Workload};
use super::hooks::StartHooks;
use super::serve::{explain, explain_start};
use super::{Created, devices, guard, spec};
use crate::error::{Error, Kind};
use crate::{cgroup, places};

/// Makes the container. On failure PID 1 removes what stands in the container's cgroup and state folder.
pub fn create(id: &str, bundle: &Path, console: Option<&Path>) -> Result<Created, Error> {
    let config = bundle.join("config.json");
    let mut spec = Spec::load(&config)
        .map_err(|e| Error::new(Kind::InvalidArgument, format!("spec of {id}: {}", crate::error::chain(&e))))?;
    spec::check(&spec)
        .map_err(|problems| Error::new(Kind::InvalidArgument, format!("spec of {id}: {}", problems.join("; "))))?;
    spec::check_terminal(spec.process().as_ref(), console.is_some())?;
    let (changed, ignored) = spec::adapt(&mut spec, id);
    let hooks = StartHooks::take(&mut spec, id, bundle)
        .map_err(|e| Error::internal(format_args!("take the startContainer hooks of {id}"), &e))?;
    let start_hooks = hooks.is_some();
    if changed || start_hooks {
        spec.save(&config).map_err(|e| Error::internal(format_args!("write {}", config.display()), &e))?;
    }

    prepare_root(&spec, bundle)?;

    // Made before libcontainer looks for it: it would enable every controller anew at each level. The device rules hold before the
    // first process is in it, and its devices are made under them, as runc does it.
    let group = cgroup::of(id);
    fs::create_dir(&group).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => Error::new(Kind::AlreadyExists, format!("cgroup of {id} exists")),
        _ => Error::internal(format_args!("create cgroup of {id}"), &e),
    })?;
    cgroup::tree::limit(&group).map_err(|e| Error::internal(format_args!("limit the cgroups of {id}"), &e))?;
    devices::restrict(&group, &spec::device_rules(&spec)).map_err(|e| match e {
        devices::Error::TooMany(_) => {
            Error::new(Kind::InvalidArgument, format!("spec of {id}: linux.resources.devices: {e}"))
        }
        devices::Error::Kernel(_) => Error::internal(format_args!("apply the device rules of {id}"), &e),
    })?;
    guard::load_unless_wanted(&spec)?;

    let refusal = Refusal::new().map_err(|e| Error::internal("make a memory file", &e))?;
    let container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(Workload::default().gated(console.is_some()).refusing(&refusal).hooked(hooks))
        .with_console_socket(console)
        .with_root_path(places::STATE)
        .and_then(|builder| builder.as_init(bundle).as_sibling(true).with_systemd(false).with_detach(true).build())
        .map_err(|e| explain_start("create", id, &refusal, &e))?;
    answer(container, &spec, start_hooks, ignored)
}

/// Names a root that is not there, and makes the process's working folder in it, as runc does.
fn prepare_root(spec: &Spec, bundle: &Path) -> Result<(), Error> {
    let Some(root) = spec.root().as_ref().map(|root| bundle.join(root.path())) else { return Ok(()) };
    let bad = |e: &dyn std::error::Error| {
        Error::new(Kind::InvalidArgument, format!("root.path: {}: {}", root.display(), crate::error::chain(e)))
    };
    if !fs::metadata(&root).map_err(|e| bad(&e))?.is_dir() {
        return Err(bad(&std::io::Error::from(ErrorKind::NotADirectory)));
    }
    let Some(cwd) = spec.process().as_ref().map(|process| process.cwd()) else { return Ok(()) };
    // The quick look may follow a link out of the root; what is made is made inside, whatever links are in it.
    if !root.join(cwd.strip_prefix("/").unwrap_or(cwd)).is_dir() {
        let made = Root::open(&root).and_then(|root| root.mkdir_all(cwd, &Permissions::from_mode(0o755)));
        if let Err(error) = made {
            // A read-only root, or a mount of the spec that will bring it: if not, entering it fails by name.
            tracing::debug!(cwd = %cwd.display(), %error, "make the working folder");
        }
    }
    Ok(())
}

fn answer(mut container: Container, spec: &Spec, start_hooks: bool, ignored: Vec<String>) -> Result<Created, Error> {
    let id = container.id().to_owned();
    let pid = container.pid().ok_or_else(|| Error::new(Kind::Internal, format!("{id} was created without a pid")))?;
    let hooks = spec.hooks().as_ref();
    let poststart_hooks = hooks.is_some_and(|hooks| hooks.poststart().as_ref().is_some_and(|list| !list.is_empty()));
    let poststop_hooks = hooks.is_some_and(|hooks| hooks.poststop().as_ref().is_some_and(|list| !list.is_empty()));
    if !poststart_hooks {
        // libcontainer's own record, which it reads again for every exec, says already now what will be true once it is started: PID 1 starts
        // most containers without a worker, and nobody asks in between.
        container.set_status(ContainerStatus::Running).save().map_err(|e| explain("record", &id, &e))?;
    }
    let own_pid_namespace = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref())
        .is_some_and(|all| all.iter().any(|one| one.typ() == LinuxNamespaceType::Pid && one.path().is_none()));
    let start_hooks = start_hooks || poststart_hooks;
    Ok(Created { pid: pid.as_raw(), own_pid_namespace, start_hooks, poststop_hooks, ignored })
}
