//! Sources whose changes by the host reach programs in the guest that watch them, such as the kubelet's volumes:
//! virtio-fs does not carry the host's inotify events, so the shim watches the sources, and the guest's kernel repeats
//! each event for its own watchers.
//!
//! Only specs name what is watched. Watches, events and calls are bounded, whatever the guest does in such a source.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::bundle::SourceChanges;
use husk_protos::chain::Chain;
use husk_protos::changes::Change;
use husk_protos::lock::lock;
use nix::sys::inotify::{AddWatchFlags, InotifyEvent, WatchDescriptor};
use tokio::time::Instant;
use ttrpc::Code;

use crate::guest::client::GuestError;
use crate::host::inotify::Watcher;
use crate::rootfs::share::Watchable;
use crate::state::status::{WatchStatus, WatchedVolume};
use crate::vm::Vm;

/// Most watched sources of a sandbox.
const WATCHES_MAX: usize = 64;
/// Most changes of a source in one call. More are lost.
const CHANGES_MAX: usize = 256;
/// Shortest time between two rounds of calls, while the sources keep changing.
const PAUSE: Duration = Duration::from_millis(100);

/// A source of the share.
struct Watch {
    /// Its path on the host, for messages.
    source: PathBuf,
    /// The watch, or why there is none.
    descriptor: Result<WatchDescriptor, String>,
    reported: u64,
    lost: u64,
}

#[derive(Default)]
struct Watched {
    watcher: Option<Arc<Watcher>>,
    /// By the number of the entry in the share.
    watches: BTreeMap<u64, Watch>,
    /// How often the kernel's queue has overflowed.
    overflows: u64,
    /// Why no change can be reported any more.
    broken: Option<String>,
}

/// The watched sources of a sandbox.
#[derive(Clone, Default)]
pub(super) struct Watches(Arc<Mutex<Watched>>);

/// Changes of one source.
#[derive(Debug, Default, PartialEq, Eq)]
struct Batch {
    changes: Vec<u8>,
    count: u64,
    lost: u64,
}

impl Watches {
    /// Watches sources, and reports their changes to the VM's guest from now on. What cannot be watched works without
    /// that: it is logged, and shown in the status. Blocks, in the context of the runtime.
    pub(super) fn add(&self, vm: &Arc<Vm>, sources: Vec<Watchable>) {
        let mut watched = lock(&self.0);
        for source in sources {
            if watched.watches.contains_key(&source.entry) {
                continue;
            }
            let descriptor = self.watch(&mut watched, vm, &source.file);
            let Watchable { entry, source, .. } = source;
            if let Err(why) = &descriptor {
                tracing::warn!(
                    source = %source.display(), why,
                    "programs in the VM do not notice when the host changes a volume"
                );
            }
            watched.watches.insert(entry, Watch { source, descriptor, reported: 0, lost: 0 });
        }
    }

    fn watch(&self, watched: &mut Watched, vm: &Arc<Vm>, source: &File) -> Result<WatchDescriptor, String> {
        if let Some(why) = &watched.broken {
            return Err(why.clone());
        }
        if watched.watches.len() >= WATCHES_MAX {
            return Err(format!("the sandbox has {WATCHES_MAX} watched sources already"));
        }
        let watcher = match &watched.watcher {
            Some(watcher) => watcher.clone(),
            None => {
                let watcher =
                    Watcher::new().map(Arc::new).map_err(|error| failed("create an inotify instance", error))?;
                watched.watcher = Some(watcher.clone());
                tokio::spawn(self.clone().follow(watcher.clone(), vm.clone()));
                watcher
            }
        };
        watcher.add(source).map_err(|error| failed("watch it", error))
    }

    /// Ends the watches of entries that leave the share.
    pub(super) fn remove(&self, entries: &[u64]) {
        let mut watched = lock(&self.0);
        for entry in entries {
            let Some(Ok(descriptor)) = watched.watches.remove(entry).map(|watch| watch.descriptor) else { continue };
            // Two entries of one folder have one watch.
            let shared = watched.watches.values().any(|watch| watch.descriptor.as_ref() == Ok(&descriptor));
            if let Some(watcher) = &watched.watcher
                && !shared
                && let Err(error) = watcher.remove(descriptor)
            {
                tracing::debug!(error = %Chain(&error), "the kernel has ended a watch already");
            }
        }
    }

