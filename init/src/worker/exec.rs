//! Exec: another process in a container that runs.

use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{Process, Spec};

use super::serve::{explain, load};
use super::{guard, spec};
use crate::error::{Error, Kind};
use crate::places;

/// Runs the process and answers its pid in the guest's pid namespace.
pub fn exec(id: &str, process: &Path, console: Option<&Path>) -> Result<i32, Error> {
    let container = load(id)?;
    let config = container.bundle().join("config.json");
    let spec = Spec::load(&config).map_err(|e| Error::internal(format_args!("read {}", config.display()), &e))?;

    let mut wanted = read(process)?;
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let (mut changed, workload) = spec::adapt_exec(&mut wanted, seccomp);
    // The request's word counts, not the spec's, as with runc's shim.
    if wanted.terminal().unwrap_or(false) != console.is_some() {
        wanted.set_terminal(Some(console.is_some()));
        changed = true;
    }
    if changed {
        let bytes = serde_json::to_vec(&wanted).map_err(|e| Error::internal("encode a process", &e))?;
        std::fs::write(process, bytes).map_err(|e| Error::internal(format_args!("write {}", process.display()), &e))?;
    }
    guard::load_unless_wanted(&spec)?;
    let built = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(workload.gated(console.is_some()))
        .with_console_socket(console)
        .with_root_path(places::STATE)
        .and_then(|builder| builder.as_tenant().with_process(Some(process)).with_detach(true).as_sibling(true).build())
        .map(|pid| pid.as_raw())
        .map_err(|e| explain("exec in", id, &e));
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

fn read(path: &Path) -> Result<Process, Error> {
    let bytes = std::fs::read(path).map_err(|e| Error::internal(format_args!("read {}", path.display()), &e))?;
    let process: Process = serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::InvalidArgument, format!("process of an exec: {e}")))?;
    let problems = spec::check_process(&process);
    if problems.is_empty() { Ok(process) } else { Err(Error::new(Kind::InvalidArgument, problems.join("; "))) }
}
