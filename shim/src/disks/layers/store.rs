//! The folder of the images.
//!
//! | path                    | contents                                                           |
//! |-------------------------|--------------------------------------------------------------------|
//! | `images/DIGEST.erofs`   | an image; who uses it has a shared lock on it (flock(2))            |
//! | `images/DIGEST.json`    | its stamp; the time of its last change is that of the image's last use |
//! | `layers/IDENTITY`       | a link whose target is the digest of a layer                       |
//! | `wanted/IDENTITY`       | a link to a layer whose image is requested                         |
//! | `failed/IDENTITY`       | why a layer has no image                                           |
//! | `lock`                  | locked by the builder, which alone adds and removes images          |
//! | `builder.log`           | the builder's log                                                  |
//!
//! An image has no name until it is complete and on the disk, and is not used until it has a stamp. So a builder that is
//! killed leaves nothing that is taken for an image, at whatever point; what it leaves, the next one removes.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use husk_protos::chain::Chain;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{geteuid, linkat};
use serde::{Deserialize, Serialize};

use super::identity::{Identity, is_digest};
use super::stamp::Stamp;
use crate::disks::image::Image;
use crate::host::text::clean;

/// The folders in the store.
const IMAGES: &str = "images";
const LAYERS: &str = "layers";
const WANTED: &str = "wanted";
const FAILED: &str = "failed";
/// How long a layer that could not become an image is not tried again.
const AGAIN: Duration = Duration::from_secs(60 * 60);
/// Most requests that wait for the builder.
const MAX_WANTED: usize = 1024;
/// Longest reason that is read, bytes.
const REASON_MAX: u64 = 2048;

/// The folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Others than root could change what is in it.
    #[error("layer_cache_dir: {} belongs to another user, or others may write to it", .0.display())]
    Unsafe(PathBuf),
    /// A file operation.
    #[error("{what} {}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// What the store has of a layer.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// An image, which stays while this value or the machine has its descriptor.
    Ready(Image),
    /// Nothing yet.
    Missing,
    /// Nothing, and no builder would change that.
    Never(String),
}

/// An image, for operators.
#[derive(Debug)]
pub struct Stored {
    /// Its name.
    pub digest: String,
    /// Its stamp.
    pub stamp: Stamp,
    /// When a container last started with it.
    pub used: SystemTime,
}

/// Where images are, and how much space they may take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Store {
    folder: PathBuf,
    mib: u64,
}

impl Store {
    /// The store in `folder`, of at most `mib` MiB.
    pub fn new(folder: PathBuf, mib: u64) -> Self {
        Self { folder, mib }
    }

