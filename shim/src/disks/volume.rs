//! The file of a volume: a sparse file on the host, created when it is first used, formatted once, and kept.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::blank::{self, Content};
use super::format::{FormatError, Life, ext4};
use super::image::{Access, Image, ImageError};

/// The size of a new volume unless the request says otherwise, MiB.
pub(crate) const DEFAULT_MIB: u64 = 1024;
/// Appended to the hidden name of a volume's file while it is formatted. The mark says that what the file has is not
/// data.
const MARK: &str = ".husk-formatting";

/// What a request says about a volume's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sizing {
    /// At least so much.
    pub(crate) mib: Option<u64>,
    /// Grow a smaller file.
    pub(crate) grow: bool,
    /// The VM may not write: the file is used as it is.
    pub(crate) read_only: bool,
}

/// Why a volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeFileError {
    /// The file.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The file is too small.
    #[error(
        "the volume {} has {bytes} bytes, less than size_mib = {mib} requests: set \"grow\": true to enlarge it",
        path.display()
    )]
    Smaller { path: PathBuf, bytes: u64, mib: u64 },
    /// The file has no data that is known, but nobody can tell in time that it has none.
    #[error(
        "the volume {} is not known to be blank, and more than 1 GiB of it is written: create a sparse file, or make an \
         ext4 filesystem on it",
        .0.display()
    )]
    Unknown(PathBuf),
    /// The file cannot be formatted.
    #[error("format the volume {}", path.display())]
    Format { path: PathBuf, source: FormatError },
    /// A file operation.
    #[error("{what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    /// The thread of the file operations.
    #[error("the thread of the file operations has ended early")]
    Thread(#[source] io::Error),
}

/// Opens the file of a volume, and creates it if there is none. `path` has no symbolic links.
///
/// # Errors
/// Those of the file.
pub(crate) fn open(path: &Path, read_only: bool) -> Result<Image, VolumeFileError> {
    let access = if read_only { Access::ReadOnly } else { Access::Exclusive };
    let mut options = File::options();
    options.read(true).write(!read_only).create(!read_only).mode(0o600);
    Ok(Image::open_with(&options, libc::O_NOFOLLOW, path, access)?)
}

/// Gives a locked volume its size, and its filesystem if it is blank.
///
/// # Errors
/// See [`VolumeFileError`].
pub(crate) async fn prepare(image: &Image, sizing: Sizing) -> Result<(), VolumeFileError> {
    if sizing.read_only || image.is_device() {
        return Ok(());
    }
    let (file, id, path) = (image.file(), image.id().to_owned(), image.path().to_owned());
    let file = file.try_clone().map_err(io_error("duplicate the descriptor of", &path))?;
    let examined = tokio::task::spawn_blocking(move || examine(&file, &id, &path, sizing)).await;
    let Some(mark) = examined.map_err(|error| VolumeFileError::Thread(io::Error::other(error)))?? else {
        return Ok(());
    };
    let formatted = ext4(image, Life::Lasting).await;
    formatted.map_err(|source| VolumeFileError::Format { path: image.path().to_owned(), source })?;
    let done = tokio::task::spawn_blocking(move || mark.remove()).await;
    done.map_err(|error| VolumeFileError::Thread(io::Error::other(error)))?
}

/// Gives the file its size. Returns a mark if the file is to be formatted.
fn examine(file: &File, id: &str, path: &Path, sizing: Sizing) -> Result<Option<Mark>, VolumeFileError> {
    let length = || file.metadata().map(|metadata| metadata.len()).map_err(io_error("examine", path));
    let resize = |mib: u64| file.set_len(mib << 20).map_err(io_error("resize", path));
    let mark = Mark::of(path);
    if mark.names(id)? {
        // husk was killed while it formatted the file.
        let bytes = length()?;
        let wiped = file.set_len(0).and_then(|()| file.set_len(bytes));
        wiped.map_err(io_error("wipe", path))?;
    }
    match (length()?, sizing) {
        (0, Sizing { mib, .. }) => resize(mib.unwrap_or(DEFAULT_MIB))?,
        (bytes, Sizing { mib: Some(mib), grow, .. }) if bytes < mib << 20 => match grow {
            true => resize(mib)?,
            false => return Err(VolumeFileError::Smaller { path: path.to_owned(), bytes, mib }),
        },
        _ => {}
    }
    match blank::examine(file).map_err(io_error("read", path))? {
        Content::Data => Ok(None),
        Content::Unknown => Err(VolumeFileError::Unknown(path.to_owned())),
        Content::Blank => {
            mark.write(id)?;
            Ok(Some(mark))
        }
    }
}

