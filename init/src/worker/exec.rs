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
pub fn exec(id: &str, process: &Path) -> Result<i32, Error> {
    let container = load(id)?;
    let config = container.bundle().join("config.json");
    let spec = Spec::load(&config).map_err(|e| Error::internal(format_args!("read {}", config.display()), &e))?;

    let mut wanted = read(process)?;
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let (changed, workload) = spec::adapt_exec(&mut wanted, seccomp);
    if changed {
        let bytes = serde_json::to_vec(&wanted).map_err(|e| Error::internal("encode a process", &e))?;
        std::fs::write(process, bytes).map_err(|e| Error::internal(format_args!("write {}", process.display()), &e))?;
    }
    guard::load_unless_wanted(&spec)?;
    ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(workload)
        .with_root_path(places::STATE)
        .and_then(|builder| builder.as_tenant().with_process(Some(process)).with_detach(true).as_sibling(true).build())
        .map(|pid| pid.as_raw())
        .map_err(|e| explain("exec in", id, &e))
}

fn read(path: &Path) -> Result<Process, Error> {
    let bytes = std::fs::read(path).map_err(|e| Error::internal(format_args!("read {}", path.display()), &e))?;
    let process: Process = serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::InvalidArgument, format!("process of an exec: {e}")))?;
    let problems = spec::check_process(&process);
    if problems.is_empty() { Ok(process) } else { Err(Error::new(Kind::InvalidArgument, problems.join("; "))) }
}
