//! The Bundle service: a container's spec and small files, and the share that holds its root file system.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use husk_protos::bundle::{PutBundleRequest, PutBundleResponse, RemoveBundleRequest, RemoveBundleResponse};
use husk_protos::{SHARE_PATH, SHARE_TAG};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use ttrpc::r#async::TtrpcContext;

use crate::error::{Error, Kind};
use crate::places;
use crate::rpc::answer;
use crate::task::Tasks;

/// The Bundle service.
pub struct Service {
    tasks: Arc<Tasks>,
    /// The share is there.
    shared: Mutex<bool>,
}

impl Service {
    /// For bundles of these tasks.
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks, shared: Mutex::new(false) }
    }

    /// Mounts the share with the first bundle whose spec names it: a guest that is only booted does not wait for virtiofsd, and a
    /// container with its root file system elsewhere needs none.
    fn mount_share(&self) -> Result<(), Error> {
        let mut shared = self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if *shared {
            return Ok(());
        }
        let failed = |what: &str, e: &dyn std::error::Error| {
            Error::internal(format_args!("{what} the share at {SHARE_PATH}"), e)
        };
        fs::create_dir_all(SHARE_PATH).map_err(|e| failed("make a folder for", &e))?;
        match mount(Some(SHARE_TAG), SHARE_PATH, Some("virtiofs"), MsFlags::empty(), None::<&str>) {
            Ok(()) => *shared = true,
            // virtiofs says EINVAL when no device has the tag.
            Err(Errno::EINVAL | Errno::ENODEV | Errno::ENOENT) => {
                let what = format!("the guest has no virtio-fs device with the tag {SHARE_TAG}: is virtiofsd running?");
                return Err(Error::new(Kind::FailedPrecondition, what));
            }
            Err(error) => return Err(failed("mount", &error)),
        }
        Ok(())
    }

    fn put(&self, request: &PutBundleRequest) -> Result<String, Error> {
        places::check_id(&request.id)?;
        if names_share(&request.spec) {
            self.mount_share()?;
        }
        let folder = places::bundle(&request.id);
        write_bundle(&folder, request)?;
        Ok(folder.to_string_lossy().into_owned())
    }

    fn remove(&self, id: &str) -> Result<(), Error> {
        places::check_id(id)?;
        if self.tasks.has(id) {
            return Err(Error::new(Kind::FailedPrecondition, format!("the bundle of {id} goes with its task")));
        }
        match fs::remove_dir_all(places::bundle(id)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::internal(format_args!("remove the bundle of {id}"), &error))
            }
            _ => Ok(()),
        }
    }
}

fn names_share(spec: &[u8]) -> bool {
    spec.windows(SHARE_PATH.len()).any(|part| part == SHARE_PATH.as_bytes())
}

fn write_bundle(folder: &Path, request: &PutBundleRequest) -> Result<(), Error> {
    let failed = |e: io::Error| Error::internal(format_args!("write the bundle {}", folder.display()), &e);
    if let Some(parent) = folder.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    fs::DirBuilder::new().mode(0o700).create(folder).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => Error::new(Kind::AlreadyExists, format!("bundle {} exists", request.id)),
        _ => failed(e),
    })?;
    let mut config = fs::OpenOptions::new();
    config.write(true).create_new(true).mode(0o600);
    let written = config.open(folder.join("config.json")).and_then(|mut file| file.write_all(&request.spec));
    written.map_err(|error| {
        if let Err(error) = fs::remove_dir_all(folder) {
            tracing::error!(bundle = %folder.display(), %error, "remove a bundle that could not be written");
        }
        failed(error)
    })
}

#[async_trait]
impl husk_protos::bundle_ttrpc::Bundle for Service {
    async fn put(&self, _: &TtrpcContext, request: PutBundleRequest) -> ttrpc::Result<PutBundleResponse> {
        let path = answer(async { self.put(&request) }).await?;
        Ok(PutBundleResponse { path, ..Default::default() })
    }

    async fn remove(&self, _: &TtrpcContext, request: RemoveBundleRequest) -> ttrpc::Result<RemoveBundleResponse> {
        answer(async { self.remove(&request.id) }).await.map(|()| RemoveBundleResponse::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_written_once_and_whole() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("bundles/c");
        let request = PutBundleRequest { id: "c".into(), spec: b"{}".into(), ..Default::default() };
        write_bundle(&folder, &request).unwrap();
        assert_eq!(fs::read(folder.join("config.json")).unwrap(), b"{}");
        assert_eq!(write_bundle(&folder, &request).unwrap_err().kind, Kind::AlreadyExists);
    }
}
