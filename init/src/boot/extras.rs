//! The extras: files of the host's for the guest itself, such as the supervisor agent. They come on a disk, which is read once, before anything
//! is started.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use husk_protos::extras;
use nix::sys::statvfs::{FsFlags, statvfs};

use super::disks;

/// Writes the files of the disk with this serial to where they belong.
///
/// # Errors
/// The first that failed, by its path.
pub fn unpack(serial: &str) -> io::Result<()> {
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

/// Writes a file beside its place and moves it there: it is there as a whole, or not at all.
fn write(file: &extras::File, content: &mut impl BufRead) -> io::Result<()> {
    let path = Path::new(&file.path);
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is no path of a file"));
    };
    fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    if statvfs(folder)?.flags().contains(FsFlags::ST_NOEXEC) {
        return Err(io::Error::new(ErrorKind::InvalidInput, "nothing there may be executed (noexec)"));
    }
    let mut hidden = OsString::from(".husk-");
    hidden.push(name);
    let beside = folder.join(hidden);
    let written = (|| {
        let mut new = File::options().write(true).create_new(true).mode(0o600).open(&beside)?;
        copy(content, file.size, &mut new)?;
        new.set_permissions(fs::Permissions::from_mode(file.mode & 0o777))?;
        fs::rename(&beside, path)
    })();
    if written.is_err() {
        // The error that is told is the one that led here.
        let _ = fs::remove_file(&beside);
    }
    written
}

fn copy(from: &mut impl BufRead, mut left: u64, to: &mut impl Write) -> io::Result<()> {
    while left > 0 {
        let bytes = from.fill_buf()?;
        let now = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if now == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        to.write_all(&bytes[..now])?;
        from.consume(now);
        left -= now as u64;
    }
    Ok(())
}
