//! What is still answered when the VM is dead: from the shim's own records, in the guest's place.

use containerd_shim_protos::api::{DeleteResponse, StateResponse, Status};
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, MessageField};

use crate::sandbox::container::process::Process;
use crate::sandbox::container::{Container, EXIT_RECORDED};
use crate::sandbox::error::Error;

/// The guest is gone, but what is known of the process is still answered.
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

/// With the guest, everything has ended: what remains is to wait for the record of it, and to report the deletion in its place.
pub(super) async fn delete(container: &Container, process: &Process) -> Result<DeleteResponse, Error> {
    let exit = match tokio::time::timeout(EXIT_RECORDED, process.exited()).await {
        Ok(Some(exit)) => exit,
        _ => {
            let id = if process.exec_id.is_empty() { &container.id } else { &process.exec_id };
            return Err(Error::NotStopped { task: container.id.clone(), id: id.clone() });
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
