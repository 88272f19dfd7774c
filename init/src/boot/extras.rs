//! The extras: files that the host adds to the guest itself, such as the supervisor agent. The init reads them from a
//! disk once, before it starts anything.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use husk_protos::extras;
use nix::sys::statvfs::{FsFlags, statvfs};

use super::disks;

/// Writes the files of the disk with this serial to their paths.
///
/// # Errors
/// When the disk is missing or invalid, or the first file that failed, with its path.
pub(super) fn unpack(serial: &str) -> io::Result<()> {
    let mut disk = disks::open(serial)?;
    let (files, first) = extras::decode(&mut disk)?;
    let mut at = first;
    for file in &files {
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("write {}: {error}", file.path));
        let padding = at - disk.position();
        copy(&mut disk, padding, &mut io::sink()).map_err(failed)?;
        write(file, &mut disk).map_err(failed)?;
        at = extras::after(at, file.size).ok_or_else(|| failed(ErrorKind::InvalidData.into()))?;
    }
    Ok(())
}

/// Writes a file under a temporary name and renames it: the file is either complete or absent.
fn write(file: &extras::File, content: &mut impl BufRead) -> io::Result<()> {
    let path = Path::new(&file.path);
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(ErrorKind::InvalidInput, "the path has no directory or no file name"));
    };
    fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    if statvfs(folder)?.flags().contains(FsFlags::ST_NOEXEC) {
        return Err(io::Error::new(ErrorKind::InvalidInput, "its file system does not allow executables (noexec)"));
    }
    let mut hidden = OsString::from(".husk-");
    hidden.push(name);
    let temporary = folder.join(hidden);
    let written = (|| {
        let mut new = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        copy(content, file.size, &mut new)?;
        new.set_permissions(fs::Permissions::from_mode(file.mode & 0o777))?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // Best effort: the first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn copy(from: &mut impl BufRead, mut remaining: u64, to: &mut impl Write) -> io::Result<()> {
    while remaining > 0 {
        let bytes = from.fill_buf()?;
        let now = bytes.len().min(usize::try_from(remaining).unwrap_or(usize::MAX));
        if now == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        to.write_all(&bytes[..now])?;
        from.consume(now);
        remaining -= now as u64;
    }
    Ok(())
}
