//! Why a sandbox's network namespace cannot be connected to its VM.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use netlink_packet_core::DecodeError;

/// Names the namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace's file cannot be opened.
    #[error("open the network namespace {}", path.display())]
    Open {
        /// The namespace.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A namespace cannot be created.
    #[error("create a network namespace")]
    Create {
        /// The system's error.
        source: io::Error,
    },
    /// The path names something else.
    #[error("{} is not a network namespace", path.display())]
    NotANamespace {
        /// The path.
        path: PathBuf,
    },
    /// The namespace is the one that the shim itself runs in.
    #[error(
        "the pod asks for the node's own network (network namespace {}), which a VM cannot share",
        path.display()
    )]
    NodeNetwork {
        /// The namespace.
        path: PathBuf,
    },
    /// The path names another namespace than when it was claimed.
    #[error("the network namespace {} was replaced by another one", path.display())]
    Replaced {
        /// The namespace.
        path: PathBuf,
    },
    /// No thread can be started, or it cannot enter the namespace.
    #[error("enter the network namespace {}", path.display())]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The kernel did not finish in time.
    #[error("the work in the network namespace {} took longer than {} ms", path.display(), limit.as_millis())]
    Deadline {
        /// The namespace.
        path: PathBuf,
        /// The time limit.
        limit: Duration,
    },
    /// The thread in the namespace panicked.
    #[error("the thread in the network namespace {} panicked", path.display())]
    Panicked {
        /// The namespace.
        path: PathBuf,
    },
    /// Something inside the namespace.
    #[error("network namespace {}", path.display())]
    Inside {
        /// The namespace.
        path: PathBuf,
        /// The object and what failed.
        source: ObjectError,
    },
}

/// Names an object of a namespace, such as a link or a route.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// An rtnetlink request failed.
    #[error("{object}: {action}")]
    Request {
        /// The object.
        object: String,
        /// The attempted operation.
        action: &'static str,
        /// Why it failed.
        source: NetlinkError,
    },
    /// Another system call failed.
    #[error("{object}: {action}")]
    System {
        /// The object.
        object: String,
        /// The attempted operation.
        action: String,
        /// The system's error.
        source: io::Error,
    },
    /// The object cannot be given to a guest.
    #[error("{object}: {reason}")]
    Unsupported {
        /// The object.
        object: String,
        /// The reason.
        reason: String,
    },
}

/// Why an rtnetlink request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel rejected it.
    #[error("{}{}", io::Error::from_raw_os_error(*errno), explained(text.as_deref()))]
    Rejected {
        /// errno(3).
        errno: i32,
        /// The kernel's explanation, if it gave one (NLMSGERR_ATTR_MSG).
        text: Option<String>,
    },
    /// The socket failed.
    #[error("{action}")]
    Socket {
        /// The attempted operation.
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The deadline passed before the reply was complete.
    #[error("no reply from the kernel before the deadline")]
    Deadline,
    /// The reply cannot be decoded.
    #[error("decode the kernel's reply")]
    Decode(#[source] DecodeError),
    /// Each attempt to read a list was interrupted by a change.
    #[error("the list changed during each of {0} attempts to read it")]
    Changing(usize),
}

fn explained(text: Option<&str>) -> String {
    text.map(|text| format!(": {text}")).unwrap_or_default()
}

impl NetlinkError {
    /// errno(3), if the kernel rejected the request.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Rejected { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Adds the object and the attempted operation.
    pub(super) fn at(self, object: impl Into<String>, action: &'static str) -> ObjectError {
        ObjectError::Request { object: object.into(), action, source: self }
    }
}

impl ObjectError {
    /// An object that cannot be given to a guest.
    pub(super) fn unsupported(object: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { object: object.into(), reason: reason.into() }
    }

    /// A failed system call.
    pub(super) fn system(object: impl Into<String>, action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let (object, action) = (object.into(), action.into());
        move |source| Self::System { object, action, source }
    }
}