    /// Most bytes of all images.
    pub fn limit(&self) -> u64 {
        self.mib << 20
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn images_folder(&self) -> PathBuf {
        self.folder.join(IMAGES)
    }

    /// The paths of an image and its stamp.
    pub(super) fn paths(&self, digest: &str) -> (PathBuf, PathBuf) {
        let path = |extension| self.folder.join(IMAGES).join(format!("{digest}.{extension}"));
        (path("erofs"), path("json"))
    }

    fn entry(&self, folder: &str, identity: &Identity) -> PathBuf {
        self.folder.join(folder).join(identity.as_str())
    }

    /// Creates the folders that are missing.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub(super) fn prepare(&self) -> Result<(), StoreError> {
        let create = |path: &Path| {
            let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
            created.map_err(io_error("create", path))
        };
        create(&self.folder)?;
        let metadata = fs::symlink_metadata(&self.folder).map_err(io_error("examine", &self.folder))?;
        if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(StoreError::Unsafe(self.folder.clone()));
        }
        [IMAGES, LAYERS, WANTED, FAILED].iter().try_for_each(|name| create(&self.folder.join(name)))
    }

    /// The image of a layer, if there is one. Costs a few system calls.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(crate) fn find(&self, layer: &Path) -> Result<Lookup, StoreError> {
        let identity = match Identity::of(layer) {
            Ok(identity) => identity,
            Err(error) => return Ok(Lookup::Never(Chain(&error).to_string())),
        };
        let Some(digest) = self.digest_of(&identity)? else {
            return Ok(self.failure(&identity)?.map_or(Lookup::Missing, Lookup::Never));
        };
        let Some((_, file, stamp_file)) = self.complete(&digest)? else { return Ok(Lookup::Missing) };
        let path = self.paths(&digest).0;
        // The least recently used image is the first to go.
        stamp_file.set_modified(SystemTime::now()).map_err(io_error("mark the use of", &path))?;
        Ok(Lookup::Ready(Image::held(file, &path).map_err(io_error("examine", &path))?))
    }

    /// Where the link of a layer leads.
    fn digest_of(&self, identity: &Identity) -> Result<Option<String>, StoreError> {
        let path = self.entry(LAYERS, identity);
        let target = allow_missing(fs::read_link(&path)).map_err(io_error("read", &path))?;
        Ok(target.and_then(|target| target.into_os_string().into_string().ok()).filter(|name| is_digest(name)))
    }

    /// An image with its stamp, if both fit, and locked against removal: a shared lock that ends with the last copy of the
    /// image's descriptor. Returns the stamp's file too.
    pub(super) fn complete(&self, digest: &str) -> Result<Option<(Stamp, File, File)>, StoreError> {
        let (image, stamp) = self.paths(digest);
        let open = |path: &Path| {
            let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
            allow_missing(opened).map_err(io_error("open", path))
        };
        let (Some(stamp_file), Some(file)) = (open(&stamp)?, open(&image)?) else { return Ok(None) };
        match file.try_lock_shared() {
            Ok(()) => {}
            // It is being removed.
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(source)) => return Err(io_error("lock", &image)(source)),
        }
        let metadata = file.metadata().map_err(io_error("examine", &image))?;
        match Stamp::read(&stamp_file) {
            // A file without a name was removed before it was locked.
            _ if metadata.nlink() == 0 => Ok(None),
            Ok(known) if known.fits(&metadata) => Ok(Some((known, file, stamp_file))),
            Ok(_) => {
                tracing::warn!(image = %image.display(), "an image of a layer was changed or damaged, and is not used");
                Ok(None)
            }
            Err(error) => {
                tracing::warn!(stamp = %stamp.display(), %error, "an image of a layer has no valid stamp, and is not used");
                Ok(None)
            }
        }
    }

    /// Why a layer has no image, if a builder has failed recently.
    fn failure(&self, identity: &Identity) -> Result<Option<String>, StoreError> {
        let path = self.entry(FAILED, identity);
        let opened = allow_missing(File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&path));
        let Some(file) = opened.map_err(io_error("open", &path))? else { return Ok(None) };
        let mut reason = String::new();
        let read = file.metadata().and_then(|metadata| {
            (&file).take(REASON_MAX).read_to_string(&mut reason)?;
            metadata.modified()
        });
        let age = read.map_err(io_error("read", &path))?.elapsed().unwrap_or_default();
        Ok((age < AGAIN).then_some(reason))
    }

    /// Requests images of layers. Returns false if no builder is needed: one works, and sees the requests.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn request(&self, layers: &[PathBuf]) -> Result<bool, StoreError> {
        self.prepare()?;
        let mut waiting = self.names(WANTED)?.len();
        for layer in layers {
            let Ok(identity) = Identity::of(layer) else { continue };
            let path = self.entry(WANTED, &identity);
            match symlink(layer, &path) {
                Ok(()) => waiting += 1,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(source) => return Err(io_error("create", &path)(source)),
            }
            if waiting >= MAX_WANTED {
                break;
            }
        }
        // A builder looks for requests once more after it has given up this lock.
        Ok(self.lock()?.is_some())
    }

    /// The builder's lock, unless another process has it.
    pub(super) fn lock(&self) -> Result<Option<File>, StoreError> {
        let path = self.folder.join("lock");
        let opened = File::options().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = opened.map_err(io_error("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(io_error("lock", &path)(source)),
        }
    }

    /// The requests.
    pub(super) fn wanted(&self) -> Result<Vec<(Identity, PathBuf)>, StoreError> {
        let mut wanted = Vec::new();
        for identity in self.names(WANTED)? {
            let path = self.entry(WANTED, &identity);
            if let Some(layer) = allow_missing(fs::read_link(&path)).map_err(io_error("read", &path))? {
                wanted.push((identity, layer));
            }
        }
        Ok(wanted)
    }

    /// Ends a request. The failure is remembered for some time, so that not every start of a container tries again.
    pub(super) fn settle(&self, identity: &Identity, failure: Option<&str>) -> Result<(), StoreError> {
        let failed = self.entry(FAILED, identity);
        match failure {
            Some(reason) => fs::write(&failed, clean(reason)).map_err(io_error("write", &failed))?,
            None => remove(&failed)?,
        }
        remove(&self.entry(WANTED, identity))
    }

    /// Gives a complete image its name and its stamp. It is on the host's disk before.
    pub(super) fn publish(&self, digest: &str, file: &File, sha256: String, layer: &Path) -> Result<(), StoreError> {
        let (image, stamp) = self.paths(digest);
        remove(&stamp)?;
        remove(&image)?;
        let unnamed = Image::inherited(file.as_raw_fd());
        let named = linkat(AT_FDCWD, Path::new(&unnamed), AT_FDCWD, &image, AtFlags::AT_SYMLINK_FOLLOW);
        named.map_err(|error| io_error("create", &image)(error.into()))?;
        sync_folder(&image)?;
        // The name has changed the ctime.
        let metadata = file.metadata().map_err(io_error("examine", &image))?;
        let text = serde_json::to_vec(&Stamp::of(&metadata, sha256, layer.to_owned()));
        let new = stamp.with_extension("new");
        let write = || {
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text?)?;
            file.sync_all()?;
            fs::rename(&new, &stamp)
        };
        write().map_err(io_error("write", &stamp))?;
        sync_folder(&stamp)
    }

    /// Lets a layer's identity lead to an image.
    pub(super) fn link(&self, identity: &Identity, digest: &str) -> Result<(), StoreError> {
        let path = self.entry(LAYERS, identity);
        remove(&path)?;
        symlink(digest, &path).map_err(io_error("create", &path))
    }

    /// Removes what a killed builder has left, and links and failures that have no meaning any more. The caller has the
    /// lock.
    pub(super) fn sweep(&self) -> Result<(), StoreError> {
        let folder = self.images_folder();
        for entry in fs::read_dir(&folder).map_err(io_error("list", &folder))? {
            let path = entry.map_err(io_error("list", &folder))?.path();
            let partner = match path.extension().and_then(|extension| extension.to_str()) {
                Some("erofs") => Some(path.with_extension("json")),
                Some("json") => Some(path.with_extension("erofs")),
                Some("new") => None,
                _ => continue,
            };
            if !partner.is_some_and(|partner| partner.exists()) {
                remove(&path)?;
            }
        }
        for identity in self.names(LAYERS)? {
            if self.digest_of(&identity)?.is_none_or(|digest| !self.paths(&digest).0.exists()) {
                remove(&self.entry(LAYERS, &identity))?;
            }
        }
        for identity in self.names(FAILED)? {
            if self.failure(&identity)?.is_none() {
                remove(&self.entry(FAILED, &identity))?;
            }
        }
        Ok(())
    }

    /// All complete images.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn images(&self) -> Result<Vec<Stored>, StoreError> {
        let folder = self.images_folder();
        let Some(entries) = allow_missing(fs::read_dir(&folder)).map_err(io_error("list", &folder))? else {
            return Ok(Vec::new());
        };
        let mut images = Vec::new();
        for entry in entries {
            let path = entry.map_err(io_error("list", &folder))?.path();
            let Some(digest) = path.file_stem().and_then(|name| name.to_str()).filter(|name| is_digest(name)) else {
                continue;
            };
            if path.extension().is_none_or(|extension| extension != "erofs") {
                continue;
            }
            let Some((stamp, _, stamp_file)) = self.complete(digest)? else { continue };
            let used = stamp_file.metadata().and_then(|metadata| metadata.modified());
            let used = used.map_err(io_error("examine", &path))?;
            images.push(Stored { digest: digest.to_owned(), stamp, used });
        }
        Ok(images)
    }

    /// Whether a VM has an image. A start at this moment may do without the image.
    ///
    /// # Errors
    /// When the image cannot be opened.
    pub fn in_use(&self, image: &Stored) -> Result<bool, StoreError> {
        let path = self.paths(&image.digest).0;
        Ok(allow_missing(File::open(&path))
            .map_err(io_error("open", &path))?
            .is_some_and(|file| file.try_lock().is_err()))
    }

    /// Why layers have no images, for operators.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn failures(&self) -> Result<Vec<String>, StoreError> {
        let reasons = self.names(FAILED)?.into_iter().map(|identity| self.failure(&identity));
        Ok(reasons.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    /// The identities in one of the folders.
    fn names(&self, folder: &str) -> Result<Vec<Identity>, StoreError> {
        let path = self.folder.join(folder);
        let Some(entries) = allow_missing(fs::read_dir(&path)).map_err(io_error("list", &path))? else {
            return Ok(Vec::new());
        };
        let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
        let names = names.collect::<io::Result<Vec<_>>>().map_err(io_error("list", &path))?;
        Ok(names.iter().filter_map(|name| Identity::named(name.to_str()?)).collect())
    }
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Io { what, path: path.to_owned(), source }
}

