//! The contents of a layer: their size, their digest, and whether they have changed.
//!
//! A stranger chooses names, sizes and contents. Nothing here follows a symbolic link, opens anything but regular files
//! and folders, or runs longer than its deadline.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::host::digest::Sha256Digest;
use crate::host::xattr;

/// Most files of a layer. mkfs.erofs keeps them in its memory.
const MAX_ENTRIES: u64 = 2_000_000;
/// What an image takes for each file besides its data, bytes: an extended inode, its attributes and its name.
const ENTRY_BYTES: u64 = 192;
/// The size of an image's blocks.
const BLOCK: u64 = 4096;
const CHUNK: usize = 1 << 20;
/// The version of the digest: it changes with what is digested, and with how images are made.
const VERSION: &str = "husk layer 1";
/// Attributes with which overlayfs refers to other layers by path or by file handle. In the guest they would lead
/// elsewhere or nowhere.
const REFERENCES: [&[u8]; 2] = [b"trusted.overlay.redirect", b"trusted.overlay.metacopy"];

/// Why a layer cannot become an image.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    /// A file cannot be read.
    #[error("read {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// A filesystem is mounted in it.
    #[error("a filesystem is mounted at {}", .0.display())]
    MountPoint(PathBuf),
    /// It depends on how the host's overlayfs is mounted.
    #[error("{} has the attribute {name}, which refers to another layer", path.display())]
    Reference { path: PathBuf, name: String },
    /// It is too large.
    #[error("it has more than {MAX_ENTRIES} files")]
    Entries,
    /// It took too long.
    #[error("reading it took too long")]
    Deadline,
}

/// What a layer has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Survey {
    /// About the size of its image.
    pub(super) bytes: u64,
    /// Differs once anything in the layer has changed: a digest of all inodes and their ctimes.
    state: String,
}

/// Measures a layer without reading its files.
///
/// # Errors
/// See [`TreeError`].
pub(super) fn survey(layer: &Path, deadline: Instant) -> Result<Survey, TreeError> {
    let (mut bytes, mut state) = (BLOCK, Sha256::new());
    walk(layer, deadline, |entry| {
        let metadata = &entry.metadata;
        let data = if metadata.is_file() { metadata.len().div_ceil(BLOCK).saturating_mul(BLOCK) } else { 0 };
        bytes = bytes.saturating_add(data).saturating_add(ENTRY_BYTES + entry.name.as_os_str().len() as u64);
        text(&mut state, entry.name.as_os_str().as_bytes());
        for number in [metadata.ino(), metadata.ctime() as u64, metadata.ctime_nsec() as u64] {
            state.update(number.to_le_bytes());
        }
        Ok(())
    })?;
    Ok(Survey { bytes, state: Sha256Digest::finish(state).to_string() })
}

/// The digest of everything that an image of the layer has.
///
/// # Errors
/// See [`TreeError`].
pub(super) fn digest(layer: &Path, deadline: Instant) -> Result<String, TreeError> {
    let mut digest = Sha256::new();
    text(&mut digest, VERSION.as_bytes());
    // The first name of each file that has several.
    let mut first: HashMap<u64, PathBuf> = HashMap::new();
    walk(layer, deadline, |Entry { name, path, metadata }| {
        let kind = metadata.file_type();
        text(&mut digest, name.as_os_str().as_bytes());
        for number in [metadata.mode(), metadata.uid(), metadata.gid()] {
            digest.update(number.to_le_bytes());
        }
        digest.update(metadata.mtime().to_le_bytes());
        digest.update(metadata.mtime_nsec().to_le_bytes());
        attributes(&mut digest, path)?;
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(failed(path))?;
            text(&mut digest, target.as_os_str().as_bytes());
        } else if kind.is_char_device() || kind.is_block_device() {
            digest.update(metadata.rdev().to_le_bytes());
        } else if kind.is_file() {
            let known = first.get(&metadata.ino()).filter(|_| metadata.nlink() > 1);
            digest.update([u8::from(known.is_some())]);
            match known {
                Some(known) => text(&mut digest, known.as_os_str().as_bytes()),
                None => contents(&mut digest, path, metadata.len(), deadline)?,
            }
            if metadata.nlink() > 1 {
                first.entry(metadata.ino()).or_insert_with(|| name.to_owned());
            }
        }
        Ok(())
    })?;
    Ok(Sha256Digest::finish(digest).to_string())
}

