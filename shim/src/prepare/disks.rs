//! The disks that a container asks for, and whether its VM needs a controller for them. Pure.

use std::path::{Path, PathBuf};

use crate::config::annotations::Annotations;
use crate::config::names;
use crate::config::problem::Problem;
use crate::config::settings::Config;
use crate::config::volumes::VolumeRequest;
use crate::rootfs::spec::Rewritten;

/// Where a container has its scratch disk.
pub(crate) const SCRATCH: &str = "/scratch";

/// What the annotations ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestedDisks {
    pub(crate) volumes: Vec<VolumeRequest>,
    pub(crate) scratch: Option<Scratch>,
}

/// A disk for data that ends with the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scratch {
    pub(crate) mib: u64,
    /// Where its file is on the host.
    pub(crate) folder: PathBuf,
    /// The guest encrypts it with a key of its own.
    pub(crate) encrypted: bool,
}

impl RequestedDisks {
    /// What the annotations of a container ask for.
    ///
    /// # Errors
    /// Everything that the container cannot have.
    pub(super) fn of(annotations: &Annotations, config: &Config, rewritten: &Rewritten) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let encrypted = annotations.scratch_encrypted;
        let scratch = annotations.scratch_mib.map(|mib| Scratch { mib, folder: config.scratch_dir.clone(), encrypted });
        if encrypted && scratch.is_none() {
            let why = format!("there is no scratch disk: set {}", names::SCRATCH_MIB);
            problems.push(Problem::quoted(format!("annotation {}", names::SCRATCH_ENCRYPTED), "true", why));
        }
        if let Some(Scratch { folder, .. }) = &scratch
            && !folder.is_dir()
        {
            let folder = folder.display().to_string();
            problems.push(Problem::quoted("scratch_dir", &folder, "is not a folder of the host"));
        }
        let taken = |path: &Path| rewritten.mounts_any(&[&path.to_string_lossy()]);
        let volumes = annotations.volumes.iter().map(|volume| (names::VOLUMES, volume.destination.as_path()));
        let scratches = scratch.iter().map(|_| (names::SCRATCH_MIB, Path::new(SCRATCH)));
        for (annotation, path) in volumes.chain(scratches).filter(|(_, path)| taken(path)) {
            let path = path.display().to_string();
            problems.push(Problem::quoted(
                format!("annotation {annotation}"),
                &path,
                "the spec mounts something else there",
            ));
        }
        let requested = Self { volumes: annotations.volumes.clone(), scratch };
        if problems.is_empty() { Ok(requested) } else { Err(problems) }
    }

    /// Whether there are any.
    pub(super) fn any(&self) -> bool {
        !self.volumes.is_empty() || self.scratch.is_some()
    }
}
