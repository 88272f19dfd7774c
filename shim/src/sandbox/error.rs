//! Why a call on a sandbox failed; `service` makes containerd's codes of it.

use std::sync::Arc;

use crate::guest::client as guest;
use crate::prepare;
use crate::rootfs::share::ShareError;
use crate::state::StateError;
use crate::vm::boot;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container or process.
    #[error("{what} {id:?}: not found")]
    NotFound {
        /// task or process.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The id is taken.
    #[error("{what} {id:?}: already exists")]
    AlreadyExists {
        /// task or process.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// It still runs.
    #[error("process {id:?} of task {task:?} must be stopped before deletion")]
    NotStopped {
        /// The container.
        task: String,
        /// The exec; the container's own id for its init.
        id: String,
    },
    /// Its init does not run any more.
    #[error("the init of task {task:?} has ended")]
    Ended {
        /// The container.
        task: String,
    },
    /// The VM is on its way out.
    #[error("the sandbox is stopping: its last container has been deleted")]
    Stopping,
    /// The VM is gone.
    #[error("the VM is gone: {cause}")]
    Dead {
        /// Why.
        cause: String,
    },
    /// The request, the spec, the annotations or the configuration are wrong.
    #[error("{0}")]
    Invalid(#[from] prepare::Error),
    /// The streams that were asked for.
    #[error(transparent)]
    Stdio(#[from] crate::stdio::StdioError),
    /// Asked for, but not supported.
    #[error("{0}")]
    Unsupported(String),
    /// The VM did not come up.
    #[error("{0}")]
    Boot(#[from] Arc<boot::Error>),
    /// The guest refused, or could not be reached.
    #[error("{0}")]
    Guest(#[from] guest::Error),
    /// The state on disk.
    #[error("{0}")]
    State(#[from] StateError),
    /// The root filesystem or a bind mount.
    #[error("{0}")]
    Share(#[from] ShareError),
    /// A hook of the host.
    #[error(transparent)]
    Hook(crate::host::hooks::HookError),
    /// Something inside the shim ended unexpectedly.
    #[error("{0}")]
    Task(String),
}

impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Self {
        Self::Guest(guest::Error::Call(error))
    }
}

pub(super) fn not_found(what: &'static str, id: &str) -> Error {
    Error::NotFound { what, id: id.to_owned() }
}
