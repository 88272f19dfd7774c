//! How the guest gets a container's root filesystem, and the disk for its changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_protos::ROOTS_PATH;
use husk_protos::chain::Chain;

use super::disks::Scratch;
use crate::config::problem::Problem;
use crate::config::settings::{Config, RootfsMode};
use crate::disks::format::FormatError;
use crate::disks::layers::{Store, mkfs};
use crate::disks::scratch;
use crate::rootfs::plan::{HostRoot, Layers, READ_ONLY, RootChoice, RootFacts, RootKind, RootPlan, choose};

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
    /// How long the guest may copy it back. It does not copy what is created in a read-only root before its program starts:
    /// places for mounts.
    pub(crate) timeout: Option<Duration>,
    /// Where images of layers are.
    pub(crate) store: Store,
    /// The layers for which the guest gets images.
    pub(crate) layers: Option<Layers>,
}

/// The disk of an overlay's upper layer.
fn disk_for_changes(config: &Config) -> Scratch {
    Scratch { mib: config.rootfs.overlay_mib, folder: config.scratch_dir.clone(), encrypted: false }
}

/// The value of the key.
fn name(mode: RootfsMode) -> &'static str {
    RootfsMode::NAMES.iter().find(|(_, named)| *named == mode).map_or("", |(name, _)| name)
}

/// Without a program, the host cannot have roots of this kind.
fn lacks(mode: RootfsMode, error: &FormatError) -> Problem {
    Problem::quoted("rootfs", name(mode), Chain(error).to_string())
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
        let layers = match (&plan, mode) {
            (RootPlan::Host(root), RootfsMode::Erofs) => {
                mkfs::check().map_err(|error| vec![lacks(mode, &error)])?;
                Layers::of(root).inspect_err(|why| choice.why = why).ok()
            }
            (RootPlan::Host(root), RootfsMode::Auto) => mkfs::check().ok().and_then(|()| Layers::of(root).ok()),
            _ => None,
        };
        if facts.read_only && layers.is_none() {
            choice = RootChoice { kind: RootKind::Virtiofs, why: READ_ONLY };
            return Ok(Self { plan, choice, overlay: None });
        }
        let scratch = disk_for_changes(config);
        scratch.check().map_err(|problem| vec![problem])?;
        let store = Store::new(config.layer_cache_dir.clone(), config.layer_cache_mib);
        let timeout = (!facts.read_only).then_some(config.rootfs.copy_back_timeout);
        let overlay = Overlay { scratch, timeout, store, layers };
        Ok(Self { plan, choice, overlay: Some(overlay) })
    }

    /// What the host lacks for the roots that a configuration asks for, and what it does without otherwise.
    pub(super) fn check(config: &Config) -> (Vec<Problem>, Option<String>) {
        let mode = config.rootfs.mode;
        if mode == RootfsMode::Virtiofs {
            return (Vec::new(), None);
        }
        let mut problems: Vec<Problem> = disk_for_changes(config).check().err().into_iter().collect();
        problems.extend(scratch::check_host().err().map(|error| lacks(mode, &error)));
        let note = match (mode, mkfs::check()) {
            (RootfsMode::Erofs, Err(error)) => {
                problems.push(lacks(mode, &error));
                None
            }
            (RootfsMode::Auto, Err(error)) => {
                Some(format!("rootfs = \"auto\": without images of layers: {}", Chain(&error)))
            }
            _ => None,
        };
        (problems, note)
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
