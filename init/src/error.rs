//! The error of a call from the host, and its mapping to a TTRPC status code.

use husk_protos::chain::Chain;
use serde::{Deserialize, Serialize};
use ttrpc::{Code, get_status};

/// A failed call. Workers send it to PID 1 unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CallError {
    pub(crate) kind: FailureKind,
    /// The attempted operation, its subject, and the cause.
    pub(crate) message: String,
}

/// What clients branch on. Each variant is named after its TTRPC code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FailureKind {
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    Unimplemented,
    DeadlineExceeded,
    Aborted,
    Internal,
}

impl CallError {
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A failure that is not the caller's fault. The message contains `what` and every cause of `source`:
    /// libcontainer's outermost errors often say only "failed syscall".
    pub(crate) fn internal(what: impl std::fmt::Display, source: &dyn std::error::Error) -> Self {
        Self::new(FailureKind::Internal, format!("{what}: {}", Chain(source)))
    }
}

impl From<CallError> for ttrpc::Error {
    fn from(error: CallError) -> Self {
        let code = match error.kind {
            FailureKind::NotFound => Code::NOT_FOUND,
            FailureKind::AlreadyExists => Code::ALREADY_EXISTS,
            FailureKind::FailedPrecondition => Code::FAILED_PRECONDITION,
            FailureKind::InvalidArgument => Code::INVALID_ARGUMENT,
            FailureKind::Unimplemented => Code::UNIMPLEMENTED,
            FailureKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            FailureKind::Aborted => Code::ABORTED,
            FailureKind::Internal => Code::INTERNAL,
        };
        Self::RpcStatus(get_status(code, error.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error(transparent)]
    struct Transparent(Outer);

    #[test]
    fn an_internal_error_names_each_cause_once() {
        let outer = Outer(std::io::Error::other("inner"));
        assert_eq!(CallError::internal("call", &outer).message, "call: outer: inner");
        assert_eq!(CallError::internal("call", &Transparent(outer)).message, "call: outer: inner");
    }
}
