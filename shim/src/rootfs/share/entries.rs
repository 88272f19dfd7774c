//! What is in a share, and who uses it. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::source::Source;

/// The entries of a share. Each has a number, which is its name in the share and is never used again: the guest may
/// still remember what an old name led to.
#[derive(Debug, Default)]
pub(super) struct Entries {
    next: u64,
    roots: BTreeMap<String, Root>,
    volumes: Vec<Volume>,
}

/// A container's root filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) number: u64,
    /// How many mounts are stacked on each other.
    pub(super) mounts: usize,
}

/// A source of bind mounts.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) number: u64,
    source: Source,
    pub(super) is_dir: bool,
    /// Whether its mount is complete.
    mounted: bool,
    /// Whether the host keeps the guest from writing.
    pub(super) read_only: bool,
    /// The containers that use it, and whether they may write.
    users: BTreeMap<String, bool>,
    /// Its path on the host, if a container's programs notice changes by the host.
    watched: Option<PathBuf>,
}

impl Volume {
    /// Whether a container may write.
    fn is_written(&self) -> bool {
        self.users.values().any(|writes| *writes)
    }
}

/// What no container uses any more.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Unused {
    pub(super) root: Option<Root>,
    /// Number, and whether it is a folder.
    pub(super) volumes: Vec<(u64, bool)>,
}

impl Entries {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Adds the root of a container.
    pub(super) fn add_root(&mut self, container: &str, mounts: usize) -> u64 {
        let number = self.number();
        self.roots.insert(container.to_owned(), Root { number, mounts });
        number
    }

    /// Returns the volume with this source for one more use, if there is one.
    pub(super) fn reuse(&mut self, source: &Source, container: &str, writes: bool) -> Option<u64> {
        let volume = self.volumes.iter_mut().find(|volume| volume.mounted && volume.source == *source)?;
        *volume.users.entry(container.to_owned()).or_default() |= writes;
        Some(volume.number)
    }

    /// Adds a volume, which can be reused as soon as [`mounted`](Self::mounted) was called.
    pub(super) fn add_volume(&mut self, source: Source, is_dir: bool, container: &str, writes: bool) -> u64 {
        let number = self.number();
        let users = BTreeMap::from([(container.to_owned(), writes)]);
        self.volumes.push(Volume { number, source, is_dir, mounted: false, read_only: !writes, users, watched: None });
        number
    }

    /// Makes a volume reusable.
    pub(super) fn mounted(&mut self, number: u64) {
        self.volumes.iter_mut().filter(|volume| volume.number == number).for_each(|volume| volume.mounted = true);
    }

    /// Notes that changes of a volume by the host are noticed in the guest.
    pub(super) fn watch(&mut self, number: u64, source: &Path) {
        let volume = self.volumes.iter_mut().find(|volume| volume.number == number);
        volume.into_iter().for_each(|volume| volume.watched = Some(source.to_owned()));
    }

    /// The watched volumes that a container uses, and their paths on the host.
    pub(super) fn watched(&self, container: &str) -> Vec<(u64, PathBuf)> {
        let used = self.volumes.iter().filter(|volume| volume.users.contains_key(container));
        used.filter_map(|volume| Some((volume.number, volume.watched.clone()?))).collect()
    }

    /// The volumes for which the host allows less or more than their users may do.
    pub(super) fn unsettled(&mut self) -> impl Iterator<Item = &mut Volume> {
        self.volumes.iter_mut().filter(|volume| volume.mounted && volume.read_only == volume.is_written())
    }

    /// Ends all uses by a container, and removes what has no user left.
    pub(super) fn release(&mut self, container: &str) -> Unused {
        let root = self.roots.remove(container);
        for volume in &mut self.volumes {
            volume.users.remove(container);
        }
        let unused = self.volumes.extract_if(.., |volume| volume.users.is_empty());
        Unused { root, volumes: unused.map(|volume| (volume.number, volume.is_dir)).collect() }
    }
}
