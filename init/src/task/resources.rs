//! A container's resources: Stats, Pids and Update.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use containerd_shim_protos::api::{ProcessInfo, UpdateTaskRequest};
use husk_protos::runc_options::ProcessDetails;
use nix::sys::memfd::{MFdFlags, memfd_create};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use super::Tasks;
use super::process::ProcessState;
use crate::cgroup::{self, stats};
use crate::error::{CallError, FailureKind};
use crate::spawn::ChildStreams;
use crate::worker::{Reply, Request};

/// End of the type URL under which containerd sends the JSON of `LinuxResources`.
const RESOURCES: &str = "/LinuxResources";

impl Tasks {
    /// Changes a container's limits. A failed update leaves all limits unchanged. Fails with InvalidArgument, naming
    /// every problem, or with FailedPrecondition if the container has stopped.
    pub(crate) async fn update(self: &Arc<Self>, request: UpdateTaskRequest) -> Result<(), CallError> {
        let id = request.id;
        let container = self.container(&id)?;
        container.require_not_stopped("update")?;
        let resources = request.resources.unwrap_or_default();
        if !resources.type_url.ends_with(RESOURCES) {
            let what = format!("update {id}: {:?} is not the type of Linux resources", resources.type_url);
            return Err(CallError::new(FailureKind::InvalidArgument, what));
        }
        let input = memory_file(&resources.value).map_err(|e| CallError::internal("pass resources to a worker", &e))?;
        let streams = ChildStreams { stdin: Some(input), ..ChildStreams::default() };
        let creation = self.reaper.creation();
        match self.workers.run(&creation, &Request::Update { id: id.clone() }, streams).await? {
            Reply::Updated(all) => {
                for ignored in all {
                    tracing::warn!(container = id, "ignored part of an update: {ignored}");
                }
                Ok(())
            }
            other => Err(other.unexpected(&format!("update {id}"))),
        }
    }

    /// Returns a container's resource usage as containerd's `io.containerd.cgroups.v2.Metrics`.
    pub(crate) fn stats(&self, id: &str) -> Result<Any, CallError> {
        let container = self.container(id)?;
        let failed = |e: &dyn std::error::Error| CallError::internal(format_args!("measure {id}"), e);
        let mut metrics = stats::measure(&container.cgroup()).map_err(|e| failed(&e))?;
        if let ProcessState::Created { pid } | ProcessState::Running { pid } = container.init.state() {
            metrics.network = stats::network(pid);
        }
        let value = metrics.write_to_bytes().map_err(|e| failed(&e))?;
        Ok(Any { type_url: husk_protos::METRICS.into(), value, ..Default::default() })
    }

    /// Lists a container's processes, execs with their IDs.
    pub(crate) fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>, CallError> {
        let container = self.container(id)?;
        let failed = |e: &dyn std::error::Error| CallError::internal(format_args!("list the processes of {id}"), e);
        let execs = container.all_execs();
        let info = |pid: i32| {
            let Some(exec) = execs.iter().find(|exec| exec.state() == ProcessState::Running { pid }) else {
                return Ok(ProcessInfo { pid: pid as u32, ..Default::default() });
            };
            let details = ProcessDetails { exec_id: exec.exec.clone(), ..Default::default() };
            let value = details.write_to_bytes().map_err(|e| failed(&e))?;
            let any = Any { type_url: husk_protos::PROCESS_DETAILS.into(), value, ..Default::default() };
            Ok(ProcessInfo { pid: pid as u32, info: Some(any).into(), ..Default::default() })
        };
        cgroup::processes(&container.cgroup()).map_err(|e| failed(&e))?.into_iter().map(info).collect()
    }
}

/// An anonymous file with these contents, positioned at its start.
fn memory_file(contents: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(contents)?;
    file.rewind()?;
    Ok(file.into())
}
