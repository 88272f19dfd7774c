//! The Bundle service: stores a container's spec, and mounts the share that contains the containers' root filesystems.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use husk_protos::bundle::{
    CopyBackRequest, CopyBackResponse, DiskRoot, PutBundleRequest, PutBundleResponse, ReleaseRequest, ReleaseResponse,
    RemoveBundleRequest, RemoveBundleResponse, SourceChanges,
};
use husk_protos::lock::lock;
use husk_protos::{SHARE_PATH, SHARE_TAG};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::unistd::mkdir;
use ttrpc::r#async::TtrpcContext;

use crate::changes::report;
use crate::error::{CallError, FailureKind};
use crate::forward::socket::Sockets;
use crate::paths;
use crate::roots;
use crate::rpc::{handle, handle_uninterrupted};
use crate::task::Tasks;

#[derive(Clone)]
pub(crate) struct BundleService {
    tasks: Arc<Tasks>,
    sockets: Arc<Sockets>,
    share_mounted: Arc<Mutex<bool>>,
}

impl BundleService {
    pub(crate) fn new(tasks: Arc<Tasks>, sockets: Arc<Sockets>) -> Self {
        Self { tasks, sockets, share_mounted: Arc::default() }
    }

    /// Mounts the share for the first bundle whose spec refers to it. A guest that only boots does not wait for
    /// virtiofsd, and containers whose root filesystem is elsewhere do not need it.
    fn mount_share(&self) -> Result<(), CallError> {
        let mut mounted = lock(&self.share_mounted);
        if *mounted {
            return Ok(());
        }
        fs::create_dir_all(SHARE_PATH).map_err(|e| CallError::internal(format_args!("create {SHARE_PATH}"), &e))?;
        match mount(Some(SHARE_TAG), SHARE_PATH, Some("virtiofs"), MsFlags::empty(), None::<&str>) {
            Ok(()) => *mounted = true,
            // virtiofs returns EINVAL if no device has the tag.
            Err(Errno::EINVAL | Errno::ENODEV | Errno::ENOENT) => {
                let what = format!("the guest has no virtio-fs device with the tag {SHARE_TAG}: is virtiofsd running?");
                return Err(CallError::new(FailureKind::FailedPrecondition, what));
            }
            Err(error) => {
                return Err(CallError::internal(format_args!("mount the share at {SHARE_PATH}"), &error));
            }
        }
        Ok(())
    }

    fn put(&self, request: &PutBundleRequest) -> Result<String, CallError> {
        paths::check_id(&request.id)?;
        if refers_to_share(&request.spec) || request.disk_root.as_ref().is_some_and(is_above_share) {
            self.mount_share()?;
        }
        let bundle = paths::bundle(&request.id);
        write_bundle(&bundle, request)?;
        self.complete(request).inspect_err(|_| {
            if let Err(error) = self.remove(&request.id) {
                tracing::error!(container = request.id, %error, "failed to remove an incomplete bundle");
            }
        })?;
        Ok(bundle.to_string_lossy().into_owned())
    }

    /// Adds what a bundle needs besides its files.
    fn complete(&self, request: &PutBundleRequest) -> Result<(), CallError> {
        self.sockets
            .add(&request.id, &request.sockets, request.relay_port)
            .map_err(|e| CallError::internal(format_args!("create the sockets of {}", request.id), &e))?;
        match request.disk_root.as_ref() {
            Some(root) => roots::mount(&request.id, root)
                .map_err(|e| CallError::internal(format_args!("mount the root of {}", request.id), &e)),
            None => Ok(()),
        }
    }

    /// Unmounts entries of the share and forgets their files, so that virtiofsd closes them.
    fn release(&self, entries: &[u64]) -> Result<(), CallError> {
        // Nothing is known of a share that is not mounted.
        if !*lock(&self.share_mounted) {
            return Ok(());
        }
        entries.iter().try_for_each(|entry| forget(&Path::new(SHARE_PATH).join(entry.to_string())))
    }

    fn remove(&self, id: &str) -> Result<(), CallError> {
        paths::check_id(id)?;
        if self.tasks.has(id) {
            let what = format!("the bundle of {id} is in use: delete its task instead");
            return Err(CallError::new(FailureKind::FailedPrecondition, what));
        }
        roots::unmount(id)
            .and_then(|()| paths::allow_missing(fs::remove_dir_all(paths::bundle(id))))
            .and_then(|()| self.sockets.remove(id))
            .map_err(|e| CallError::internal(format_args!("remove the bundle of {id}"), &e))
    }
}

/// Makes the kernel forget a name that the host has removed from the share. A lookup for a creation asks virtiofsd, even
/// if the kernel believes to know the answer. Because the name is gone, the kernel then unmounts everything below it and
/// drops the dentries and inodes, whose descriptors virtiofsd holds open. Nothing is created: the share is read-only.
fn forget(path: &Path) -> Result<(), CallError> {
    match mkdir(path, Mode::empty()) {
        Err(Errno::EROFS) => Ok(()),
        Err(Errno::EEXIST) => {
            let what = format!("release {}: the host still has it", path.display());
            Err(CallError::new(FailureKind::FailedPrecondition, what))
        }
        Err(error) => Err(CallError::internal(format_args!("release {}", path.display()), &error)),
        Ok(()) => {
            Err(CallError::new(FailureKind::Internal, format!("release {}: the share is writable", path.display())))
        }
    }
}