fn allow_missing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a file, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), StoreError> {
    allow_missing(fs::remove_file(path)).map(|_| ()).map_err(io_error("remove", path))
}

fn sync_folder(file: &Path) -> Result<(), StoreError> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync", folder))
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;
    use crate::disks::layers::identity::tests::snapshot;

    /// Publishes an image of so many bytes for a layer. Returns its digest.
    pub(in crate::disks::layers) fn published(store: &Store, layer: &Path, bytes: u64) -> String {
        store.prepare().unwrap();
        let identity = Identity::of(layer).unwrap();
        // The digest is a matter of the builder.
        let digest = identity.as_str().to_owned();
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600);
        let file = options.open(store.images_folder()).unwrap();
        file.set_len(bytes).unwrap();
        store.publish(&digest, &file, "sha256".into(), layer).unwrap();
        store.link(&identity, &digest).unwrap();
        digest
    }

    fn ready(store: &Store, layer: &Path) -> bool {
        matches!(store.find(layer).unwrap(), Lookup::Ready(_))
    }

    #[test]
    fn only_the_image_that_was_published_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("store"), 16);
        let layer = snapshot(folder.path(), 1);
        assert!(matches!(store.find(&layer).unwrap(), Lookup::Missing));
        type Damage = fn(&Path, &Path);
        let damages: [Damage; 8] = [
            |image, _| File::options().write(true).open(image).unwrap().set_len(4096).unwrap(),
            |image, _| File::options().write(true).open(image).unwrap().write_all_at(b"x", 1024).unwrap(),
            |image, _| {
                let copy = image.with_extension("copy");
                fs::copy(image, &copy).unwrap();
                fs::rename(copy, image).unwrap();
            },
            |image, _| fs::remove_file(image).unwrap(),
            |image, _| {
                fs::remove_file(image).unwrap();
                symlink("/etc/passwd", image).unwrap();
            },
            |_, stamp| fs::remove_file(stamp).unwrap(),
            |_, stamp| fs::write(stamp, "{}").unwrap(),
            |_, stamp| fs::write(stamp, "x".repeat(100_000)).unwrap(),
        ];
        for (number, damage) in damages.into_iter().enumerate() {
            let digest = published(&store, &layer, 8192);
            assert!(ready(&store, &layer), "{number}");
            let (image, stamp) = store.paths(&digest);
            damage(&image, &stamp);
            assert!(!store.find(&layer).is_ok_and(|found| matches!(found, Lookup::Ready(_))), "{number}");
        }
        published(&store, &layer, 8192);
        assert!(ready(&store, &layer));
        fs::write(layer.join("new"), "").unwrap();
        assert!(matches!(store.find(&layer).unwrap(), Lookup::Missing));
    }

    #[test]
    fn what_a_killed_builder_leaves_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("store"), 16);
        let layers = [1, 2, 3].map(|number| snapshot(folder.path(), number));
        let digests = layers.each_ref().map(|layer| published(&store, layer, 4096));
        // Killed before the stamp, between the removals, and while it wrote a stamp.
        fs::remove_file(store.paths(&digests[0]).1).unwrap();
        fs::remove_file(store.paths(&digests[1]).0).unwrap();
        fs::write(store.paths(&digests[1]).1.with_extension("new"), "half").unwrap();
        store.sweep().unwrap();
        let count = |name| fs::read_dir(store.folder().join(name)).unwrap().count();
        assert_eq!((count(IMAGES), count(LAYERS)), (2, 1));
        assert_eq!(layers.each_ref().map(|layer| ready(&store, layer)), [false, false, true]);
    }

    #[test]
    fn a_request_needs_a_builder_unless_one_works_and_a_failure_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("store"), 16);
        let layer = snapshot(folder.path(), 1);
        assert!(store.request(std::slice::from_ref(&layer)).unwrap());
        let builder = store.lock().unwrap().unwrap();
        assert!(!store.request(std::slice::from_ref(&layer)).unwrap());
        let wanted = store.wanted().unwrap();
        assert_eq!(wanted, [(Identity::of(&layer).unwrap(), layer.clone())]);
        store.settle(&wanted[0].0, Some("no\nroom")).unwrap();
        drop(builder);
        let Lookup::Never(reason) = store.find(&layer).unwrap() else { panic!("no failure") };
        assert_eq!(reason, "no room");
        assert!(store.wanted().unwrap().is_empty());
        let failed = File::open(store.entry(FAILED, &wanted[0].0)).unwrap();
        failed.set_modified(SystemTime::now() - AGAIN).unwrap();
        assert!(matches!(store.find(&layer).unwrap(), Lookup::Missing));
        store.sweep().unwrap();
        assert!(!store.entry(FAILED, &wanted[0].0).exists());
        assert!(matches!(store.find(Path::new("/usr")).unwrap(), Lookup::Never(_)));
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_no_store() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("store"), 16);
        store.prepare().unwrap();
        fs::set_permissions(store.folder(), fs::Permissions::from_mode(0o770)).unwrap();
        assert!(matches!(store.prepare().unwrap_err(), StoreError::Unsafe(_)));
    }
}
