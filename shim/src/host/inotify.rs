//! Changes of folders and files (inotify(7)).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

/// How long to wait for more after the first change: an update consists of several.
const BURST: Duration = Duration::from_millis(5);
/// Most changes of one burst. The rest stays in the kernel's queue, which is bounded.
const BURST_MAX: usize = 4096;

/// The changes that matter to a program that watches: those that leave something different behind.
fn changes() -> AddWatchFlags {
    AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
}

#[derive(Debug)]
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Watches folders and files.
#[derive(Debug)]
pub(crate) struct Watcher(AsyncFd<Descriptor>);

impl Watcher {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// When the system has no instance left (`fs.inotify.max_user_instances`).
    pub(crate) fn new() -> io::Result<Self> {
        let inotify = Descriptor(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?);
        // SAFETY: the AsyncFd owns the descriptor, which stays the same and open until both are dropped.
        let registered = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) };
        Ok(Self(registered.map_err(|error| error.into_parts().1)?))
    }

    /// Watches an open folder or file, which may have been opened with `O_PATH`. Returns the same descriptor for the
    /// same one, by whatever path it was opened.
    ///
    /// # Errors
    /// When inotify_add_watch(2) fails, for example because of `fs.inotify.max_user_watches`.
    pub(crate) fn add(&self, file: &File) -> io::Result<WatchDescriptor> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(self.0.get_ref().0.add_watch(path.as_str(), changes())?)
    }

    /// Ends a watch.
    ///
    /// # Errors
    /// When there is no such watch any more, because the folder or file is gone.
    pub(crate) fn remove(&self, watch: WatchDescriptor) -> io::Result<()> {
        Ok(self.0.get_ref().0.rm_watch(watch)?)
    }

    /// Waits for a change, and then for the end of the burst that it begins, but not before `earliest`. If this is
    /// cancelled, nothing is lost.
    ///
    /// # Errors
    /// When read(2) fails.
    pub(crate) async fn burst(&self, earliest: Instant) -> io::Result<Vec<InotifyEvent>> {
        let mut ready = self.0.readable().await?;
        sleep_until(earliest.max(Instant::now() + BURST)).await;
        let mut events = Vec::new();
        while events.len() < BURST_MAX {
            match self.0.get_ref().0.read_events() {
                Ok(more) => events.extend(more),
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    break;
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn changes_of_one_update_arrive_together_and_later_ones_are_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let watcher = Watcher::new().unwrap();
        let open = |path: &str| File::open(folder.path().join(path)).unwrap();
        let watch = watcher.add(&open("")).unwrap();
        assert_eq!(watcher.add(&open(".")).unwrap(), watch);
        let names = |events: Vec<InotifyEvent>| {
            let name = |event: InotifyEvent| event.name.unwrap_or_default().into_string().unwrap();
            events.into_iter().filter(|event| event.wd == watch).map(name).collect::<Vec<_>>()
        };
        for round in ["a", "b"] {
            fs::create_dir(folder.path().join(round)).unwrap();
            fs::rename(folder.path().join(round), folder.path().join(format!("{round}2"))).unwrap();
            let moved = format!("{round}2");
            assert_eq!(names(watcher.burst(Instant::now()).await.unwrap()), [round, round, &moved]);
        }
        watcher.remove(watch).unwrap();
        assert!(watcher.remove(watch).is_err());
    }
}
