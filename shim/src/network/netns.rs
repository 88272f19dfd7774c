//! Runs a closure inside a network namespace.
//!
//! setns(2) moves only the calling thread, so the closure gets a thread of its own. The thread ends with the closure: a
//! pool's thread would carry the namespace into unrelated work.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use husk_protos::lock::lock;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};

use super::error::{NetworkError, ObjectError};

/// The network namespace of the shim, which is the node's unless containerd runs in another one.
const OWN: &str = "/proc/self/ns/net";
/// The network namespace of the node.
const NODE: &str = "/proc/1/ns/net";

/// Beyond the work's own deadline: how long the caller waits for the thread to report. The work stops at its deadline,
/// except while a system call blocks.
const REPORT: Duration = Duration::from_secs(1);

mod ioctl {
    // NS_GET_NSTYPE, _IO(0xb7, 0x3): ioctl_nsfs(2).
    nix::ioctl_none!(ns_get_nstype, 0xb7, 0x3);
}

/// A network namespace that a sandbox uses: its path, and which namespace that path named.
///
/// Recorded before the namespace is changed, so that the change can be undone after a crash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Path of the namespace.
    pub netns: PathBuf,
    /// st_dev of the namespace's file.
    pub device: u64,
    /// st_ino of the namespace's file: together with `device`, which namespace it is.
    pub inode: u64,
}

/// Checks that a path names a network namespace that a VM can be connected to.
///
/// # Errors
///
/// The path cannot be opened, is not a network namespace, or is the namespace of the shim or of the node.
pub fn claim(netns: &Path) -> Result<Claim, NetworkError> {
    let (_, claim) = open(netns)?;
    let is_claimed = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == (claim.device, claim.inode);
    let own = fs::metadata(OWN).map_err(|source| NetworkError::Open { path: OWN.into(), source })?;
    // A shim in a container may not be allowed to look at process 1, whose namespace is then not the claimed one.
    if is_claimed(own) || fs::metadata(NODE).is_ok_and(is_claimed) {
        return Err(NetworkError::NodeNetwork { path: netns.to_owned() });
    }
    Ok(claim)
}

/// Opens a namespace and identifies it.
pub(super) fn open(netns: &Path) -> Result<(File, Claim), NetworkError> {
    let failed = |source| NetworkError::Open { path: netns.to_owned(), source };
    // The path may name something else: /proc/<pid>/fd/<number> does once another process has the PID. O_PATH runs no
    // code of a device, changes no FIFO, and does not fail for a socket.
    let place = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(netns).map_err(failed)?;
    if fstatfs(&place).map_err(|errno| failed(errno.into()))?.filesystem_type() != NSFS_MAGIC {
        return Err(NetworkError::NotANamespace { path: netns.to_owned() });
    }
    let file = File::open(format!("/proc/self/fd/{}", place.as_raw_fd())).map_err(failed)?;
    // SAFETY: the request takes no argument and the descriptor is open.
    let kind = unsafe { ioctl::ns_get_nstype(file.as_raw_fd()) };
    if kind != Ok(libc::CLONE_NEWNET) {
        return Err(NetworkError::NotANamespace { path: netns.to_owned() });
    }
    let metadata = file.metadata().map_err(failed)?;
    Ok((file, Claim { netns: netns.to_owned(), device: metadata.dev(), inode: metadata.ino() }))
}

impl Claim {
    /// Whether both name the same namespace, by whatever path.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Opens the namespace.
    ///
    /// # Errors
    ///
    /// It is gone, or another one has its path.
    pub(crate) fn open(&self) -> Result<File, NetworkError> {
        let (file, now) = open(&self.netns)?;
        if now == *self { Ok(file) } else { Err(NetworkError::Replaced { path: self.netns.clone() }) }
    }

    /// Whether the namespace no longer exists under its path.
    pub(super) fn is_gone(&self) -> Result<bool, NetworkError> {
        match open(&self.netns) {
            Ok((_, now)) => Ok(now != *self),
            // `ip netns delete` and containerd unmount the namespace and remove the file, in two steps.
            Err(NetworkError::NotANamespace { .. }) => Ok(true),
            Err(NetworkError::Open { source, .. }) if is_missing(&source) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Runs `work` on a new thread inside the namespace and waits for its result. `work` gets the deadline and has to
    /// stop there.
    pub(super) fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(Instant) -> Result<T, ObjectError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        self.run_or_undo(limit, work, drop)
    }

    /// Like [`Self::run`]. If the caller has given up before `work` is done, the thread undoes it.
    pub(super) fn run_or_undo<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(Instant) -> Result<T, ObjectError> + Send + 'static,
        undo: impl FnOnce(T) + Send + 'static,
    ) -> Result<T, NetworkError> {
        let path = self.netns.clone();
        let file = self.open()?;
        let deadline = Instant::now() + limit;
        let outcome = Arc::new(Outcome::default());
        let (entered, report) = (path.clone(), outcome.clone());
        thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                let ending = Ending(&report);
                let result = match setns(&file, CloneFlags::CLONE_NEWNET) {
                    Ok(()) => work(deadline).map_err(|source| NetworkError::Inside { path: entered, source }),
                    Err(errno) => Err(NetworkError::Enter { path: entered, source: errno.into() }),
                };
                if let Err(Ok(unwanted)) = ending.0.report(result) {
                    undo(unwanted);
                }
            })
            .map_err(|source| NetworkError::Enter { path: path.clone(), source })?;
        match outcome.wait(limit + REPORT) {
            Some(Some(result)) => result,
            Some(None) => Err(NetworkError::Panicked { path }),
            None => Err(NetworkError::Deadline { path, limit }),
        }
    }
}