    /// What is watched; none if nothing is.
    pub(super) fn status(&self) -> Option<WatchStatus> {
        let watched = lock(&self.0);
        let volume = |watch: &Watch| WatchedVolume {
            path: watch.source.clone(),
            problem: watch.descriptor.as_ref().err().cloned(),
            reported: watch.reported,
            lost: watch.lost,
        };
        let volumes: Vec<_> = watched.watches.values().map(volume).collect();
        (!volumes.is_empty()).then_some(WatchStatus { volumes, overflows: watched.overflows })
    }

    /// Reports changes until the VM is dead, or its guest cannot use them.
    async fn follow(self, watcher: Arc<Watcher>, vm: Arc<Vm>) {
        let mut earliest = Instant::now();
        loop {
            let burst = tokio::select! {
                _ = vm.died() => return,
                burst = watcher.burst(earliest) => burst,
            };
            earliest = Instant::now() + PAUSE;
            let events = match burst {
                Ok(events) => events,
                Err(error) => return self.give_up(&failed("read the changes", error)),
            };
            for (entry, batch) in self.sort(events) {
                if let Err(why) = self.report(&vm, entry, batch).await {
                    return self.give_up(&why);
                }
            }
        }
    }

    /// The changes by entry.
    fn sort(&self, events: Vec<InotifyEvent>) -> BTreeMap<u64, Batch> {
        let mut watched = lock(&self.0);
        for event in &events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                watched.overflows += 1;
                tracing::warn!("the kernel's queue of changes has overflowed: programs in the VM miss changes");
            }
            if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                let ended = |watch: &&mut Watch| watch.descriptor.as_ref() == Ok(&event.wd);
                for watch in watched.watches.values_mut().filter(ended) {
                    watch.descriptor = Err("it has been deleted on the host".to_owned());
                }
            }
        }
        let entries = |wd: WatchDescriptor| {
            let watches = watched.watches.iter();
            watches.filter(move |(_, watch)| watch.descriptor.as_ref() == Ok(&wd)).map(|(entry, _)| *entry).collect()
        };
        batches(&events, entries)
    }

    /// Reports changes of one entry to the guest. An error is one of the guest as a whole.
    async fn report(&self, vm: &Vm, entry: u64, batch: Batch) -> Result<(), String> {
        let Batch { changes, count, lost } = batch;
        let request = SourceChanges { entry, changes, ..Default::default() };
        let reported = vm.guest.bundle.change(vm.guest.context(), &request).await;
        let mut watched = lock(&self.0);
        // None: released meanwhile.
        let Some(watch) = watched.watches.get_mut(&entry) else { return Ok(()) };
        watch.lost += lost;
        if lost > 0 {
            tracing::warn!(
                source = %watch.source.display(), lost,
                "a volume changes too often: programs in the VM miss changes"
            );
        }
        let Err(error) = reported else {
            watch.reported += count;
            return Ok(());
        };
        watch.lost += count;
        let unsupported = matches!(
            &error,
            ttrpc::Error::RpcStatus(status)
                if matches!(status.code(), Code::FAILED_PRECONDITION | Code::UNIMPLEMENTED)
        );
        let error = Chain(&GuestError::from(error)).to_string();
        if unsupported {
            return Err(error);
        }
        if vm.cause_of_death().is_none() {
            tracing::warn!(source = %watch.source.display(), error, "failed to report changes to the guest");
        }
        Ok(())
    }

    /// Ends all watches, because no change can be reported any more.
    fn give_up(&self, why: &str) {
        tracing::warn!(why, "programs in the VM do not notice when the host changes a volume");
        let mut watched = lock(&self.0);
        watched.watches.values_mut().for_each(|watch| watch.descriptor = Err(why.to_owned()));
        watched.watcher = None;
        watched.broken = Some(why.to_owned());
    }
}

fn failed(what: &str, error: io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EMFILE) => " (see the sysctl fs.inotify.max_user_instances)",
        Some(libc::ENOSPC) => " (see the sysctl fs.inotify.max_user_watches)",
        _ => "",
    };
    format!("{what}: {error}{hint}")
}

