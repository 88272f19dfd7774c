//! Where the guest keeps what belongs to a container, and which ids may become part of a path.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind};

/// The guest's own folder.
pub const RUN: &str = "/run/husk";
/// libcontainer's root: a folder for each container.
pub const STATE: &str = "/run/husk/state";
/// In a bundle: the fifo on which the process of a container with startContainer hooks says that it has failed.
pub const START_OUTCOME: &str = "start-outcome";
const BUNDLES: &str = "/run/husk/bundles";

/// Longest id: containerd's own limit (`identifiers.maxLength`). It also keeps the path of a start socket below 108 bytes (unix(7)).
const ID_MAX: usize = 76;

/// An id is a file name, and of the characters that containerd and libcontainer allow.
///
/// # Errors
/// InvalidArgument, with the id.
pub fn check_id(id: &str) -> Result<(), Error> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'+');
    if (1..=ID_MAX).contains(&id.len()) && id.bytes().all(plain) && id != "." && id != ".." {
        Ok(())
    } else {
        Err(Error::new(Kind::InvalidArgument, format!("{id:?} is not a valid id")))
    }
}

/// The bundle of a container.
pub fn bundle(container: &str) -> PathBuf {
    Path::new(BUNDLES).join(container)
}

/// libcontainer's folder of a container.
pub fn state(container: &str) -> PathBuf {
    Path::new(STATE).join(container)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_harmless_file_name() {
        for good in ["a", "0af3", "my-pod_1.2+x", &"x".repeat(76)] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "../x", "a b", "ä", "a\0", &"x".repeat(77)] {
            assert_eq!(check_id(bad).unwrap_err().kind, Kind::InvalidArgument, "{bad}");
        }
    }
}
