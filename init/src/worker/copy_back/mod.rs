//! Applies the upper layer of an overlay to the filesystem below it, which the host serves: afterwards, the files there are
//! those that the container sees.
//!
//! | file         | contents                                                                           |
//! |--------------|------------------------------------------------------------------------------------|
//! | `copier.rs`  | what is kept during a copy, and what is reported of it                             |
//! | `file.rs`    | creates one file as a copy of another, in place of what has its name               |
//! | `gone.rs`    | removes what an earlier copy has created, and the container has removed since      |
//! | `nothing.rs` | tells whether a layer changes anything, without a worker                           |
//! | `pair.rs`    | a folder of the layer, and the one to which it belongs                             |
//! | `place.rs`   | folders, as requests name them                                                     |
//! | `record.rs`  | the list of what copies have created                                               |
//! | `remove.rs`  | removes a file, or a folder with everything in it                                  |
//!
//! A file gets its name when it is complete, so that a copy that is interrupted leaves the old file or the new one. Applying
//! the same layer again gives the same result.
//!
//! Nobody writes to either filesystem meanwhile, except programs of other containers that share the container's PID
//! namespace. No link is followed, so that these reach nothing that they could not reach without the copy.

mod copier;
mod file;
mod gone;
mod nothing;
mod pair;
mod place;
mod record;
mod remove;

use std::ffi::CStr;
use std::io;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat, umask};

use crate::attributes::{DEFAULT_ACL, Entry, copy_xattrs, in_overlay, kind};
use crate::error::CallError;
pub(crate) use copier::Report;
use copier::{Copier, shortened};
use gone::OfImages;
pub(crate) use nothing::is_nothing;
use pair::{OPAQUE, Pair, SELF, exists_in, is_whiteout, reopen};
pub(crate) use place::{Folder, Images};
use record::Record;

/// How deep the folders may be nested: each level takes three descriptors and stack.
const DEPTH_MAX: usize = 1000;

/// Why the rest is not applied: what concerns every other file too.
#[derive(Debug, thiserror::Error)]
#[error("apply /{path}, and what follows")]
struct Stopped {
    path: String,
    source: io::Error,
}

/// Applies the layer `upper` to the filesystem whose root is `target`. `images` is the overlay, if its other layers are
/// images.
pub(super) fn copy_back(upper: &Folder, target: &Folder, images: Option<&Images>) -> Result<Report, CallError> {
    let pair = Pair { upper: upper.open("upper layer")?, target: target.open("filesystem")?, exact: false, new: false };
    let failed = |error: &dyn std::error::Error| CallError::internal("copy back", error);
    let (mut of_images, mut record) = (None, None);
    if let Some(Images { merged, last }) = images {
        let folder = upper.beside().open("disk of the upper layer")?;
        if !last {
            record = Some(folder.try_clone().and_then(Record::begin).map_err(|error| failed(&error))?);
        }
        of_images = Some(OfImages { merged: merged.open("overlay")?, folder });
    }
    apply(pair, of_images, record).map_err(|error| failed(&error))
}

fn apply(pair: Pair, images: Option<OfImages>, record: Option<Record>) -> Result<Report, Stopped> {
    // The modes of new files are those of the request.
    umask(Mode::empty());
    let stopped = |path: &Path, source| Stopped { path: shortened(path.display().to_string()), source };
    let root = pair.target.try_clone().map_err(|error| stopped(Path::new(""), error))?;
    let mut copier = Copier::new(root, record);
    let applied = file::remove_incomplete(&copier.root)
        .and_then(|()| images.map_or(Ok(()), |images| copier.remove_gone(&pair, &images, DEPTH_MAX)))
        .and_then(|()| copier.folder(&pair, DEPTH_MAX))
        .and_then(|()| copier.folder_attributes(&pair));
    applied.or_else(|error| copier.note(error)).map_err(|error| stopped(&copier.path, error))?;
    Ok(copier.report)
}

