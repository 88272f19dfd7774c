//! The process that makes the requested images, one at a time on a host. It ends when there is no request left.
//!
//! It runs at the lowest priority, in the cgroup of the shims and not in a pod's. A killed one leaves its requests to the
//! next.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use husk_protos::chain::Chain;
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::alarm;

use super::identity::{Identity, IdentityError};
use super::room::RoomError;
use super::store::{Store, StoreError, io_error};
use super::tree::TreeError;
use super::{launch, mkfs, room, tree};
use crate::containerd::log::Log;
use crate::disks::format::FormatError;

/// How long one image may take: minutes suffice for gigabytes on a slow disk.
const WITHIN: Duration = Duration::from_secs(10 * 60);
/// Then the kernel ends the builder, whatever it waits for: seconds.
const LAST: u32 = 15 * 60;
/// Address space of the builder and of mkfs.erofs, each. It keeps an inode of some 500 bytes for each file.
const MEMORY: u64 = 2 << 30;
/// A longer log starts afresh.
const LOG_MAX: u64 = 256 * 1024;
/// linux/ioprio.h: the class of a process that uses a disk only while no other does.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_IDLE: libc::c_int = 3 << 13;

/// Why a layer has no image.
#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Room(#[from] RoomError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("write the image")]
    Format(#[from] FormatError),
    #[error("it changed while its image was made")]
    Changed,
}

/// Makes all images that are requested. Returns at once if another builder works.
///
/// # Errors
/// When the store cannot be used. That of one layer is logged and remembered.
pub fn run() -> Result<()> {
    crate::host::child::reserve().context("reserve descriptors")?;
    let store = launch::store().context("find the store")?;
    store.prepare()?;
    let Some(mut lock) = store.lock()? else { return Ok(()) };
    let log = store.folder().join("builder.log");
    if fs::metadata(&log).is_ok_and(|metadata| metadata.len() > LOG_MAX) {
        fs::remove_file(&log).context("start the log afresh")?;
    }
    let _log = Log::init_waiting(&log, "layers", "builder").context("open the log")?;
    restrict(&store).context("lower the priority")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    loop {
        runtime.block_on(make_wanted(&store))?;
        drop(lock);
        // A request after the last look has found the lock taken, and relies on this builder.
        if store.wanted()?.is_empty() {
            return Ok(());
        }
        match store.lock()? {
            Some(again) => lock = again,
            None => return Ok(()),
        }
    }
}

/// Works only when nobody else does, and within limits.
fn restrict(store: &Store) -> io::Result<()> {
    // SAFETY: both calls take numbers.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) })?;
    // SAFETY: as above.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE) })?;
    setrlimit(Resource::RLIMIT_AS, MEMORY, MEMORY)?;
    Ok(setrlimit(Resource::RLIMIT_FSIZE, store.limit(), store.limit())?)
}

async fn make_wanted(store: &Store) -> Result<(), StoreError> {
    loop {
        store.sweep()?;
        let wanted = store.wanted()?;
        if wanted.is_empty() {
            return Ok(());
        }
        for (identity, layer) in wanted {
            // Its effect is SIGALRM's, which ends the process.
            alarm::set(LAST);
            let started = Instant::now();
            let made = make(store, &identity, &layer).await;
            let ms = started.elapsed().as_millis() as u64;
            match &made {
                Ok(Some(digest)) => tracing::info!(layer = %layer.display(), digest, ms, "the layer has an image"),
                Ok(None) => tracing::info!(layer = %layer.display(), "the layer has been removed or replaced"),
                Err(error) => {
                    tracing::warn!(layer = %layer.display(), ms, error = %Chain(error), "the layer has no image");
                }
            }
            let failure = made.err().map(|error| format!("{}: {}", layer.display(), Chain(&error)));
            store.settle(&identity, failure.as_deref())?;
            alarm::cancel();
        }
    }
}

/// Gives a layer an image. Returns the image's name, or nothing if the layer is not the one that was meant.
async fn make(store: &Store, identity: &Identity, layer: &Path) -> Result<Option<String>, BuildError> {
    let deadline = Instant::now() + WITHIN;
    match Identity::of(layer) {
        Ok(now) if now == *identity => {}
        Ok(_) => return Ok(None),
        Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let before = tree::survey(layer, deadline)?;
    room::check(store, before.bytes)?;
    let digest = tree::digest(layer, deadline)?;
    if !is_complete(store, &digest, deadline)? {
        room::make(store, before.bytes)?;
        let folder = store.images_folder();
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600);
        let mut image = options.open(&folder).map_err(io_error("create an image in", &folder))?;
        mkfs::write(layer, &image, deadline.saturating_duration_since(Instant::now())).await?;
        let sha256 = tree::file_digest(&mut image, deadline).map_err(io_error("read the image in", &folder))?;
        if tree::survey(layer, deadline)? != before {
            return Err(BuildError::Changed);
        }
        store.publish(&digest, &image, sha256, layer)?;
    }
    store.link(identity, &digest)?;
    Ok(Some(digest))
}

/// Whether there is an image of a layer with this digest. All its bytes are compared with its stamp, since another layer
/// is going to rely on it.
fn is_complete(store: &Store, digest: &str, deadline: Instant) -> Result<bool, StoreError> {
    let Some((stamp, mut file, _)) = store.complete(digest)? else { return Ok(false) };
    let path = store.paths(digest).0;
    let sha256 = tree::file_digest(&mut file, deadline).map_err(io_error("read", &path))?;
    if sha256 != stamp.sha256 {
        tracing::warn!(image = %path.display(), "an image of a layer is damaged, and is made again");
    }
    Ok(sha256 == stamp.sha256)
}
