//! Responses from the shim's own records, for calls that the guest cannot answer because the VM is dead.

use containerd_shim_protos::api::{DeleteResponse, StateResponse, Status};
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, MessageField};

use crate::sandbox::container::Container;
use crate::sandbox::container::process::{EXIT_RECORDED, Process};
use crate::sandbox::error::SandboxError;

/// The recorded state of a process.
pub(super) fn state(process: &Process) -> StateResponse {
    let exit = process.exit();
    StateResponse {
        pid: process.pid(),
        status: EnumOrUnknown::new(if exit.is_some() { Status::STOPPED } else { Status::UNKNOWN }),
        exit_status: exit.as_ref().map_or(0, |exit| exit.status),
        exited_at: exit.map_or_else(MessageField::none, |exit| MessageField::some(exit.at)),
        ..Default::default()
    }
}

/// Waits for the record of the exit and publishes the deletion in the guest's place. The processes died with the guest,
/// so nothing else is left to delete.
pub(super) async fn delete(container: &Container, process: &Process) -> Result<DeleteResponse, SandboxError> {
    let exit = match tokio::time::timeout(EXIT_RECORDED, process.exited()).await {
        Ok(Some(exit)) => exit,
        _ => {
            let id = if process.exec_id.is_empty() { &container.id } else { &process.exec_id };
            return Err(SandboxError::NotStopped { task: container.id.clone(), id: id.clone() });
        }
    };
    if process.exec_id.is_empty() {
        container.deleted_without_guest(exit.clone(), Timestamp::now());
    }
    Ok(DeleteResponse {
        pid: process.pid(),
        exit_status: exit.status,
        exited_at: MessageField::some(exit.at),
        ..Default::default()
    })
}