/// Sorts changes by entry; `entries` returns those of a watch. A repeated change of a file's contents or attributes is
/// one change: a program that is told of it looks at the file after the last one.
fn batches(events: &[InotifyEvent], entries: impl Fn(WatchDescriptor) -> Vec<u64>) -> BTreeMap<u64, Batch> {
    let of_file = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_CLOSE_WRITE;
    let of_folder = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVE;
    let mut batches: BTreeMap<u64, Batch> = BTreeMap::new();
    let mut seen: HashSet<(u64, u32, Option<&OsString>)> = HashSet::new();
    for event in events {
        let (mask, name) = (event.mask, event.name.as_ref());
        let reported = match name {
            Some(_) => mask.intersects(of_file | of_folder),
            None => mask.intersects(of_file | AddWatchFlags::IN_MOVE_SELF),
        };
        for entry in entries(event.wd) {
            // Without changes, the guest looks for watched files that are deleted.
            let batch = batches.entry(entry).or_default();
            let bits = mask.bits();
            if !reported || (mask.intersects(of_file) && !seen.insert((entry, bits, name))) {
                continue;
            }
            if batch.count == CHANGES_MAX as u64 {
                batch.lost += 1;
                continue;
            }
            let name = name.map_or(&b""[..], |name| name.as_bytes());
            Change { mask: bits, cookie: event.cookie, name }.encode(&mut batch.changes);
            batch.count += 1;
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use husk_protos::changes::take;
    use nix::sys::inotify::{InitFlags, Inotify};

    use super::*;

    /// Two watch descriptors, which only the kernel can make.
    fn descriptors() -> [WatchDescriptor; 2] {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        ["/", "/proc"].map(|path| inotify.add_watch(path, AddWatchFlags::IN_CREATE).unwrap())
    }

    fn event(wd: WatchDescriptor, mask: AddWatchFlags, cookie: u32, name: &str) -> InotifyEvent {
        InotifyEvent { wd, mask, cookie, name: (!name.is_empty()).then(|| name.into()) }
    }

    fn shown(batch: &Batch) -> Vec<String> {
        let mut rest = &batch.changes[..];
        let show = |change: Change<'_>| {
            format!("{:x} {} {}", change.mask, change.cookie, String::from_utf8_lossy(change.name))
        };
        std::iter::from_fn(|| take(&mut rest)).map(show).collect()
    }

    #[test]
    fn an_update_by_the_kubelet_is_reported_in_its_order_to_each_entry_of_the_folder() {
        let [volume, other] = descriptors();
        let dir = AddWatchFlags::IN_ISDIR;
        let events = [
            event(volume, AddWatchFlags::IN_CREATE | dir, 0, "..2026_2"),
            event(volume, AddWatchFlags::IN_ATTRIB | dir, 0, "..2026_2"),
            event(other, AddWatchFlags::IN_MODIFY, 0, "log"),
            event(volume, AddWatchFlags::IN_ATTRIB | dir, 0, "..2026_2"),
            event(volume, AddWatchFlags::IN_CREATE, 0, "..data_tmp"),
            event(volume, AddWatchFlags::IN_MOVED_FROM, 7, "..data_tmp"),
            event(volume, AddWatchFlags::IN_MOVED_TO, 7, "..data"),
            event(volume, AddWatchFlags::IN_DELETE | dir, 0, "..2026_1"),
            event(other, AddWatchFlags::IN_MODIFY, 0, "log"),
            event(other, AddWatchFlags::IN_DELETE_SELF, 0, ""),
        ];
        let sorted = batches(&events, |wd| if wd == volume { vec![1, 3] } else { vec![2] });
        let update = [
            "40000100 0 ..2026_2",
            "40000004 0 ..2026_2",
            "100 0 ..data_tmp",
            "40 7 ..data_tmp",
            "80 7 ..data",
            "40000200 0 ..2026_1",
        ];
        assert_eq!(sorted.keys().collect::<Vec<_>>(), [&1, &2, &3]);
        assert_eq!(shown(&sorted[&1]), update);
        assert_eq!(sorted[&1], sorted[&3]);
        assert_eq!(shown(&sorted[&2]), ["2 0 log"]);
    }

    #[test]
    fn a_source_that_changes_all_the_time_costs_no_more_than_its_share() {
        let [storm, calm] = descriptors();
        let mut events: Vec<_> =
            (0..1000).map(|n| event(storm, AddWatchFlags::IN_CREATE, 0, &format!("f{n}"))).collect();
        events.push(event(calm, AddWatchFlags::IN_CREATE, 0, "one"));
        let sorted = batches(&events, |wd| vec![u64::from(wd == calm)]);
        assert_eq!((sorted[&0].count, sorted[&0].lost), (256, 744));
        assert_eq!((sorted[&1].count, sorted[&1].lost), (1, 0));
        // A released entry.
        assert!(batches(&events, |_| Vec::new()).is_empty());
    }
}
