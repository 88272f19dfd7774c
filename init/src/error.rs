//! What a call of the host can be answered with instead of success: kinds that clients branch on, and the one map onto TTRPC's codes.

use serde::{Deserialize, Serialize};
use ttrpc::{Code, get_status};

/// A call that failed. Crosses the border between worker and PID 1 as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What a client branches on.
    pub kind: Kind,
    /// What was tried, with what, and why it failed.
    pub message: String,
}

/// Kinds of failure, named after the codes that they become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Kind {
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    Unimplemented,
    DeadlineExceeded,
    Aborted,
    Internal,
}

impl Error {
    /// An error of `kind`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A failure that says nothing about the call: `what` could not be done because of `source`, told with its causes.
    pub fn internal(what: impl std::fmt::Display, source: &dyn std::error::Error) -> Self {
        Self::new(Kind::Internal, format!("{what}: {}", chain(source)))
    }
}

/// An error with all that caused it. Many of the libraries' errors say only "failed syscall" by themselves.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Transparent errors repeat their cause.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match error.kind {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Kind::Aborted => Code::ABORTED,
            Kind::Internal => Code::INTERNAL,
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
    fn causes_are_told_once_each() {
        let outer = Outer(std::io::Error::other("inner"));
        assert_eq!(chain(&outer), "outer: inner");
        assert_eq!(chain(&Transparent(outer)), "outer: inner");
    }
}