/// What a thread reports to its caller, unless the caller has given up.
struct Outcome<T> {
    state: Mutex<OutcomeState<T>>,
    changed: Condvar,
}

enum OutcomeState<T> {
    Waiting,
    Reported(T),
    /// The thread has ended without a report.
    Ended,
    /// The caller has given up, or has the result.
    Closed,
}

impl<T> Default for Outcome<T> {
    fn default() -> Self {
        Self { state: Mutex::new(OutcomeState::Waiting), changed: Condvar::new() }
    }
}

impl<T> Outcome<T> {
    /// Reports a result. Returns it if the caller has given up.
    fn report(&self, result: T) -> Result<(), T> {
        let mut state = lock(&self.state);
        if !matches!(*state, OutcomeState::Waiting) {
            return Err(result);
        }
        *state = OutcomeState::Reported(result);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for the report; the inner option is none if there will be none, the outer one after `limit`.
    fn wait(&self, limit: Duration) -> Option<Option<T>> {
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, limit, |state| matches!(state, OutcomeState::Waiting));
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, OutcomeState::Closed) {
            OutcomeState::Reported(result) => Some(Some(result)),
            OutcomeState::Ended => Some(None),
            OutcomeState::Waiting | OutcomeState::Closed => None,
        }
    }
}

/// Notices the end of a thread that panics.
struct Ending<'a, T>(&'a Outcome<T>);

impl<T> Drop for Ending<'_, T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if matches!(*state, OutcomeState::Waiting) {
            *state = OutcomeState::Ended;
            self.0.changed.notify_all();
        }
    }
}

/// ESRCH: the process of a /proc/<pid>/ns/net path has exited.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ESRCH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::Namespace;
    use husk_protos::chain::Chain;

    const SECOND: Duration = Duration::from_secs(1);

    fn current() -> u64 {
        fs::metadata("/proc/thread-self/ns/net").unwrap().ino()
    }

    #[test]
    fn work_runs_inside_and_the_caller_stays_outside() {
        let namespace = Namespace::new();
        let claim = claim(&namespace.path()).unwrap();
        let before = current();
        let inside = claim.run(SECOND, |_| Ok(current())).unwrap();
        assert_eq!(inside, claim.inode);
        assert_eq!(current(), before);
        assert_ne!(inside, before);
    }

    #[test]
    fn other_files_are_rejected_by_path() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/proc/self/ns/mnt"), Path::new("/dev/null")] {
            let error = claim(path).unwrap_err();
            assert_eq!(error.to_string(), format!("{} is not a network namespace", path.display()));
        }
        let error = claim(Path::new("/nonexistent/netns")).unwrap_err();
        let text = Chain(&error).to_string();
        assert_eq!(text, "open the network namespace /nonexistent/netns: No such file or directory (os error 2)");
    }

    #[test]
    fn a_namespace_that_was_replaced_or_removed_is_gone() {
        let (first, second) = (Namespace::new(), Namespace::new());
        let mut claim = claim(&first.path()).unwrap();
        assert!(!claim.is_gone().unwrap());
        claim.netns = second.path();
        assert!(claim.is_gone().unwrap());
        assert!(matches!(claim.run(SECOND, |_| Ok(())), Err(NetworkError::Replaced { .. })));
        claim.netns = "/nonexistent/netns".into();
        assert!(claim.is_gone().unwrap());
    }

    #[test]
    fn a_namespace_whose_descriptor_now_belongs_to_something_else_is_gone_and_nothing_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let open = |path: &Path| OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
        let others: [std::os::fd::OwnedFd; 4] = [
            std::os::unix::net::UnixDatagram::unbound().unwrap().into(),
            open(&fifo).into(),
            open(Path::new("/dev/null")).into(),
            File::open("/proc/self/ns/mnt").unwrap().into(),
        ];
        let mut claim = claim(&Namespace::new().path()).unwrap();
        for other in others {
            claim.netns = format!("/proc/{}/fd/{}", std::process::id(), other.as_raw_fd()).into();
            assert!(claim.is_gone().unwrap(), "{other:?}");
            assert!(matches!(claim.open(), Err(NetworkError::NotANamespace { .. })), "{other:?}");
        }
    }

    #[test]
    fn the_nodes_own_network_is_rejected_by_any_path() {
        // A container's security policy may hide the namespaces of process 1.
        let visible = |path: &&str| fs::metadata(path).is_ok();
        for path in [OWN].into_iter().chain([NODE].into_iter().filter(visible)) {
            assert!(matches!(claim(Path::new(path)), Err(NetworkError::NodeNetwork { .. })), "{path}");
        }
    }

    #[test]
    fn the_caller_does_not_wait_past_the_deadline_and_the_thread_undoes_its_work() {
        let namespace = Namespace::new();
        let start = Instant::now();
        let (resume, paused) = std::sync::mpsc::channel::<()>();
        let (undone, undo) = std::sync::mpsc::channel();
        let result = claim(&namespace.path()).unwrap().run_or_undo(
            Duration::from_millis(10),
            move |_| {
                // Returns when the test lets go, or has failed.
                let _ = paused.recv();
                Ok(7)
            },
            move |work| undone.send(work).unwrap(),
        );
        assert!(matches!(result, Err(NetworkError::Deadline { .. })));
        assert!(start.elapsed() < 10 * SECOND);
        drop(resume);
        assert_eq!(undo.recv_timeout(10 * SECOND).unwrap(), 7);
    }

    #[test]
    fn a_panic_inside_is_an_error() {
        let result = claim(&Namespace::new().path()).unwrap().run::<()>(SECOND, |_| panic!("a test"));
        assert!(matches!(result, Err(NetworkError::Panicked { .. })), "{result:?}");
    }
}
