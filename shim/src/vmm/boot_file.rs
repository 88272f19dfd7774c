//! The files that a machine boots from. Where the configuration names a file's digest, the machine gets a sealed copy of
//! the bytes that were hashed: what happens to the file meanwhile has no effect.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::host::digest::{Sha256Digest, sealed_copy};
use crate::vmm::error::{VmmError, WrongDigest};

/// Opens a file that the VMM opens again, as its own user, through the descriptor's name in `/dev/fd`. Verifies it if its
/// digest is known. Reads files, so call it where blocking is allowed.
///
/// # Errors
/// The file cannot be opened or copied, or has another digest.
pub(super) fn open(what: &'static str, path: &Path, expected: Option<Sha256Digest>) -> Result<OwnedFd, VmmError> {
    let error = |source| VmmError::Open { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(error)?;
    let Some(expected) = expected else {
        readable(&file).map_err(error)?;
        return Ok(file.into());
    };
    let (copied, found) = sealed_copy(&file).map_err(error)?;
    match found == expected {
        true => Ok(copied.into()),
        false => Err(Box::new(WrongDigest { what, path: path.to_owned(), expected, found }).into()),
    }
}

fn readable(file: &File) -> io::Result<()> {
    match file.metadata()?.permissions().mode() & 0o004 {
        0 => {
            let hint = "not readable by everyone, but QEMU runs as an unprivileged user: chmod a+r";
            Err(io::Error::new(ErrorKind::PermissionDenied, hint))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::host::digest;

    #[test]
    fn a_verified_file_is_the_one_that_the_digest_names_even_if_it_is_rewritten_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinux");
        std::fs::write(&path, "the kernel").unwrap();
        let expected = digest::of(&File::open(&path).unwrap()).unwrap();
        let writer = File::options().write(true).open(&path).unwrap();
        let read = |fd: &OwnedFd| std::fs::read_to_string(format!("/dev/fd/{}", fd.as_raw_fd())).unwrap();

        let verified = open("kernel", &path, Some(expected)).unwrap();
        let plain = open("kernel", &path, None).unwrap();
        writer.write_all_at(b"THE", 0).unwrap();
        assert_eq!((read(&verified).as_str(), read(&plain).as_str()), ("the kernel", "THE kernel"));

        let found = digest::of(&File::open(&path).unwrap()).unwrap();
        let error = open("kernel", &path, Some(expected)).unwrap_err().to_string();
        let text =
            format!("the kernel {} has the SHA-256 digest {found}, but kernel_sha256 is {expected}", path.display());
        assert_eq!(error, text);
    }

    #[test]
    fn a_file_that_only_root_can_read_is_used_only_as_a_copy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("initrd.img");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(open("initrd", &path, None), Err(VmmError::Open { .. })));
        let digest = digest::of(&File::open(&path).unwrap()).unwrap();
        assert!(open("initrd", &path, Some(digest)).is_ok());
    }
}
