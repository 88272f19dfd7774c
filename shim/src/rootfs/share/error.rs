//! Why a share does not have what a container needs.

use std::io;
use std::path::{Path, PathBuf};

use crate::state::StateError;

/// Why the share, or a container's part of it, cannot be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    /// The container's ID, or the journal.
    #[error(transparent)]
    State(#[from] StateError),
    /// A folder or file of the share.
    #[error("create {}", path.display())]
    Create {
        /// The folder or file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A mount.
    #[error("mount {what} on {}{}", target.display(), hint(source))]
    Mount {
        /// The field that requires the mount, and its source.
        what: String,
        /// The mount point.
        target: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// An entry that is removed.
    #[error("rename {}", path.display())]
    Rename {
        /// The entry's folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// virtiofsd's mount namespace.
    #[error("open virtiofsd's mount namespace")]
    Server(#[source] io::Error),
    /// A source that becomes writable.
    #[error("make {} writable", path.display())]
    Writable {
        /// The source in the share, as virtiofsd sees it.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A root filesystem that becomes read-only.
    #[error("root.readonly: make {} read-only", path.display())]
    ReadOnly {
        /// The root in the share, as virtiofsd sees it.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// An option of one of containerd's mounts.
    #[error("rootfs[{index}].options {option:?}: is not supported for a container's root")]
    Unsupported {
        /// The mount's index.
        index: usize,
        /// The option.
        option: String,
    },
}

/// What to do about an error.
fn hint(error: &io::Error) -> &'static str {
    if error.raw_os_error() == Some(libc::ENOSYS) { " (husk requires Linux 5.12 or newer)" } else { "" }
}

pub(super) fn mount_error(what: String, target: &Path) -> impl FnOnce(io::Error) -> ShareError {
    let target = target.to_path_buf();
    move |source| ShareError::Mount { what, target, source }
}