fn io_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> VolumeFileError {
    move |source| VolumeFileError::Io { what, path: path.to_owned(), source }
}

/// The file that says that husk formats a volume: until it is removed, the volume has no data.
struct Mark {
    path: PathBuf,
}

impl Mark {
    fn of(volume: &Path) -> Self {
        let name = volume.file_name().unwrap_or_default().to_string_lossy();
        Self { path: volume.with_file_name(format!(".{name}{MARK}")) }
    }

    /// Whether it is the mark of the file with this identity, and not of one that was there before.
    fn names(&self, id: &str) -> Result<bool, VolumeFileError> {
        let read = |file: File| {
            let mut text = String::new();
            file.take(256).read_to_string(&mut text).map(|_| text)
        };
        match File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&self.path).and_then(read) {
            Ok(text) => Ok(text == id),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error("read", &self.path)(error)),
        }
    }

    fn write(&self, id: &str) -> Result<(), VolumeFileError> {
        let write = || {
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let mut file = options.open(&self.path)?;
            file.write_all(id.as_bytes())?;
            file.sync_all()?;
            self.sync_folder()
        };
        write().map_err(io_error("write", &self.path))
    }

    fn remove(&self) -> Result<(), VolumeFileError> {
        fs::remove_file(&self.path).and_then(|()| self.sync_folder()).map_err(io_error("remove", &self.path))
    }

    fn sync_folder(&self) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// The two bytes at which an ext4 filesystem begins (its superblock's s_magic).
    fn is_ext4(path: &Path) -> bool {
        let mut magic = [0; 2];
        File::open(path).unwrap().read_exact_at(&mut magic, 1024 + 56).unwrap();
        magic == [0x53, 0xef]
    }

    async fn used(path: &Path, mib: Option<u64>, grow: bool) -> Result<(), String> {
        let image = open(path, false).unwrap();
        prepare(&image, Sizing { mib, grow, read_only: false }).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_volume_is_formatted_once_and_never_over_data() {
        let folder = tempfile::tempdir().unwrap();
        let new = folder.path().join("new");
        used(&new, Some(16), false).await.unwrap();
        assert!(is_ext4(&new) && fs::metadata(&new).unwrap().len() == 16 << 20);
        let first = fs::read(&new).unwrap();
        used(&new, Some(16), false).await.unwrap();
        assert!(fs::read(&new).unwrap() == first, "the volume was formatted again");
        // A single byte at the very end.
        let data = folder.path().join("data");
        File::create(&data).unwrap().write_all_at(b"x", (16 << 20) - 1).unwrap();
        used(&data, None, false).await.unwrap();
        assert!(!is_ext4(&data));
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[tokio::test]
    async fn a_volume_grows_only_on_request_and_never_shrinks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        used(&path, Some(16), false).await.unwrap();
        let error = used(&path, Some(32), false).await.unwrap_err();
        assert!(error.contains("has 16777216 bytes, less than size_mib = 32"), "{error}");
        for (mib, expected) in [(Some(32), 32), (Some(8), 32), (None, 32)] {
            used(&path, mib, true).await.unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), expected << 20);
        }
        assert!(is_ext4(&path));
    }

    #[tokio::test]
    async fn a_volume_whose_formatting_was_interrupted_is_formatted_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        let image = open(&path, false).unwrap();
        image.file().set_len(16 << 20).unwrap();
        image.file().write_all_at(b"half a filesystem", 4096).unwrap();
        let mark = Mark::of(&path);
        // The mark of another file.
        mark.write("1-1").unwrap();
        prepare(&image, Sizing::default()).await.unwrap();
        assert!(!is_ext4(&path));
        mark.write(image.id()).unwrap();
        prepare(&image, Sizing::default()).await.unwrap();
        assert!(is_ext4(&path) && !mark.path.exists());
    }
}
