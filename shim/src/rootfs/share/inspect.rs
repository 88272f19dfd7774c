//! What a path leads to on the host.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::rootfs::spec::{FileKind, HostFile};

/// Looks up a path on the host and resolves symbolic links, for [`crate::rootfs::spec::Context`].
///
/// # Errors
/// When the path does not exist or is not accessible.
pub(crate) fn inspect(path: &Path) -> io::Result<HostFile> {
    let path = fs::canonicalize(path)?;
    let metadata = fs::symlink_metadata(&path)?;
    let file_type = metadata.file_type();
    let kind = if file_type.is_dir() {
        FileKind::Dir
    } else if file_type.is_socket() {
        FileKind::Socket
    } else if file_type.is_fifo() {
        FileKind::Fifo
    } else if file_type.is_block_device() {
        FileKind::BlockDevice
    } else if file_type.is_char_device() {
        let number = metadata.rdev();
        FileKind::CharDevice { major: libc::major(number).into(), minor: libc::minor(number).into() }
    } else {
        FileKind::File
    };
    Ok(HostFile { path, kind })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn inspect_resolves_links_and_reports_the_type() {
        let base = tempfile::tempdir().unwrap();
        let path = |name: &str| base.path().join(name);
        let _socket = UnixListener::bind(path("socket")).unwrap();
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(path("file"), "").unwrap();
        symlink("file", path("link")).unwrap();
        symlink("nowhere", path("dangling")).unwrap();
        let null = FileKind::CharDevice { major: 1, minor: 3 };
        for (given, real, kind) in [
            (path("socket"), path("socket"), FileKind::Socket),
            (path("fifo"), path("fifo"), FileKind::Fifo),
            (path("link"), path("file"), FileKind::File),
            (base.path().join("."), base.path().into(), FileKind::Dir),
            ("/dev/null".into(), "/dev/null".into(), null),
        ] {
            let real = fs::canonicalize(real).unwrap();
            assert_eq!(inspect(&given).unwrap(), HostFile { path: real, kind }, "{}", given.display());
        }
        assert!(inspect(&path("dangling")).is_err());
    }
}
