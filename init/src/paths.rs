//! Paths of a container's files in the guest, and the check of IDs that become part of a path.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::{CallError, FailureKind};

pub(crate) const RUN: &str = "/run/husk";
/// libcontainer's root directory. It has a subdirectory for each container.
pub(crate) const STATE: &str = "/run/husk/state";
/// Programs that libcontainer finds through PATH: see `worker::user_namespace`.
pub(crate) const BIN: &str = "/run/husk/bin";
/// File in a bundle: the FIFO on which a process reports why its startContainer hooks failed.
pub(crate) const START_OUTCOME: &str = "start-outcome";
/// File in a bundle: the folders of the share that are mounted before the container's own mounts, separated by zero bytes.
pub(crate) const MOUNTS_BELOW: &str = "mounts-below";
const BUNDLES: &str = "/run/husk/bundles";

/// Longest ID: containerd's own limit (`identifiers.maxLength`). It also keeps the path of a start socket below 108
/// bytes (unix(7)).
const ID_MAX: usize = 76;

/// Checks that an ID is a file name made of characters that containerd and libcontainer allow.
pub(crate) fn check_id(id: &str) -> Result<(), CallError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'+');
    if (1..=ID_MAX).contains(&id.len()) && id.bytes().all(allowed) && id != "." && id != ".." {
        Ok(())
    } else {
        Err(CallError::new(FailureKind::InvalidArgument, format!("{id:?} is not a valid id")))
    }
}

pub(crate) fn bundle(container: &str) -> PathBuf {
    Path::new(BUNDLES).join(container)
}

/// A container's directory below libcontainer's root.
pub(crate) fn state(container: &str) -> PathBuf {
    Path::new(STATE).join(container)
}

/// The file that holds the process of an exec until its start, as JSON of the spec's `process`.
pub(crate) fn exec_process(container: &str, exec: &str) -> PathBuf {
    bundle(container).join(format!("exec-{exec}.json"))
}

/// Turns "not found" into success, for a removal that may have happened already.
pub(crate) fn allow_missing(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_that_are_harmless_file_names_are_accepted() {
        for good in ["a", "0af3", "my-pod_1.2+x", &"x".repeat(76)] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "../x", "a b", "ä", "a\0", &"x".repeat(77)] {
            assert_eq!(check_id(bad).unwrap_err().kind, FailureKind::InvalidArgument, "{bad}");
        }
    }
}