/// The digest of a file from its beginning.
///
/// # Errors
/// When it cannot be read, or not in time.
pub(super) fn file_digest(file: &mut File, deadline: Instant) -> io::Result<String> {
    let (mut digest, mut buffer) = (Sha256::new(), vec![0; CHUNK]);
    loop {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match file.read(&mut buffer)? {
            0 => return Ok(Sha256Digest::finish(digest).to_string()),
            length => digest.update(&buffer[..length]),
        }
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> TreeError {
    move |source| TreeError::Io { path: path.to_owned(), source }
}

/// Digests a text so that no two lists of texts have the same digest.
fn text(digest: &mut Sha256, text: &[u8]) {
    digest.update((text.len() as u64).to_le_bytes());
    digest.update(text);
}

fn attributes(digest: &mut Sha256, path: &Path) -> Result<(), TreeError> {
    let (mut count, mut reference) = (0u32, None);
    let visited = xattr::each(path, |name, value| {
        count += 1;
        if REFERENCES.contains(&name.to_bytes()) {
            reference = Some(name.to_string_lossy().into_owned());
        }
        text(digest, name.to_bytes());
        text(digest, value);
        Ok(())
    });
    visited.map_err(failed(path))?;
    digest.update(count.to_le_bytes());
    match reference {
        Some(name) => Err(TreeError::Reference { path: path.to_owned(), name }),
        None => Ok(()),
    }
}

/// Digests as many bytes of a file as it had.
fn contents(digest: &mut Sha256, path: &Path, length: u64, deadline: Instant) -> Result<(), TreeError> {
    let open = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let mut file = open.map_err(failed(path))?;
    digest.update(length.to_le_bytes());
    let mut buffer = vec![0; CHUNK.min(usize::try_from(length).unwrap_or(CHUNK))];
    let mut left = length;
    while left > 0 {
        in_time(deadline)?;
        let most = buffer.len().min(usize::try_from(left).unwrap_or(CHUNK));
        match file.read(&mut buffer[..most]).map_err(failed(path))? {
            0 => return Err(failed(path)(io::ErrorKind::UnexpectedEof.into())),
            read => {
                digest.update(&buffer[..read]);
                left -= read as u64;
            }
        }
    }
    Ok(())
}

fn in_time(deadline: Instant) -> Result<(), TreeError> {
    if Instant::now() > deadline { Err(TreeError::Deadline) } else { Ok(()) }
}

/// A file of a layer.
struct Entry<'a> {
    /// Its path in the layer.
    name: &'a Path,
    path: &'a Path,
    metadata: Metadata,
}

/// Visits a layer's folder and everything in it, each folder before its contents, in the order of the names.
fn walk(
    layer: &Path,
    deadline: Instant,
    mut visit: impl FnMut(Entry<'_>) -> Result<(), TreeError>,
) -> Result<(), TreeError> {
    let metadata = fs::symlink_metadata(layer).map_err(failed(layer))?;
    let (device, mut count) = (metadata.dev(), 0);
    let mut waiting = vec![PathBuf::new()];
    while let Some(name) = waiting.pop() {
        in_time(deadline)?;
        count += 1;
        if count + waiting.len() as u64 > MAX_ENTRIES {
            return Err(TreeError::Entries);
        }
        let path = if name.as_os_str().is_empty() { layer.to_owned() } else { layer.join(&name) };
        let metadata = fs::symlink_metadata(&path).map_err(failed(&path))?;
        if metadata.dev() != device {
            return Err(TreeError::MountPoint(path));
        }
        let is_dir = metadata.is_dir();
        visit(Entry { name: &name, path: &path, metadata })?;
        if is_dir {
            let mut names = names_in(&path, MAX_ENTRIES - count)?;
            names.sort_unstable_by(|one, other| other.cmp(one));
            waiting.extend(names.into_iter().map(|child| name.join(child)));
        }
    }
    Ok(())
}

/// The names in a folder: at most one more than `most`.
fn names_in(folder: &Path, most: u64) -> Result<Vec<OsString>, TreeError> {
    let entries = fs::read_dir(folder).map_err(failed(folder))?.take(usize::try_from(most).unwrap_or(usize::MAX));
    entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>().map_err(failed(folder))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};
    use std::process::Command;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// A layer with one of everything.
    fn layer() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/a"), "contents").unwrap();
        fs::hard_link(root.join("d/a"), root.join("d/b")).unwrap();
        fs::write(root.join("c"), "contents").unwrap();
        symlink("/etc/passwd", root.join("l")).unwrap();
        let made = Command::new("sh").args(["-ec", "mknod n c 0 0; mkfifo f"]).current_dir(root).status().unwrap();
        assert!(made.success());
        for name in ["", "d", "d/a", "c"] {
            set_time(&root.join(name), 1_000_000);
        }
        let times = Command::new("touch").args(["-h", "-d", "@1000000", "l", "n", "f"]).current_dir(root).status();
        assert!(times.unwrap().success());
        folder
    }

    fn set_time(path: &Path, seconds: u64) {
        File::open(path).unwrap().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    }

    fn of(folder: &Path) -> String {
        digest(folder, soon()).unwrap()
    }

    #[test]
    fn equal_layers_have_one_digest_and_every_change_gives_another() {
        let expected = of(layer().path());
        assert_eq!(of(layer().path()), expected);
        type Change = fn(&Path);
        let changes: [(&str, Change); 11] = [
            ("contents", |root| {
                fs::write(root.join("c"), "contentz").unwrap();
                set_time(&root.join("c"), 1_000_000);
            }),
            ("time", |root| set_time(&root.join("c"), 1_000_001)),
            ("mode", |root| fs::set_permissions(root.join("d/a"), fs::Permissions::from_mode(0o4755)).unwrap()),
            ("mode of the folder itself", |root| {
                fs::set_permissions(root, fs::Permissions::from_mode(0o701)).unwrap();
            }),
            ("owner", |root| chown(root.join("c"), Some(7), None).unwrap()),
            ("link's target", |root| {
                fs::remove_file(root.join("l")).unwrap();
                symlink("/etc/passwx", root.join("l")).unwrap();
                restore(root, "touch -h -d @1000000 l .");
            }),
            ("device", |root| restore(root, "rm n; mknod n c 1 3; touch -d @1000000 n .")),
            ("hard link", |root| restore(root, "cp -p d/a d/x; mv d/x d/b; touch -d @1000000 d")),
            ("name", |root| restore(root, "mv d/b d/x; touch -d @1000000 d")),
            ("fifo", |root| restore(root, "rm f; touch -d @1000000 f .")),
            ("attribute", |root| attribute(&root.join("d"), c"trusted.overlay.opaque")),
        ];
        for (what, change) in changes {
            let layer = layer();
            let before = survey(layer.path(), soon()).unwrap();
            assert_eq!(survey(layer.path(), soon()).unwrap(), before);
            change(layer.path());
            assert_ne!(of(layer.path()), expected, "{what}");
            assert_ne!(survey(layer.path(), soon()).unwrap().state, before.state, "{what}");
        }
    }

    fn restore(root: &Path, script: &str) {
        assert!(Command::new("sh").args(["-ec", script]).current_dir(root).status().unwrap().success(), "{script}");
    }

    fn attribute(path: &Path, name: &std::ffi::CStr) {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: both strings are zero-terminated, and the value is as long as stated.
        let result = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), c"y".as_ptr().cast(), 1, 0) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn what_has_no_place_in_an_image_is_rejected() {
        let folder = layer();
        let sparse = File::create(folder.path().join("sparse")).unwrap();
        sparse.set_len(1 << 40).unwrap();
        assert!(survey(folder.path(), soon()).unwrap().bytes > 1 << 40);
        let past = Instant::now();
        let error = digest(folder.path(), past).unwrap_err();
        assert!(matches!(error, TreeError::Deadline), "{error}");
        sparse.set_len(0).unwrap();
        attribute(&folder.path().join("c"), c"trusted.overlay.redirect");
        let error = digest(folder.path(), soon()).unwrap_err().to_string();
        assert!(error.contains("c has the attribute trusted.overlay.redirect"), "{error}");
    }
}
