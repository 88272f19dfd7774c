//! Extended attributes of cgroups. Both versions of cgroupfs store attributes in `trusted.`, which only root can set.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// Marks husk's own cgroups.
const MARK: &CStr = c"trusted.husk";
/// Begins the name of the attribute of each sandbox that uses a cgroup.
const USER: &str = "trusted.husk.";
/// Most bytes of a user's value: three numbers.
const VALUE_MAX: usize = 96;
/// Most bytes of the names of a cgroup's attributes: several hundred users.
const NAMES_MAX: usize = 1 << 16;

/// A sandbox that uses a cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct User(String);

impl User {
    /// The sandbox with this id in this namespace of containerd. Neither contains a slash.
    pub(crate) fn new(namespace: &str, sandbox: &str) -> Self {
        Self(format!("{namespace}/{sandbox}"))
    }

    fn attribute(&self) -> io::Result<CString> {
        Ok(CString::new(format!("{USER}{}", self.0))?)
    }
}

fn path_for_c(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(Into::into)
}

fn set(path: &Path, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = path_for_c(path)?;
    // SAFETY: both strings are zero-terminated, and `value` is as long as stated. All outlive the call.
    let result = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// Marks a cgroup as husk's.
///
/// # Errors
/// When the attribute cannot be set.
pub(crate) fn mark(path: &Path) -> io::Result<()> {
    set(path, MARK, b"")
}

/// Whether a cgroup is husk's.
pub(crate) fn is_marked(path: &Path) -> bool {
    let Ok(path) = path_for_c(path) else { return false };
    // SAFETY: both strings are zero-terminated and outlive the call, which writes no value for a size of 0.
    unsafe { libc::getxattr(path.as_ptr(), MARK.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

/// Adds a user, or changes its value.
pub(super) fn set_user(path: &Path, user: &User, value: &str) -> io::Result<()> {
    set(path, &user.attribute()?, value.as_bytes())
}

/// Removes a user, if it is one.
pub(super) fn remove_user(path: &Path, user: &User) -> io::Result<()> {
    let (path, name) = (path_for_c(path)?, user.attribute()?);
    // SAFETY: both strings are zero-terminated and outlive the call.
    match Errno::result(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }) {
        Ok(_) | Err(Errno::ENODATA | Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The values of all users.
pub(super) fn users(path: &Path) -> io::Result<Vec<String>> {
    let path = path_for_c(path)?;
    let mut names = vec![0u8; NAMES_MAX];
    // SAFETY: the path is zero-terminated, and the buffer is as long as stated.
    let length = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let length = usize::try_from(Errno::result(length)?).map_err(io::Error::other)?;
    let mut values = Vec::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| name.starts_with(USER.as_bytes())) {
        let name = CString::new(name)?;
        let mut value = [0u8; VALUE_MAX];
        // SAFETY: both strings are zero-terminated, and the buffer is as long as stated.
        let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        match Errno::result(length) {
            Ok(length) => {
                let length = usize::try_from(length).unwrap_or_default().min(VALUE_MAX);
                values.push(String::from_utf8_lossy(&value[..length]).into_owned());
            }
            // Removed in between.
            Err(Errno::ENODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(values)
}
