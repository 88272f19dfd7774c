//! Files of the node. A file is replaced as a whole: a crash leaves the old one or the new one.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::places::NEW;

/// Whether the path exists; a dangling link does.
pub(crate) fn exists(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("examine {}", path.display())),
    }
}

/// The file's text, or `None` if it does not exist.
pub(crate) fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// The name of a file's next version, in the same folder.
pub(crate) fn next(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(NEW);
    name.into()
}

/// Writes the file with this mode, whatever the umask.
pub(crate) fn write(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    write_next(&mut &*content, path, &Access { mode, owner: None })?;
    replace(path)
}

/// Writes the file's next version, with the owner and mode of the present one. A new file gets `mode`.
pub(crate) fn prepare(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let access = match path.metadata() {
        Ok(present) => Access { mode: present.mode() & 0o7777, owner: Some((present.uid(), present.gid())) },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Access { mode, owner: None },
        Err(error) => return Err(error).with_context(|| format!("examine {}", path.display())),
    };
    write_next(&mut &*content, path, &access)
}

struct Access {
    mode: u32,
    owner: Option<(u32, u32)>,
}

fn write_next(content: &mut impl Read, path: &Path, access: &Access) -> Result<()> {
    let next = next(path);
    let mut written = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        io::copy(content, &mut file)?;
        if let Some((user, group)) = access.owner {
            fchown(&file, Some(user), Some(group))?;
        }
        file.set_permissions(Permissions::from_mode(access.mode))?;
        file.sync_all()
    };
    written().with_context(|| format!("write {}", next.display()))
}

/// Puts the next version, which [`prepare`] has written, in the file's place.
pub(crate) fn replace(path: &Path) -> Result<()> {
    fs::rename(next(path), path).with_context(|| format!("replace {}", path.display()))
}

/// Copies an open file to `path` unless it has the same content already.
pub(crate) fn install(mut source: &File, path: &Path, mode: u32) -> Result<()> {
    let same = same(source, path).with_context(|| format!("compare {} with the file to install", path.display()))?;
    if same {
        return Ok(());
    }
    source.rewind().with_context(|| format!("read the file for {}", path.display()))?;
    write_next(&mut source, path, &Access { mode, owner: None })?;
    replace(path)
}

fn same(mut source: &File, path: &Path) -> io::Result<bool> {
    let present = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if present.metadata()?.len() != source.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut present = io::BufReader::new(present);
    loop {
        let read = source.read(&mut left)?;
        if read == 0 {
            return Ok(true);
        }
        present.read_exact(&mut right[..read])?;
        if left[..read] != right[..read] {
            return Ok(false);
        }
    }
}

/// Removes the file and its unfinished next version, if they exist.
pub(crate) fn remove(path: &Path) -> Result<()> {
    for path in [path, &next(path)] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}
