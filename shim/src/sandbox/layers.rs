//! Images of a root's layers as disks of the VM. Where some are missing, they are made after the container's start, for the
//! next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;

use crate::disks::image::Image;
use crate::disks::layers::launch;
use crate::disks::layers::store::{Lookup, Store, StoreError};
use crate::disks::{GuestMount, Kind, NewDisk};
use crate::host::cgroup::home;
use crate::rootfs::plan::Layers;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Sandbox, WantedLayers};
use crate::sandbox::thread::blocking;
use crate::vm::Vm;

/// Most disks of a VM that has images of layers: some of the 255 remain for other disks.
const MAX_DISKS: usize = 224;

/// What the store has for a root.
enum Found {
    /// An image of each layer.
    All(Vec<Image>),
    /// Some images are missing.
    Missing(Vec<PathBuf>),
    /// Images do not help.
    Never(&'static str),
}

impl Sandbox {
    /// Attaches the images of a root's layers, and returns where the guest has mounted them, the uppermost first; or why
    /// the container has to do without. Missing ones are noted, for [`Self::make_layers`].
    ///
    /// # Errors
    /// When the VM is dead.
    pub(super) async fn attach_layers(
        &self,
        vm: &Arc<Vm>,
        id: &str,
        store: &Store,
        layers: &Layers,
    ) -> Result<Result<Vec<PathBuf>, &'static str>, SandboxError> {
        let (of_store, of_root) = (store.clone(), layers.clone());
        let images = match blocking("find images of layers", move || find(&of_store, &of_root)).await {
            Ok(Found::All(images)) => images,
            Ok(Found::Never(why)) => return Ok(Err(why)),
            Err(error) => {
                tracing::warn!(container = id, error = %Chain(&error), "failed to look for images of layers");
                return Ok(Err("the folder of the images cannot be used"));
            }
            Ok(Found::Missing(missing)) => {
                self.want_layers(store, missing);
                return Ok(Err("the images of its layers are made in the background"));
            }
        };
        if self.disks.table().disks.len() + images.len() > MAX_DISKS {
            return Ok(Err("the VM has too many disks for the images of its layers"));
        }
        let mount = || GuestMount { fs_type: "erofs".to_owned(), flags: libc::MS_RDONLY, ..GuestMount::default() };
        let disks = images.into_iter().map(|image| NewDisk::new(Kind::Layer, image, Some(mount()))).collect();
        let attached = self.attach_several(vm, id, disks).await;
        let mut paths = Vec::new();
        for (attached, layer) in attached.into_iter().zip(&layers.lower) {
            match attached {
                Ok(attached) => paths.push(attached.guest_path),
                Err(error) if vm.cause_of_death().is_some() => return Err(error),
                Err(error) => {
                    // It may be damaged. A guest may also lie, so nothing is removed: the builder compares it.
                    tracing::warn!(
                        container = id,
                        layer = %layer.display(),
                        error = %Chain(&error),
                        "the guest cannot use the image of a layer"
                    );
                    self.detach_disks(id).await;
                    self.want_layers(store, vec![layer.clone()]);
                    return Ok(Err("the guest cannot use the image of a layer"));
                }
            }
        }
        Ok(Ok(paths))
    }

    fn want_layers(&self, store: &Store, layers: Vec<PathBuf>) {
        let mut wanted = lock(&self.wanted_layers);
        match wanted.as_mut().filter(|wanted| wanted.store == *store) {
            Some(wanted) => wanted.layers.extend(layers),
            None => *wanted = Some(WantedLayers { store: store.clone(), layers }),
        }
    }

    /// Has the missing images made in the background, after a container has started: earlier, this would take the CPUs and
    /// the disk that the container needs.
    pub(super) fn make_layers(&self) {
        let Some(WantedLayers { store, layers }) = lock(&self.wanted_layers).take() else { return };
        let order = move || {
            if !store.request(&layers)? {
                return Ok(());
            }
            let failed = |source| StoreError::Io { what: "start the builder of", path: store.folder().into(), source };
            let program = std::env::current_exe().map_err(failed)?;
            // In the cgroup in which the shim was started: the images do not belong to this sandbox.
            let status = home::files().and_then(|cgroups| launch::order(&program, &store, cgroups)).map_err(failed)?;
            match status.success() {
                true => Ok(()),
                false => Err(failed(std::io::Error::other(status.to_string()))),
            }
        };
        tokio::spawn(async move {
            let ordered = blocking("request images of layers", move || order().map_err(SandboxError::from));
            if let Err(error) = ordered.await {
                tracing::warn!(error = %Chain(&error), "failed to request images of layers");
            }
        });
    }
}

fn find(store: &Store, layers: &Layers) -> Result<Found, StoreError> {
    if !is_empty(&layers.upper)? {
        return Ok(Found::Never("the snapshot has changes already"));
    }
    let (mut images, mut missing) = (Vec::new(), Vec::new());
    for layer in &layers.lower {
        match store.find(layer)? {
            Lookup::Ready(image) => images.push(image),
            Lookup::Missing => missing.push(layer.clone()),
            Lookup::Never(reason) => {
                tracing::info!(layer = %layer.display(), reason, "a layer cannot have an image");
                return Ok(Found::Never("a layer cannot have an image"));
            }
        }
    }
    Ok(if missing.is_empty() { Found::All(images) } else { Found::Missing(missing) })
}

fn is_empty(folder: &Path) -> Result<bool, StoreError> {
    let failed = |source| StoreError::Io { what: "list", path: folder.to_owned(), source };
    Ok(fs::read_dir(folder).map_err(failed)?.next().is_none())
}
