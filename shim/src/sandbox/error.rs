//! Why a call on a sandbox failed. `task_service` maps these errors to ttrpc codes.

use std::sync::Arc;

use crate::disks::format::FormatError;
use crate::disks::layers::store::StoreError;
use crate::guest::client::GuestError;
use crate::host::child::LaunchError;
use crate::host::hooks::HookError;
use crate::network::NetworkError;
use crate::prepare::PrepareError;
use crate::rootfs::plan::FolderError;
use crate::rootfs::share::ShareError;
use crate::sandbox::container::changes::ChangesError;
use crate::sandbox::container::guest_reply::InvalidReply;
use crate::sandbox::disk_error::DiskError;
use crate::state::StateError;
use crate::stdio::StdioError;
use crate::vm::cgroup::CgroupError;
use crate::vm::{AffinityError, BootError, FollowError, GrowthError};
use husk_vsock::VsockError;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    #[error("{what} {id:?}: not found")]
    NotFound {
        /// `task`, `process` or `sandbox`.
        what: &'static str,
        id: String,
    },
    /// The sandbox is not in the state that the call requires.
    #[error("{0}")]
    NotReady(String),
    #[error("{what} {id:?}: already exists")]
    AlreadyExists {
        /// `task` or `process`.
        what: &'static str,
        id: String,
    },
    #[error("process {id:?} of task {task:?} must be stopped before deletion")]
    NotStopped {
        task: String,
        /// The exec's id, or the container's id for its init process.
        id: String,
    },
    /// An exec cannot start after its container's init process has exited.
    #[error("the init process of task {task:?} has exited")]
    InitExited { task: String },
    #[error("the sandbox is stopping: its last container has been deleted")]
    Stopping,
    #[error("the VM is gone: {cause}")]
    VmDead { cause: String },
    /// The request, the spec, the annotations or the configuration are invalid.
    #[error(transparent)]
    Invalid(#[from] PrepareError),
    /// A standard stream cannot be opened.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error("{0}")]
    Unsupported(String),
    /// The VM did not boot. Shared by all containers that waited for it.
    #[error(transparent)]
    Boot(#[from] Arc<BootError>),
    /// The guest returned an error or cannot be reached.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The guest's response is rejected.
    #[error(transparent)]
    InvalidReply(#[from] InvalidReply),
    /// The guest cannot have the network of the sandbox's namespace.
    #[error("the container's network")]
    GuestNetwork(#[from] Arc<FollowError>),
    #[error(transparent)]
    State(#[from] StateError),
    /// The root filesystem or a bind mount.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A folder that containerd's mounts for the root require.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// An image that containerd's mounts for the root require.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The images of layers.
    #[error(transparent)]
    Layers(#[from] StoreError),
    /// The changes of a root filesystem.
    #[error(transparent)]
    Changes(#[from] ChangesError),
    /// The sandbox's network namespace.
    #[error(transparent)]
    Namespace(#[from] NetworkError),
    /// The sandbox's cgroup on the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The CPUs of the host on which the virtual CPUs run.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The VM does not get the memory that the limits of its containers need.
    #[error("linux.resources.memory.limit {limit}")]
    Growth {
        /// The container's new limit, bytes.
        limit: u64,
        source: GrowthError,
    },
    /// The process that represents the container on the host does not start.
    #[error("start the holder")]
    Holder(#[from] LaunchError),
    /// A hook on the host failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The guest's connections to Unix sockets of the host cannot be accepted.
    #[error("listen for the guest's connections to sockets of the host")]
    Sockets(#[from] VsockError),
    /// A part of the shim ended unexpectedly.
    #[error("{0}")]
    Internal(String),
}

impl From<ttrpc::Error> for SandboxError {
    fn from(error: ttrpc::Error) -> Self {
        Self::Guest(error.into())
    }
}

impl SandboxError {
    /// Whether the VM's death may be the cause: a call was lost on its way to the guest, or the task that makes it has
    /// ended.
    pub(super) fn may_be_death(&self) -> bool {
        let guest = match self {
            Self::Guest(error) | Self::Disk(DiskError::Guest { source: error, .. }) => error,
            Self::GuestNetwork(error) => match &**error {
                FollowError::Guest(error) => error,
                FollowError::Ended => return true,
                _ => return false,
            },
            _ => return false,
        };
        matches!(guest, GuestError::Call(call) if !matches!(call, ttrpc::Error::RpcStatus(_)))
    }
}

pub(super) fn not_found(what: &'static str, id: &str) -> SandboxError {
    SandboxError::NotFound { what, id: id.to_owned() }
}

#[cfg(test)]
mod tests {
    use husk_protos::chain::Chain;
    use ttrpc::{Code, Error, get_status};

    use super::*;

    #[test]
    fn the_vms_death_explains_lost_calls_but_not_the_guests_own_errors() {
        let lost = || GuestError::Call(Error::RemoteClosed);
        let rejected = || GuestError::Call(Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, "links[0]: no MAC")));
        let network = |error: FollowError| SandboxError::from(Arc::new(error));
        for (error, expected) in [
            (SandboxError::Guest(lost()), true),
            (SandboxError::Guest(rejected()), false),
            (network(FollowError::Guest(lost())), true),
            (network(FollowError::Guest(rejected())), false),
            (network(FollowError::Ended), true),
            (network(FollowError::Links(Vec::new())), false),
            (SandboxError::Stopping, false),
        ] {
            assert_eq!(error.may_be_death(), expected, "{error:?}");
        }
        let text = Chain(&network(FollowError::Guest(rejected()))).to_string();
        let expected = "the container's network: configure the guest's network: links[0]: no MAC (INVALID_ARGUMENT)";
        assert_eq!(text, expected);
    }
}
