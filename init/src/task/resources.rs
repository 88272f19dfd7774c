//! What a container uses and what it may use: Stats, Pids and Update.

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
use super::process::State;
use crate::cgroup::{self, stats};
use crate::error::{Error, Kind};
use crate::worker::client::Streams;
use crate::worker::{Reply, Request};

/// containerd's name for the JSON of what an update changes.
const RESOURCES: &str = "/LinuxResources";

impl Tasks {
    /// Gives a container other limits.
    ///
    /// # Errors
    /// InvalidArgument with everything that cannot be; FailedPrecondition when it has ended. Its limits are then as before.
    pub async fn update(self: &Arc<Self>, request: UpdateTaskRequest) -> Result<(), Error> {
        let id = request.id;
        let container = self.container(&id)?;
        container.must_be_there("update")?;
        let invalid = |what: String| Error::new(Kind::InvalidArgument, format!("update {id}: {what}"));
        let any = request.resources.unwrap_or_default();
        if !any.type_url.ends_with(RESOURCES) {
            return Err(invalid(format!("{:?} are not Linux resources", any.type_url)));
        }
        let input = in_memory(&any.value).map_err(|e| Error::internal("pass resources on", &e))?;
        let streams = Streams { stdin: Some(input), ..Streams::default() };
        let creation = self.reaper.creation();
        match self.workers.run(&creation, &Request::Update { id: id.clone() }, streams).await? {
            Reply::Done => Ok(()),
            other => Err(Error::new(Kind::Internal, format!("update {id}: a worker answered {other:?}"))),
        }
    }

    /// What a container uses, as containerd's `io.containerd.cgroups.v2.Metrics`.
    ///
    /// # Errors
    /// NotFound without it.
    pub fn stats(&self, id: &str) -> Result<Any, Error> {
        let container = self.container(id)?;
        let failed = |e: &dyn std::error::Error| Error::internal(format_args!("measure {id}"), e);
        let mut metrics = stats::measure(&container.group()).map_err(|e| failed(&e))?;
        if let State::Created { pid } | State::Running { pid } = container.init.state() {
            metrics.network = stats::network(pid);
        }
        let value = metrics.write_to_bytes().map_err(|e| failed(&e))?;
        Ok(Any { type_url: husk_protos::METRICS.into(), value, ..Default::default() })
    }

    /// A container's processes; of execs with their ids.
    ///
    /// # Errors
    /// NotFound without it.
    pub fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>, Error> {
        let container = self.container(id)?;
        let failed = |e: &dyn std::error::Error| Error::internal(format_args!("list the processes of {id}"), e);
        let execs = container.all_execs();
        let info = |pid: i32| {
            let Some(exec) = execs.iter().find(|exec| exec.state() == State::Running { pid }) else {
                return Ok(ProcessInfo { pid: pid as u32, ..Default::default() });
            };
            let details = ProcessDetails { exec_id: exec.exec.clone(), ..Default::default() };
            let value = details.write_to_bytes().map_err(|e| failed(&e))?;
            let any = Any { type_url: husk_protos::PROCESS_DETAILS.into(), value, ..Default::default() };
            Ok(ProcessInfo { pid: pid as u32, info: Some(any).into(), ..Default::default() })
        };
        cgroup::processes(&container.group()).map_err(|e| failed(&e))?.into_iter().map(info).collect()
    }
}

/// A file that is nowhere, to be read from its beginning.
fn in_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}
