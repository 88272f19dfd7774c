//! What is in a share, and who uses it. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::source::Source;
use super::waiting::Waiting;

/// The entries of a share. Each has a number, which is its name in the share and is never used again: the guest may
/// still remember what an old name led to.
#[derive(Debug, Default)]
pub(super) struct Entries {
    next: u64,
    roots: BTreeMap<String, Root>,
    volumes: Vec<Volume>,
}

/// A container's root filesystem.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) number: u64,
    /// How many filesystems are stacked on each other in the shim's mount namespace.
    pub(super) filesystems: usize,
    waiting: Option<Waiting>,
}

/// A source of bind mounts.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) number: u64,
    source: Source,
    pub(super) is_dir: bool,
    /// Whether its mount point is complete.
    ready: bool,
    waiting: Option<Waiting>,
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
#[derive(Debug)]
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
    pub(super) fn add_root(&mut self, container: &str, filesystems: usize) -> u64 {
        let number = self.number();
        self.roots.insert(container.to_owned(), Root { number, filesystems, waiting: None });
        number
    }

    /// The number of a container's root.
    pub(super) fn root(&self, container: &str) -> Option<u64> {
        self.roots.get(container).map(|root| root.number)
    }

    /// Notes what is to be mounted on the root of a container.
    pub(super) fn root_waits(&mut self, container: &str, waiting: Waiting) {
        if let Some(root) = self.roots.get_mut(container) {
            root.waiting = Some(waiting);
        }
    }

    /// Returns the volume with this source for one more use, if there is one.
    pub(super) fn reuse(&mut self, source: &Source, container: &str, writes: bool) -> Option<u64> {
        let volume = self.volumes.iter_mut().find(|volume| volume.ready && volume.source == *source)?;
        *volume.users.entry(container.to_owned()).or_default() |= writes;
        Some(volume.number)
    }

    /// Adds a volume, which can be reused as soon as [`volume_waits`](Self::volume_waits) was called.
    pub(super) fn add_volume(&mut self, source: Source, is_dir: bool, container: &str, writes: bool) -> u64 {
        let number = self.number();
        let users = BTreeMap::from([(container.to_owned(), writes)]);
        let (ready, waiting, watched) = (false, None, None);
        self.volumes.push(Volume { number, source, is_dir, ready, waiting, read_only: !writes, users, watched });
        number
    }

    /// Notes what is to be mounted on a volume's mount point, which is complete.
    pub(super) fn volume_waits(&mut self, number: u64, waiting: Waiting) {
        if let Some(volume) = self.volumes.iter_mut().find(|volume| volume.number == number) {
            (volume.ready, volume.waiting) = (true, Some(waiting));
        }
    }

    /// What is to be mounted for a container: the entries, and whether the guest may only read.
    pub(super) fn waiting(&self, container: &str) -> impl Iterator<Item = (u64, &Waiting, bool)> {
        let root = self.roots.get(container).and_then(|root| Some((root.number, root.waiting.as_ref()?, false)));
        let used = self.volumes.iter().filter(move |volume| volume.users.contains_key(container));
        let used = used.filter_map(|volume| Some((volume.number, volume.waiting.as_ref()?, !volume.is_written())));
        root.into_iter().chain(used)
    }

    /// Notes that an entry has been mounted.
    pub(super) fn attached(&mut self, number: u64) {
        for root in self.roots.values_mut().filter(|root| root.number == number) {
            root.waiting = None;
        }
        for volume in self.volumes.iter_mut().filter(|volume| volume.number == number) {
            (volume.waiting, volume.read_only) = (None, !volume.is_written());
        }
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
        let attached = |volume: &&mut Volume| volume.ready && volume.waiting.is_none();
        self.volumes.iter_mut().filter(attached).filter(|volume| volume.read_only == volume.is_written())
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
