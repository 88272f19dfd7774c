//! Exec: another process in a container that runs.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::errno::Errno;
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use pathrs::Root;

use super::executor::Refusal;
use super::identity::Identity;
use super::serve::{decode, explain_start, load};
use super::{Executed, guard, spec};
use crate::error::{Error, Kind, chain};
use crate::{cgroup, places};

/// Runs the process.
pub fn exec(id: &str, process: &Path, console: Option<&Path>) -> Result<Executed, Error> {
    let container = load(id)?;
    let config = container.bundle().join("config.json");
    let spec = Spec::load(&config).map_err(|e| Error::internal(format_args!("read {}", config.display()), &e))?;

    let mut wanted = read(process)?;
    check_cwd(&container, wanted.cwd())?;
    let mut ignored = Vec::new();
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let (mut changed, workload) = spec::adapt_exec(&mut wanted, seccomp, &mut ignored);
    // The request's word counts, not the spec's, as with runc's shim.
    if wanted.terminal().unwrap_or(false) != console.is_some() {
        wanted.set_terminal(Some(console.is_some()));
        changed = true;
    }
    let identity = if has_user_namespace(&spec) {
        let init = container.pid().map_or(0, |pid| pid.as_raw());
        changed = true;
        let taken = Identity::take(&mut wanted, init);
        Some(taken.map_err(|e| Error::internal(format_args!("find the user namespace of {id}"), &e))?)
    } else {
        None
    };
    if changed {
        write(process, &wanted).map_err(|e| Error::internal(format_args!("write {}", process.display()), &e))?;
    }
    let below = delegate(id, &container)?;
    guard::load_unless_wanted(&spec)?;
    let refusal = Refusal::new().map_err(|e| Error::internal("make a memory file", &e))?;
    let built = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(workload.gated(console.is_some()).refusing(&refusal).becoming(identity))
        .with_console_socket(console)
        .with_root_path(places::STATE)
        .and_then(|builder| {
            builder
                .as_tenant()
                .with_process(Some(process))
                .with_sub_cgroup(below)
                .with_detach(true)
                .as_sibling(true)
                .build()
        })
        .map(|pid| Executed { pid: pid.as_raw(), ignored })
        .map_err(|e| explain_start("exec in", id, &refusal, &e));
    if let Some(console) = console {
        remove_links(id, console)?;
    }
    built
}

/// libcontainer leaves a link to the console's socket in the container's folder, by a name of its own choice.
fn remove_links(id: &str, console: &Path) -> Result<(), Error> {
    let folder = places::state(id);
    let failed = |e: std::io::Error| Error::internal(format_args!("remove a link in {}", folder.display()), &e);
    for entry in std::fs::read_dir(&folder).map_err(failed)?.flatten() {
        // Anything but a link to the socket is something else's.
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == console) {
            std::fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Names a working folder that is not there: libcontainer says no more than that a syscall has failed.
fn check_cwd(container: &Container, cwd: &Path) -> Result<(), Error> {
    let pid = container.pid().map_or(0, |pid| pid.as_raw());
    // Inside, whatever links are in it. The slash at the end makes the open follow procfs's link.
    let there = Root::open(format!("/proc/{pid}/root/"))
        .and_then(|root| root.resolve(cwd))
        .map_err(|e| match e.kind() {
            pathrs::error::ErrorKind::OsError(Some(errno)) => Errno::from_raw(errno).desc().to_lowercase(),
            _ => chain(&e),
        })
        .and_then(|folder| match File::from(OwnedFd::from(folder)).metadata() {
            Ok(metadata) if metadata.is_dir() => Ok(()),
            Ok(_) => Err(Errno::ENOTDIR.desc().to_lowercase()),
            Err(e) => Err(e.to_string()),
        });
    there.map_err(|why| Error::new(Kind::InvalidArgument, format!("process.cwd: chdir to {}: {why}", cwd.display())))
}

fn has_user_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.is_some_and(|all| all.iter().any(|one| one.typ() == LinuxNamespaceType::User))
}

/// The group to join below the container's own, if that has none to give: once it has controllers for groups below it, the kernel lets no
/// process into it (cgroup-v2.rst, "No Internal Process Constraint"). It is the one that the init has moved to, as with runc.
fn delegate(id: &str, container: &Container) -> Result<Option<String>, Error> {
    let group = cgroup::of(id);
    let failed = |e: std::io::Error| Error::internal(format_args!("find a cgroup for an exec in {id}"), &e);
    if std::fs::read_to_string(group.join("cgroup.subtree_control")).map_err(failed)?.trim().is_empty() {
        return Ok(None);
    }
    let pid = container.pid().map_or(0, |pid| pid.as_raw());
    let of_init = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(failed)?;
    let path = of_init.trim_end().strip_prefix("0::").unwrap_or_default();
    let own = Path::new(husk_protos::CONTAINERS_CGROUP).join(id);
    let below = Path::new(path).strip_prefix(own).map_err(|_| {
        let what = format!("exec in {id}: its cgroup is delegated, and its init has left it for {path}");
        Error::new(Kind::FailedPrecondition, what)
    })?;
    Ok(Some(below.to_string_lossy().into_owned()))
}

/// With the writer that the libraries use too, as for [`decode`].
fn write(path: &Path, process: &Process) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    serde_json::to_writer(&mut file, process)?;
    file.flush()
}

fn read(path: &Path) -> Result<Process, Error> {
    let file = File::open(path).map_err(|e| Error::internal(format_args!("read {}", path.display()), &e))?;
    let process: Process =
        decode(file).map_err(|e| Error::new(Kind::InvalidArgument, format!("process of an exec: {e}")))?;
    let problems = spec::check_process(&process);
    if problems.is_empty() { Ok(process) } else { Err(Error::new(Kind::InvalidArgument, problems.join("; "))) }
}
