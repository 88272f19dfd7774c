//! Exec: runs another process in a container.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use husk_protos::CONTAINERS_CGROUP;
use husk_protos::chain::Chain;
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::errno::Errno;
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use pathrs::Root;

use super::executor::StartFailure;
use super::identity::Identity;
use super::libcontainer::{decode, load, start_error};
use super::{Executed, guard, spec, streams};
use crate::error::{CallError, FailureKind};
use crate::{cgroup, paths};

/// Runs the process that the file `path` describes.
pub(super) fn exec(id: &str, path: &Path, console: Option<&Path>) -> Result<Executed, CallError> {
    let container = load(id)?;
    let config = container.bundle().join("config.json");
    let spec = Spec::load(&config).map_err(|e| CallError::internal(format_args!("read {}", config.display()), &e))?;

    let mut process = read(path)?;
    check_cwd(&container, process.cwd())?;
    let mut ignored = Vec::new();
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let (mut changed, workload) = spec::adapt_exec(&mut process, seccomp, &mut ignored);
    streams::give_to(&spec, process.user().uid())
        .map_err(|e| CallError::internal(format_args!("change the owner of an exec's pipes in {id}"), &e))?;
    // As in runc's shim, the request overrides the spec.
    if process.terminal().unwrap_or(false) != console.is_some() {
        process.set_terminal(Some(console.is_some()));
        changed = true;
    }
    let identity = if has_user_namespace(&spec) {
        changed = true;
        let identity = Identity::take(&mut process, init_pid(&container));
        Some(identity.map_err(|e| CallError::internal(format_args!("open the user namespace of {id}"), &e))?)
    } else {
        None
    };
    if changed {
        write(path, &process).map_err(|e| CallError::internal(format_args!("write {}", path.display()), &e))?;
    }
    let sub_cgroup = sub_cgroup(id, &container)?;
    guard::forbid_vsock_unless_allowed(&spec)?;
    let failure = StartFailure::new().map_err(|e| CallError::internal("create a memory file", &e))?;
    let executed = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(workload.gated(console.is_some()).reporting(&failure).becoming(identity))
        .with_console_socket(console)
        .with_root_path(paths::STATE)
        .and_then(|builder| {
            builder
                .as_tenant()
                .with_process(Some(path))
                .with_sub_cgroup(sub_cgroup)
                .with_detach(true)
                .as_sibling(true)
                .build()
        })
        .map(|pid| Executed { pid: pid.as_raw(), ignored })
        .map_err(|e| start_error("exec in", id, &failure, &e));
    if let Some(console) = console {
        remove_console_links(id, console)?;
    }
    executed
}

fn init_pid(container: &Container) -> i32 {
    container.pid().map_or(0, |pid| pid.as_raw())
}

/// Removes the links to the console socket that libcontainer leaves in the container's state directory, under names
/// that it chooses.
fn remove_console_links(id: &str, console: &Path) -> Result<(), CallError> {
    let state = paths::state(id);
    let failed = |e: io::Error| CallError::internal(format_args!("remove a link in {}", state.display()), &e);
    for entry in std::fs::read_dir(&state).map_err(failed)?.flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == console) {
            std::fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Checks that the working directory exists, and names it if not: libcontainer's error says only that a syscall failed.
fn check_cwd(container: &Container, cwd: &Path) -> Result<(), CallError> {
    // Resolves links inside the container's root. The trailing slash makes open(2) follow procfs's own link.
    let checked = Root::open(format!("/proc/{}/root/", init_pid(container)))
        .and_then(|root| root.resolve(cwd))
        .map_err(|e| match e.kind() {
            pathrs::error::ErrorKind::OsError(Some(errno)) => Errno::from_raw(errno).desc().to_lowercase(),
            _ => Chain(&e).to_string(),
        })
        .and_then(|handle| match File::from(OwnedFd::from(handle)).metadata() {
            Ok(metadata) if metadata.is_dir() => Ok(()),
            Ok(_) => Err(Errno::ENOTDIR.desc().to_lowercase()),
            Err(e) => Err(e.to_string()),
        });
    checked.map_err(|reason| {
        let what = format!("process.cwd: chdir to {}: {reason}", cwd.display());
        CallError::new(FailureKind::InvalidArgument, what)
    })
}

fn has_user_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.is_some_and(|all| all.iter().any(|one| one.typ() == LinuxNamespaceType::User))
}

/// The cgroup below the container's own that an exec has to join: once the container's cgroup has controllers for its
/// children, the kernel accepts no process in it (cgroup-v2.rst, "No Internal Process Constraint"). Like runc, uses the
/// cgroup that the init has moved to.
fn sub_cgroup(id: &str, container: &Container) -> Result<Option<String>, CallError> {
    let failed = |e: &dyn std::error::Error| CallError::internal(format_args!("find a cgroup for an exec in {id}"), e);
    let controllers = std::fs::read_to_string(cgroup::of(id).join("cgroup.subtree_control")).map_err(|e| failed(&e))?;
    if controllers.trim().is_empty() {
        return Ok(None);
    }
    let cgroups = procfs::process::Process::new(init_pid(container)).and_then(|init| init.cgroups());
    let cgroups = cgroups.map_err(|e| failed(&e))?;
    let of_init = cgroups.0.iter().find(|cgroup| cgroup.hierarchy == 0).map_or("", |cgroup| cgroup.pathname.as_str());
    let own = Path::new(CONTAINERS_CGROUP).join(id);
    let below = Path::new(of_init).strip_prefix(own).map_err(|_| {
        let what = format!("exec in {id}: its cgroup is delegated, but its init has moved out of it to {of_init}");
        CallError::new(FailureKind::FailedPrecondition, what)
    })?;
    Ok(Some(below.to_string_lossy().into_owned()))
}

/// Uses the same writer as libcontainer, for the reason given at [`decode`].
fn write(path: &Path, process: &Process) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    serde_json::to_writer(&mut file, process)?;
    file.flush()
}

fn read(path: &Path) -> Result<Process, CallError> {
    let invalid = |what: String| CallError::new(FailureKind::InvalidArgument, what);
    let file = File::open(path).map_err(|e| CallError::internal(format_args!("read {}", path.display()), &e))?;
    let process: Process = decode(file).map_err(|e| invalid(format!("process of an exec: {e}")))?;
    let problems = spec::check_process(&process);
    if problems.is_empty() { Ok(process) } else { Err(invalid(problems.join("; "))) }
}
