//! What the worker's operations share: loading a container, reading JSON, and mapping libcontainer's errors.

use std::fs::File;
use std::io::BufReader;

use husk_protos::chain::Chain;
use libcontainer::container::Container;
use libcontainer::error::LibcontainerError;
use serde::de::DeserializeOwned;

use super::executor::StartFailure;
use crate::error::{CallError, FailureKind};
use crate::paths;

/// Loads libcontainer's record of a container.
pub(super) fn load(id: &str) -> Result<Container, CallError> {
    Container::load(paths::state(id)).map_err(|e| call_error("load", id, &e))
}

/// Decodes a JSON file. A different reader than the one that libcontainer uses would add a second copy of the spec's
/// decoder to the binary.
pub(super) fn decode<T: DeserializeOwned>(file: File) -> serde_json::Result<T> {
    serde_json::from_reader(BufReader::new(file))
}

pub(super) fn call_error(operation: &str, id: &str, error: &LibcontainerError) -> CallError {
    let kind = match error {
        LibcontainerError::Exist => FailureKind::AlreadyExists,
        LibcontainerError::NoDirectory => FailureKind::NotFound,
        LibcontainerError::IncorrectStatus(_) => FailureKind::FailedPrecondition,
        LibcontainerError::InvalidSpec(_) | LibcontainerError::InvalidInput(_) | LibcontainerError::InvalidID(_) => {
            FailureKind::InvalidArgument
        }
        _ => FailureKind::Internal,
    };
    CallError::new(kind, format!("{operation} {id}: {}", Chain(error)))
}

/// The error of a process that could not be started. If the process reported why, the message is runc's, otherwise
/// libcontainer's.
pub(super) fn start_error(operation: &str, id: &str, failure: &StartFailure, error: &LibcontainerError) -> CallError {
    match failure.reason() {
        Some(reason) => {
            let what = format!("{operation} {id}: unable to start container process: {reason}");
            CallError::new(FailureKind::Internal, what)
        }
        None => call_error(operation, id, error),
    }
}
