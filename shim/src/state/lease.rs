//! Leases of what a host has only once. A lease is a file that names its holder, created and removed under a lock in a
//! directory beside the sandboxes. No namespace's name begins with a dot, and neither does a lease's.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::StateError;
use crate::host::lock;
use crate::host::process::ProcessId;

const LOCK: &str = "lock";
const NEW: &str = "new";

/// The holder of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holder {
    /// containerd's namespace.
    pub(crate) namespace: String,
    pub(crate) sandbox: String,
    /// The sandbox's shim. After its death another sandbox may take the lease over.
    pub(crate) shim: ProcessId,
}

/// A file operation on a lease failed.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}", path.display())]
pub struct LeaseError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A directory of leases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct LeaseDir {
    dir: PathBuf,
}

/// The lock of a directory, until it is dropped.
pub(super) struct Locked {
    _lock: Flock<File>,
}

impl LeaseDir {
    /// The directory `name` beside the sandboxes under `base`.
    pub(super) fn under(base: &Path, name: &str) -> Self {
        Self { dir: base.join(name) }
    }

    /// The names of all leases.
    pub(super) fn names(&self) -> Result<Vec<String>, LeaseError> {
        let failed = |source| LeaseError { what: "list", path: self.dir.clone(), source };
        let listing = match fs::read_dir(&self.dir) {
            Ok(entries) => entries.collect::<io::Result<Vec<_>>>().map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let names = listing.iter().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter(|name| name != LOCK && name != NEW).collect())
    }

    /// Leases a number of `among`: the first without a lease, or else the first whose holder is dead. `None` if there is
    /// none. `claim` returns false for a number that cannot be had, `record` runs before the lease is written.
    pub(super) fn lease_number<E>(
        &self,
        among: RangeInclusive<u32>,
        holder: &Holder,
        record: &mut dyn FnMut(u32) -> Result<(), StateError>,
        claim: &mut dyn FnMut(u32) -> Result<bool, E>,
    ) -> Result<Option<u32>, E>
    where
        E: From<LeaseError> + From<StateError>,
    {
        let locked = self.lock()?;
        let leased: HashSet<u32> = self.names()?.iter().filter_map(|name| name.parse().ok()).collect();
        // Try unleased numbers first: checking whether a holder is alive is the slowest part, and other shims wait for
        // the lock.
        let free = among.clone().filter(|number| !leased.contains(number));
        for number in free.chain(among.clone().filter(|number| leased.contains(number))) {
            let name = number.to_string();
            if leased.contains(&number) && self.living_holder(&name)?.is_some() || !claim(number)? {
                continue;
            }
            record(number)?;
            self.write(&locked, &name, holder)?;
            return Ok(Some(number));
        }
        Ok(None)
    }

    /// Returns the holder of a lease, `None` if there is none or if the lease cannot be decoded.
    pub(super) fn holder(&self, name: &str) -> Result<Option<Holder>, LeaseError> {
        self.read(name)
    }

    /// Reads a lease with more in it than its holder.
    pub(super) fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, LeaseError> {
        let path = self.path(name);
        match fs::read(&path) {
            // A damaged lease counts as free: what it is about is still protected by the kernel while it is in use.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LeaseError { what: "read", path, source }),
        }
    }

    /// Returns the holder of a lease if it is alive.
    pub(super) fn living_holder(&self, name: &str) -> Result<Option<Holder>, LeaseError> {
        let Some(holder) = self.holder(name)? else { return Ok(None) };
        Ok(self.lives(name, &holder)?.then_some(holder))
    }

    /// Whether the holder of a lease is alive.
    pub(super) fn lives(&self, name: &str, holder: &Holder) -> Result<bool, LeaseError> {
        let failed = |source| LeaseError { what: "look for the holder of", path: self.path(name), source };
        holder.shim.runs().map_err(failed)
    }

    /// Writes a lease by rename: readers do not take the lock and must never see a part of it.
    pub(super) fn write(&self, _locked: &Locked, name: &str, lease: &impl Serialize) -> Result<(), LeaseError> {
        let (path, new) = (self.path(name), self.path(NEW));
        let write = || -> io::Result<()> {
            let bytes = serde_json::to_vec(lease)?;
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?.write_all(&bytes)?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| LeaseError { what: "write", path, source })
    }

    /// Releases leases, except those that another shim holds by now. The last release removes the directory.
    pub(super) fn release(&self, names: impl IntoIterator<Item = String>, shim: ProcessId) -> Result<(), LeaseError> {
        if !self.dir.exists() {
            return Ok(());
        }
        let _locked = self.lock()?;
        for name in names {
            if self.holder(&name)?.is_some_and(|holder| holder.shim == shim) {
                let path = self.path(&name);
                fs::remove_file(&path).map_err(|source| LeaseError { what: "remove", path, source })?;
            }
        }
        if self.names()?.is_empty() {
            // The lock's file too. Whoever waits for the lock will notice: see `lock`.
            let removed = fs::remove_dir_all(&self.dir);
            removed.map_err(|source| LeaseError { what: "remove", path: self.dir.clone(), source })?;
        }
        Ok(())
    }

    pub(super) fn lock(&self) -> Result<Locked, LeaseError> {
        let path = self.path(LOCK);
        let open = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
            match OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path) {
                // The last release may have removed the directory in between.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                opened => opened.map(Some),
            }
        };
        let locked = lock::lock(&path, lock::TIMEOUT, open);
        Ok(Locked { _lock: locked.map_err(|source| LeaseError { what: "lock", path, source })? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}
