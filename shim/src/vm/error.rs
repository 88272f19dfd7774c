//! Why a VM did not boot.

use std::io;
use std::time::Duration;

use husk_protos::chain::Chain;

use crate::extras::disk::DiskError;
use crate::guest::client::GuestError;
use crate::guest::link::LinkError;
use crate::metadata::MetadataError;
use crate::network::NetworkError;
use crate::state::StateError;
use crate::state::ports::PortError;
use crate::state::users::UserError;
use crate::vm::cgroup::CgroupError;
use crate::vm::follow::FollowError;
use crate::vm::virtiofsd::VirtiofsdError;
use crate::vmm::VmmError;

/// Why a VM did not boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The machine's process.
    #[error(transparent)]
    Machine(#[from] VmmError),
    /// The extras disk.
    #[error(transparent)]
    Extras(#[from] DiskError),
    /// The share's process.
    #[error(transparent)]
    Virtiofsd(#[from] VirtiofsdError),
    /// The vsock device.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The sandbox's network namespace.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The sandbox's network in the guest.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// The host's ports.
    #[error(transparent)]
    Ports(#[from] PortError),
    /// The machine's user.
    #[error(transparent)]
    User(#[from] UserError),
    /// The metadata service.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The journal.
    #[error(transparent)]
    State(#[from] StateError),
    /// A file or socket of the VM.
    #[error("{what}")]
    Io {
        /// The attempted operation.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// The VM ended before it was ready.
    #[error("the VM ended while it booted: {cause}{}", last_lines(console))]
    Ended {
        /// Which process ended, and how.
        cause: String,
        /// The last lines of the console and of the logs.
        console: String,
    },
    /// The VM was not ready in time.
    #[error("the VM was not ready after {}{}", limit(*deadline, *waited), last_lines(console))]
    Deadline {
        /// The time limit.
        deadline: Duration,
        /// For how long the machine has waited for a CPU besides.
        waited: Duration,
        /// The console's last lines.
        console: String,
    },
    /// A shutdown was requested meanwhile.
    #[error("the VM was not ready {} ms after a shutdown was requested", limit.as_millis())]
    GivenUp {
        /// The time limit.
        limit: Duration,
    },
    /// The guest sent its hello, but did not answer in time what follows.
    #[error("the guest was not ready {} ms after its hello: {step}", limit.as_millis())]
    Unanswered {
        /// What the guest did not answer.
        step: &'static str,
        /// The time limit of all steps together.
        limit: Duration,
    },
    /// The guest's hello is malformed.
    #[error("read the guest's hello")]
    Hello(#[from] husk_protos::frame::FrameError),
    /// The guest sent its hello, but cannot be called.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

impl BootError {
    /// The error and its causes without the console's lines.
    pub(crate) fn cause(&self) -> String {
        match self {
            Self::Ended { cause, .. } => cause.clone(),
            Self::Deadline { deadline, waited, .. } => {
                format!("it was not ready after {}", limit(*deadline, *waited))
            }
            other => Chain(other).to_string(),
        }
    }
}

/// A deadline, and the time for a CPU beyond it that is worth a word.
fn limit(deadline: Duration, waited: Duration) -> String {
    let deadline_ms = deadline.as_millis();
    match waited < deadline / 10 {
        true => format!("{deadline_ms} ms"),
        false => format!("{deadline_ms} ms and {} ms of waiting for a CPU of the host", waited.as_millis()),
    }
}

/// An I/O error with the attempted operation.
pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> BootError {
    move |source| BootError::Io { what: what.into(), source }
}

/// Quotes each line: a guest could otherwise forge lines of whoever shows the error.
fn last_lines(text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    let quoted: String = text.lines().map(|line| format!("\n  | {line}")).collect();
    format!("; its console's last lines:{quoted}")
}
