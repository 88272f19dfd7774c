//! How the guest gets a container's root filesystem, and the disk for its changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_protos::ROOTS_PATH;
use husk_protos::chain::Chain;

use super::disks::Scratch;
use crate::config::problem::Problem;
use crate::config::settings::{Config, RootfsMode};
use crate::disks::layers::{Store, mkfs};
use crate::rootfs::plan::{HostRoot, Layers, RootChoice, RootFacts, RootKind, RootPlan, choose};

/// A container's root, as it was planned.
#[derive(Clone, Debug)]
pub(crate) struct PlannedRoot {
    /// Where it comes from.
    pub(crate) plan: RootPlan,
    /// How the guest gets it.
    pub(crate) choice: RootChoice,
    /// The disk for changes, if the guest has an overlay.
    pub(crate) overlay: Option<Overlay>,
}

/// What an overlay in the guest needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Overlay {
    /// The disk of its upper layer.
    pub(crate) scratch: Scratch,
    /// How long the guest may copy it back.
    pub(crate) timeout: Duration,
    /// Where images of layers are.
    pub(crate) store: Store,
    /// The layers for which the guest gets images.
    pub(crate) layers: Option<Layers>,
}

impl PlannedRoot {
    /// The root of a sandbox without a container, which has none.
    pub(super) fn none() -> Self {
        let choice = RootChoice { kind: RootKind::Virtiofs, why: "a sandbox without a container has none" };
        Self { plan: RootPlan::Host(HostRoot::default()), choice, overlay: None }
    }

    /// Decides how the guest gets a root.
    ///
    /// # Errors
    /// What the host lacks.
    pub(super) fn decide(
        plan: RootPlan,
        mode: RootfsMode,
        facts: RootFacts,
        config: &Config,
    ) -> Result<Self, Vec<Problem>> {
        let mut choice = choose(&plan, mode, facts);
        if choice.kind != RootKind::Overlay {
            return Ok(Self { plan, choice, overlay: None });
        }
        let scratch = Scratch { mib: config.rootfs.overlay_mib, folder: config.scratch_dir.clone(), encrypted: false };
        scratch.check().map_err(|problem| vec![problem])?;
        let layers = match (&plan, mode) {
            (RootPlan::Host(root), RootfsMode::Erofs) => {
                let rejected = |why: String| vec![Problem::quoted("rootfs", "erofs", why)];
                mkfs::check().map_err(|error| rejected(Chain(&error).to_string()))?;
                Layers::of(root).inspect_err(|why| choice.why = why).ok()
            }
            (RootPlan::Host(root), RootfsMode::Auto) => mkfs::check().ok().and_then(|()| Layers::of(root).ok()),
            _ => None,
        };
        let store = Store::new(config.layer_cache_dir.clone(), config.layer_cache_mib);
        let overlay = Overlay { scratch, timeout: config.rootfs.copy_back_timeout, store, layers };
        Ok(Self { plan, choice, overlay: Some(overlay) })
    }

    /// Where a container has it in the guest. `share` is its place in the share, if it has one.
    pub(crate) fn in_guest(&self, container: &str, share: &Path) -> PathBuf {
        match self.choice.kind {
            RootKind::Virtiofs => share.to_owned(),
            RootKind::Overlay | RootKind::Erofs | RootKind::Disks => Path::new(ROOTS_PATH).join(container),
        }
    }

    /// Whether the VM needs disks for it.
    pub(super) fn needs_disks(&self) -> bool {
        self.choice.kind != RootKind::Virtiofs
    }
}