impl Copier {
    /// Applies the contents of a folder. What concerns one entry is noted, and the others are applied.
    ///
    /// # Errors
    /// What concerns all others too.
    fn folder(&mut self, pair: &Pair, depth: usize) -> io::Result<()> {
        if pair.exact && !pair.new {
            self.prune(pair, depth).or_else(|error| self.note(error))?;
        }
        if !pair.new {
            // New files would inherit it, instead of having the attributes of the upper layer's.
            Entry { folder: &pair.target, name: SELF }.remove(DEFAULT_ACL).or_else(allow_unsupported)?;
        }
        for entry in Dir::from_fd(reopen(&pair.upper, SELF)?)?.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if name == SELF || name == c".." {
                continue;
            }
            self.path.push(os_str(name));
            self.entry(pair, name, depth).or_else(|error| self.note(error))?;
            self.path.pop();
        }
        Ok(())
    }

    fn entry(&mut self, pair: &Pair, name: &CStr, depth: usize) -> io::Result<()> {
        let stat = fstatat(&pair.upper, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if is_whiteout(&stat) {
            // What is not new has been pruned.
            if !pair.exact && remove::remove(&pair.target, name, depth)? {
                self.report.entries += 1;
            }
            return Ok(());
        }
        self.report.entries += 1;
        // What a new folder or an opaque one has is removed with it, or because the upper layer lacks it.
        if !pair.exact && self.record.is_some() && !exists_in(&pair.target, name)? {
            self.created()?;
        }
        match kind(&stat) {
            SFlag::S_IFDIR => self.subfolder(pair, name, depth),
            _ => self.file(pair, name, &stat, depth),
        }
    }

    fn subfolder(&mut self, pair: &Pair, name: &CStr, depth: usize) -> io::Result<()> {
        let depth = depth.checked_sub(1).ok_or(Errno::ELOOP)?;
        let new = self.make_folder(pair, name, depth)?;
        let below = Pair { upper: reopen(&pair.upper, name)?, target: reopen(&pair.target, name)?, exact: false, new };
        let upper = Entry { folder: &below.upper, name: SELF };
        let opaque = upper.value(OPAQUE)?.as_deref() == Some(b"y");
        if new && !pair.exact && !opaque {
            // From now on there is a folder below. The overlay believes that there is none, and leaves no trace of what is
            // removed: without the mark, the next copy would not remove it.
            upper.set(OPAQUE, b"y")?;
        }
        let exact = new || pair.exact || opaque;
        let below = Pair { exact, ..below };
        self.folder(&below, depth)?;
        self.folder_attributes(&below)
    }

    /// Creates a folder, unless it exists. Returns whether it is new.
    fn make_folder(&mut self, pair: &Pair, name: &CStr, depth: usize) -> io::Result<bool> {
        match mkdirat(&pair.target, name, Mode::S_IRWXU) {
            Ok(()) => return Ok(true),
            Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let found = fstatat(&pair.target, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if kind(&found) == SFlag::S_IFDIR {
            return Ok(false);
        }
        remove::remove(&pair.target, name, depth)?;
        mkdirat(&pair.target, name, Mode::S_IRWXU)?;
        Ok(true)
    }

    /// Gives a folder the attributes of the upper layer's. Call it after its contents have changed, which changes its times.
    fn folder_attributes(&mut self, pair: &Pair) -> io::Result<()> {
        let stat = fstatat(&pair.upper, SELF, AtFlags::empty())?;
        let (from, to) = (Entry { folder: &pair.upper, name: SELF }, Entry { folder: &pair.target, name: SELF });
        to.set_owner_and_mode(&stat)?;
        let set = copy_xattrs(from, to, in_overlay, |name, error| self.rejected(name, &error))?;
        if !pair.new {
            for name in to.names()? {
                if !set.contains(&name) {
                    to.remove(&name).or_else(allow_unsupported)?;
                }
            }
        }
        to.set_times(&stat)
    }

    /// Removes what the overlay does not show.
    fn prune(&mut self, pair: &Pair, depth: usize) -> io::Result<()> {
        // A folder that changes may not list an entry: until nothing is left to remove.
        loop {
            let mut removed = false;
            for entry in Dir::from_fd(reopen(&pair.target, SELF)?)?.iter() {
                let entry = entry?;
                let name = entry.file_name();
                if name == SELF || name == c".." {
                    continue;
                }
                let shown = match fstatat(&pair.upper, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                    Ok(stat) => !is_whiteout(&stat),
                    Err(Errno::ENOENT) => false,
                    Err(error) => return Err(error.into()),
                };
                if !shown && remove::remove(&pair.target, name, depth)? {
                    self.report.entries += 1;
                    removed = true;
                }
            }
            if !removed {
                return Ok(());
            }
        }
    }
}

/// A filesystem without extended attributes has none to remove, and those that it protects stay.
fn allow_unsupported(error: io::Error) -> io::Result<()> {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EOPNOTSUPP | Errno::EPERM | Errno::EACCES) => Ok(()),
        _ => Err(error),
    }
}

fn os_str(name: &CStr) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(name.to_bytes())
}

#[cfg(test)]
mod tests;
