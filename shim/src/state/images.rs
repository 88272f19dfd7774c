//! Leases of disk images: the files `<state>/.images/<image>-<shim's PID>`. The lock on an image excludes other machines;
//! a lease says which sandbox has it.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::StateError;
use super::lease::{Holder, LeaseDir, LeaseError};
use crate::host::process::ProcessId;

const DIR: &str = ".images";

/// Why an image cannot be leased.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageLeaseError {
    /// A file operation failed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The undo step could not be recorded.
    #[error(transparent)]
    State(#[from] StateError),
    /// The image's lock.
    #[error("lock")]
    Lock(#[source] io::Error),
    /// This process's start time.
    #[error("read the start time of this process")]
    Shim(#[source] io::Error),
    /// Another sandbox, or a program that is not husk, has locked the image.
    #[error("{}", in_use(.0.as_ref()))]
    InUse(Option<Holder>),
}

fn in_use(holder: Option<&Holder>) -> String {
    match holder {
        Some(Holder { namespace, sandbox, .. }) => {
            format!("in use by the VM of sandbox {sandbox} in namespace {namespace}")
        }
        None => "in use by another program of the host".to_owned(),
    }
}

/// The leases of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct ImageLeases {
    dir: LeaseDir,
}

fn name(image: &str, shim: ProcessId) -> String {
    format!("{image}-{}", shim.pid)
}

impl ImageLeases {
    /// The leases that are kept beside the sandboxes under `base`.
    pub(crate) fn under(base: &Path) -> Self {
        Self { dir: LeaseDir::under(base, DIR) }
    }

    /// Locks an image, with an identity of characters that a file's name may have, and leases it. `record` runs before;
    /// `lock` returns false if the image is locked.
    ///
    /// # Errors
    /// [`ImageLeaseError::InUse`], or a failed step.
    pub(crate) fn lease(
        &self,
        image: &str,
        holder: &Holder,
        record: impl FnOnce() -> Result<(), StateError>,
        lock: impl FnOnce() -> io::Result<bool>,
    ) -> Result<(), ImageLeaseError> {
        record()?;
        // Others see a lock and its lease together.
        let locked = self.dir.lock()?;
        if !lock().map_err(ImageLeaseError::Lock)? {
            return Err(ImageLeaseError::InUse(self.holder(image)?));
        }
        Ok(self.dir.write(&locked, &name(image, holder.shim), holder)?)
    }

    /// A sandbox that has the image, if one is known.
    ///
    /// # Errors
    /// A failed file operation.
    pub(crate) fn holder(&self, image: &str) -> Result<Option<Holder>, LeaseError> {
        let beginning = format!("{image}-");
        for name in self.dir.names()?.iter().filter(|name| name.starts_with(&beginning)) {
            if let Some(holder) = self.dir.living_holder(name)? {
                return Ok(Some(holder));
            }
        }
        Ok(None)
    }

    /// Releases a lease.
    ///
    /// # Errors
    /// A failed file operation.
    pub(crate) fn release(&self, image: &str, shim: ProcessId) -> Result<(), LeaseError> {
        self.dir.release([name(image, shim)], shim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_image_is_rejected_with_the_sandbox_that_has_it() {
        let base = tempfile::tempdir().unwrap();
        let leases = ImageLeases::under(base.path());
        let shim = ProcessId::own().unwrap();
        let holder = |sandbox: &str| Holder { namespace: "ns".into(), sandbox: sandbox.into(), shim };
        let lease = |image: &str, free| leases.lease(image, &holder("one"), || Ok(()), || Ok(free));
        assert_eq!(lease("8-7", false).unwrap_err().to_string(), "in use by another program of the host");
        lease("8-7", true).unwrap();
        let error = lease("8-7", false).unwrap_err().to_string();
        assert_eq!(error, "in use by the VM of sandbox one in namespace ns");
        // Another image whose identity begins with the same digits.
        assert_eq!(lease("8-70", false).unwrap_err().to_string(), "in use by another program of the host");
        leases.release("8-7", shim).unwrap();
        assert!(leases.dir.names().unwrap().is_empty());
    }
}
