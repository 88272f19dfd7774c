//! Extended attributes of a file, without following symbolic links.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

/// The kernel's limits of a list of names and of a value (XATTR_LIST_MAX and XATTR_SIZE_MAX in linux/limits.h).
const MAX: usize = 64 * 1024;

/// Calls `visit` with each attribute, in the order of the names.
///
/// # Errors
/// Those of listxattr(2) and getxattr(2), and of `visit`.
pub(crate) fn each(path: &Path, mut visit: impl FnMut(&CStr, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is zero-terminated, and for a size of 0 nothing is written.
    let length = unsafe { libc::llistxattr(path.as_ptr(), std::ptr::null_mut(), 0) };
    match Errno::result(length) {
        Ok(0) | Err(Errno::EOPNOTSUPP) => return Ok(()),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    let mut buffer = vec![0u8; MAX];
    // SAFETY: the path is zero-terminated, and the buffer is as long as stated.
    let length = unsafe { libc::llistxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), MAX) };
    let length = usize::try_from(Errno::result(length)?).map_err(io::Error::other)?;
    let names = buffer[..length].split_inclusive(|byte| *byte == 0).map(CStr::from_bytes_with_nul);
    let mut names =
        names.map(|name| name.map(CStr::to_owned)).collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
    names.sort_unstable();
    for name in names {
        // SAFETY: both strings are zero-terminated, and the buffer is as long as stated.
        let length = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), MAX) };
        let length = usize::try_from(Errno::result(length)?).map_err(io::Error::other)?;
        visit(&name, &buffer[..length])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_in_the_order_of_their_names() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let all = |path: &Path| {
            let mut all = Vec::new();
            each(path, |name, value| {
                all.push((name.to_owned(), value.to_vec()));
                Ok(())
            })
            .unwrap();
            all
        };
        assert!(all(file.path()).is_empty());
        let path = CString::new(file.path().as_os_str().as_bytes()).unwrap();
        for name in [c"trusted.b", c"trusted.a"] {
            // SAFETY: both strings are zero-terminated, and the value is as long as stated.
            let result = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), c"value".as_ptr().cast(), 5, 0) };
            assert_eq!(result, 0, "{}: trusted attributes need root", io::Error::last_os_error());
        }
        let expected = [c"trusted.a", c"trusted.b"].map(|name| (name.to_owned(), b"value".to_vec()));
        assert_eq!(all(file.path()), expected);
        let link = file.path().with_extension("link");
        std::os::unix::fs::symlink(file.path(), &link).unwrap();
        assert!(all(&link).is_empty(), "the link was followed");
        std::fs::remove_file(link).unwrap();
    }
}
