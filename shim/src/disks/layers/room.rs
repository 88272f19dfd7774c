//! Keeps the store within its size: the image that was used least recently goes first, and none that a VM has or has had
//! a moment ago. Otherwise, the layers of one root that is too large for the store would replace each other forever.

use std::cmp::Reverse;
use std::fs::{File, TryLockError};
use std::time::Duration;

use nix::sys::statvfs::statvfs;

use super::store::{Store, StoreError, Stored, io_error, remove};

/// How much of the store's filesystem stays free, per cent: the images are of less use than what else may need it.
const FREE: u64 = 5;
/// How long an image stays after its last use.
const KEPT: Duration = Duration::from_secs(10 * 60);

/// There is no room for an image.
#[derive(Debug, thiserror::Error)]
pub(super) enum RoomError {
    /// It is larger than all images together may be.
    #[error("its image of about {} MiB is larger than layer_cache_mib = {} allows", need >> 20, limit >> 20)]
    TooLarge { need: u64, limit: u64 },
    /// The other images are in use.
    #[error(
        "layer_cache_mib = {} leaves no room for its image: VMs use the others, or have used them in the last {} minutes",
        limit >> 20,
        KEPT.as_secs() / 60
    )]
    InUse { limit: u64 },
    /// The filesystem is full.
    #[error("the filesystem of layer_cache_dir has less than {FREE} % of its space free")]
    Disk,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Whether an image can fit at all.
///
/// # Errors
/// It is larger than the limit.
pub(super) fn check(store: &Store, need: u64) -> Result<(), RoomError> {
    let limit = store.limit();
    if need > limit { Err(RoomError::TooLarge { need, limit }) } else { Ok(()) }
}

/// Removes images until there is room for `need` bytes more.
///
/// # Errors
/// See [`RoomError`].
pub(super) fn make(store: &Store, need: u64) -> Result<(), RoomError> {
    let limit = store.limit();
    let mut images = store.images()?;
    // The least recently used last.
    images.sort_by_key(|image| Reverse(image.used));
    let mut used: u64 = images.iter().map(|image| image.stamp.bytes).sum();
    loop {
        let fits = used.saturating_add(need) <= limit;
        if fits && has_space(store, need)? {
            return Ok(());
        }
        let Some(image) = images.pop() else {
            return Err(if fits { RoomError::Disk } else { RoomError::InUse { limit } });
        };
        let is_recent = image.used.elapsed().unwrap_or_default() < KEPT;
        if !is_recent && remove_unused(store, &image)? {
            tracing::info!(image = image.digest, layer = %image.stamp.layer.display(), "removed an image for another");
            used = used.saturating_sub(image.stamp.bytes);
        }
    }
}

/// Removes an image, unless a VM has it.
fn remove_unused(store: &Store, image: &Stored) -> Result<bool, StoreError> {
    let (path, stamp) = store.paths(&image.digest);
    let file = File::open(&path).map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(source)) => return Err(io_error("lock", &path)(source)),
    }
    remove(&stamp)?;
    remove(&path)?;
    Ok(true)
}

fn has_space(store: &Store, need: u64) -> Result<bool, StoreError> {
    let folder = store.folder();
    let space = statvfs(folder).map_err(|error| io_error("examine the filesystem of", folder)(error.into()))?;
    let bytes = |blocks: u64| blocks.saturating_mul(space.fragment_size());
    Ok(bytes(space.blocks_available()).saturating_sub(need) >= bytes(space.blocks()) / 100 * FREE)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::disks::layers::identity::Identity;
    use crate::disks::layers::identity::tests::snapshot;
    use crate::disks::layers::store::Lookup;
    use crate::disks::layers::store::tests::published;

    #[test]
    fn the_least_recently_used_image_goes_and_one_in_use_stays() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("store"), 4);
        let layers = [1, 2, 3].map(|number| snapshot(folder.path(), number));
        let now = SystemTime::now();
        let digests = layers.each_ref().map(|layer| published(&store, layer, 1 << 20));
        let used = |index: usize, age: Duration| {
            File::open(store.paths(&digests[index]).1).unwrap().set_modified(now - age).unwrap();
        };
        let left = || layers.each_ref().map(|layer| matches!(store.find(layer).unwrap(), Lookup::Ready(_)));
        // All are recent.
        let error = make(&store, 2 << 20).unwrap_err();
        assert!(matches!(error, RoomError::InUse { .. }), "{error}");
        let age = || [3, 1, 2].into_iter().enumerate().for_each(|(index, times)| used(index, KEPT * times));
        age();
        make(&store, 1 << 20).unwrap();
        assert_eq!(left(), [true; 3]);
        age();
        make(&store, 2 << 20).unwrap();
        assert_eq!(left(), [false, true, true]);
        // A use makes it the most recent one, and the machine has a copy of the descriptor.
        let Lookup::Ready(image) = store.find(&layers[2]).unwrap() else { panic!("no image") };
        let machine = image.into_fd();
        used(1, KEPT * 2);
        make(&store, 3 << 20).unwrap();
        assert_eq!(left(), [false, false, true]);
        used(2, KEPT * 2);
        let error = make(&store, 4 << 20).unwrap_err();
        assert!(matches!(error, RoomError::InUse { .. }), "{error}");
        assert_eq!(left(), [false, false, true]);
        drop(machine);
        used(2, KEPT * 2);
        make(&store, 4 << 20).unwrap();
        assert_eq!(left(), [false; 3]);
        store.sweep().unwrap();
        assert_eq!(std::fs::read_dir(store.folder().join("layers")).unwrap().count(), 0);
        assert!(matches!(check(&store, 5 << 20).unwrap_err(), RoomError::TooLarge { .. }));
        assert!(Identity::of(&layers[0]).is_ok());
    }
}
