//! The disks that a container asks for, and whether its VM needs a controller for them. Pure.

use std::path::{Path, PathBuf};

use crate::config::annotations::Annotations;
use crate::config::names;
use crate::config::problem::Problem;
use crate::config::settings::{Config, RootfsMode};
use crate::config::volumes::VolumeRequest;
use crate::host::digest::Sha256Digest;
use crate::rootfs::plan::RootPlan;
use crate::rootfs::spec::Rewritten;

/// Where a container has its scratch disk.
pub(crate) const SCRATCH: &str = "/scratch";

/// What the annotations ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestedDisks {
    pub(crate) volumes: Vec<VolumeRequest>,
    pub(crate) scratch: Option<Scratch>,
    /// The root hashes that the layers of the root may have; any if there are none.
    root_hashes: Vec<Sha256Digest>,
    /// How the guest is to get the root filesystem.
    pub(super) rootfs: Option<RootfsMode>,
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

impl Scratch {
    /// Checks the folder.
    ///
    /// # Errors
    /// If it does not exist.
    pub(super) fn check(&self) -> Result<(), Problem> {
        let folder = self.folder.display().to_string();
        let missing = || Problem::quoted("scratch_dir", &folder, "is not a folder of the host");
        if self.folder.is_dir() { Ok(()) } else { Err(missing()) }
    }
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
        problems.extend(scratch.as_ref().and_then(|scratch| scratch.check().err()));
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
        let requested = Self {
            volumes: annotations.volumes.clone(),
            scratch,
            root_hashes: annotations.root_hashes.clone(),
            rootfs: annotations.rootfs,
        };
        if problems.is_empty() { Ok(requested) } else { Err(problems) }
    }

    /// Checks that a root consists of layers with the hashes that it may have, and of what the container writes.
    ///
    /// # Errors
    /// Every layer that is not verified, or with another hash.
    pub(super) fn check_root(&self, root: &RootPlan) -> Result<(), Vec<Problem>> {
        if self.root_hashes.is_empty() {
            return Ok(());
        }
        let problem = |value: Option<String>, why: &str| Problem {
            key: format!("annotation {}", names::ROOT_HASHES),
            value,
            why: why.to_owned(),
        };
        let layers: Vec<_> = match root {
            RootPlan::Guest(root) => root.disks.iter().filter(|disk| disk.read_only()).collect(),
            RootPlan::Host(_) => Vec::new(),
        };
        if layers.is_empty() {
            let why = "the root filesystem has no verified layers: use the erofs snapshotter with dm-verity";
            return Err(vec![problem(None, why)]);
        }
        let problems: Vec<Problem> = layers
            .into_iter()
            .filter_map(|layer| {
                let image = layer.image.display();
                match layer.verity {
                    None => Some(problem(None, &format!("the layer {image} has no hash tree"))),
                    Some(verity) if self.root_hashes.contains(&verity.root_hash) => None,
                    Some(verity) => {
                        let why =
                            format!("the layer {image} has another root hash than those that the annotation allows");
                        Some(problem(Some(verity.root_hash.to_string()), &why))
                    }
                }
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// Whether there are any.
    pub(super) fn any(&self) -> bool {
        !self.volumes.is_empty() || self.scratch.is_some()
    }
}

#[cfg(test)]
mod tests {
    use nix::mount::MsFlags;

    use super::*;
    use crate::config::verity::Verity;
    use crate::rootfs::plan::{GuestRoot, HostRoot, Place, RootDisk, Top};

    #[test]
    fn a_root_has_only_layers_with_the_hashes_that_it_may_have() {
        let hash = |digit: &str| Sha256Digest::parse(&digit.repeat(64)).unwrap();
        let disk = |fs_type: &str, root_hash: Option<Sha256Digest>| RootDisk {
            image: format!("/images/{fs_type}").into(),
            fs_type: fs_type.into(),
            flags: if fs_type == "erofs" { MsFlags::MS_RDONLY } else { MsFlags::empty() },
            data: String::new(),
            format: None,
            verity: root_hash.map(|root_hash| Verity { root_hash, hash_offset: 4096 }),
        };
        let root = |disks: Vec<RootDisk>| {
            let top = Top::Folder { place: Place { disk: 0, path: String::new() }, flags: MsFlags::empty() };
            RootPlan::Guest(GuestRoot { disks, folders: Vec::new(), top })
        };
        let (one, two, other) = (hash("1"), hash("2"), hash("f"));
        let requested = RequestedDisks { root_hashes: vec![one, two], ..RequestedDisks::default() };
        let table = [
            (root(vec![disk("erofs", Some(one))]), None),
            (root(vec![disk("erofs", Some(two)), disk("erofs", Some(one)), disk("ext4", None)]), None),
            (root(vec![disk("erofs", Some(one)), disk("erofs", None)]), Some("/images/erofs has no hash tree")),
            (root(vec![disk("erofs", Some(one)), disk("erofs", Some(other))]), Some("has another root hash")),
            (root(vec![disk("ext4", None)]), Some("has no verified layers")),
            (RootPlan::Host(HostRoot::default()), Some("has no verified layers")),
        ];
        for (root, expected) in table {
            let checked = requested.check_root(&root).map_err(|problems| crate::config::problem::join(&problems));
            match (checked, expected) {
                (Ok(()), None) => {}
                (Err(error), Some(expected)) => assert!(error.contains(expected), "{error}"),
                (checked, expected) => panic!("{root:?}: {checked:?}, not {expected:?}"),
            }
            assert_eq!(RequestedDisks::default().check_root(&root), Ok(()));
        }
    }
}