fn refers_to_share(spec: &[u8]) -> bool {
    spec.windows(SHARE_PATH.len()).any(|part| part == SHARE_PATH.as_bytes())
}

/// Whether a root is an overlay above a part of the share.
fn is_above_share(root: &DiskRoot) -> bool {
    let places = root.lower.iter().chain(root.attributes_of.as_ref());
    places.into_iter().any(|place| Path::new(&place.disk).starts_with(SHARE_PATH))
}

fn write_bundle(bundle: &Path, request: &PutBundleRequest) -> Result<(), CallError> {
    let failed = |e: io::Error| CallError::internal(format_args!("write the bundle {}", bundle.display()), &e);
    if let Some(parent) = bundle.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    fs::DirBuilder::new().mode(0o700).create(bundle).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => {
            CallError::new(FailureKind::AlreadyExists, format!("bundle {} already exists", request.id))
        }
        _ => failed(e),
    })?;
    let mut config = fs::OpenOptions::new();
    config.write(true).create_new(true).mode(0o600);
    let write = || {
        if !request.mounts_below.is_empty() {
            fs::write(bundle.join(paths::MOUNTS_BELOW), request.mounts_below.join(&b'\0'))?;
        }
        config.open(bundle.join("config.json"))?.write_all(&request.spec)
    };
    or_remove(bundle, write).map_err(failed)
}

/// Writes into a new bundle, and removes it with its contents if that fails.
fn or_remove(bundle: &Path, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    write().inspect_err(|_| {
        if let Err(error) = fs::remove_dir_all(bundle) {
            tracing::error!(bundle = %bundle.display(), %error, "failed to remove an incomplete bundle");
        }
    })
}

#[async_trait]
impl husk_protos::bundle_ttrpc::Bundle for BundleService {
    async fn put(&self, _: &TtrpcContext, request: PutBundleRequest) -> ttrpc::Result<PutBundleResponse> {
        if request.disk_root.is_none() {
            let path = handle(async { self.put(&request) }).await?;
            return Ok(PutBundleResponse { path, ..Default::default() });
        }
        let service = self.clone();
        // On a thread: mounting may read disks, and PID 1 must send heartbeats meanwhile.
        let put = tokio::task::spawn_blocking(move || service.put(&request));
        let path = handle(async { put.await.unwrap_or_else(|e| Err(CallError::internal("put", &e))) }).await?;
        Ok(PutBundleResponse { path, ..Default::default() })
    }

    async fn release(&self, _: &TtrpcContext, request: ReleaseRequest) -> ttrpc::Result<ReleaseResponse> {
        let service = self.clone();
        // On a thread: unmounting may write back and drop many files, and PID 1 must send heartbeats meanwhile.
        let released = tokio::task::spawn_blocking(move || service.release(&request.entries));
        let released = async { released.await.unwrap_or_else(|e| Err(CallError::internal("release", &e))) };
        handle(released).await.map(|()| ReleaseResponse::new())
    }

    async fn change(&self, _: &TtrpcContext, mut request: SourceChanges) -> ttrpc::Result<SourceChanges> {
        let changes = std::mem::take(&mut request.changes);
        let entry = request.entry;
        // On a thread, because the kernel asks virtiofsd for the files.
        let reported = tokio::task::spawn_blocking(move || report(entry, &changes));
        let reported = async { reported.await.unwrap_or_else(|e| Err(CallError::internal("report changes", &e))) };
        handle(reported).await.map(|()| request)
    }

    async fn copy_back(&self, _: &TtrpcContext, request: CopyBackRequest) -> ttrpc::Result<CopyBackResponse> {
        let tasks = self.tasks.clone();
        handle_uninterrupted(async move { tasks.copy_back(request).await }).await
    }

    async fn remove(&self, _: &TtrpcContext, request: RemoveBundleRequest) -> ttrpc::Result<RemoveBundleResponse> {
        let service = self.clone();
        let removed = tokio::task::spawn_blocking(move || service.remove(&request.id));
        let removed = async { removed.await.unwrap_or_else(|e| Err(CallError::internal("remove", &e))) };
        handle(removed).await.map(|()| RemoveBundleResponse::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_written_completely_and_never_overwritten() {
        let parent = tempfile::tempdir().unwrap();
        let bundle = parent.path().join("bundles/c");
        let request = PutBundleRequest { id: "c".into(), spec: b"{}".into(), ..Default::default() };
        write_bundle(&bundle, &request).unwrap();
        assert_eq!(fs::read(bundle.join("config.json")).unwrap(), b"{}");
        assert_eq!(write_bundle(&bundle, &request).unwrap_err().kind, FailureKind::AlreadyExists);
        assert!(bundle.join("config.json").exists());
    }

    #[test]
    fn a_bundle_that_cannot_be_written_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let bundle = parent.path().join("c");
        fs::create_dir(&bundle).unwrap();
        let half = || fs::write(bundle.join("config.json"), "{").and(Err(ErrorKind::StorageFull.into()));
        assert_eq!(or_remove(&bundle, half).unwrap_err().kind(), ErrorKind::StorageFull);
        assert!(!bundle.exists());
    }
}
