//! CIDs of guests on the kernel's vsock device. They are the whole machine's, so a sandbox leases one: the lease is a file that says whose it is,
//! `<state>/.cids/<cid>`, made and removed under a lock. No namespace's name begins with a dot.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::error::StateError;
use crate::host::process::ProcessId;

/// 0 to 2 are the kernel's (vsock(7)), and 3 is what the shim's own device calls each of its guests.
pub const CIDS: RangeInclusive<u32> = 4..=65535;
const FOLDER: &str = ".cids";
const LOCK: &str = "lock";
/// Holders look through a folder, and are done.
const LOCKED: Duration = Duration::from_secs(5);
/// Between two attempts to lock: flock(2) has no deadline.
const PAUSE: Duration = Duration::from_millis(2);

/// Whose a CID is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub sandbox: String,
    /// Its shim: when that is dead, the lease may be another's.
    pub shim: ProcessId,
}

/// Why no CID was leased.
#[derive(Debug, thiserror::Error)]
pub enum CidError {
    /// A file operation failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused it.
    #[error("claim vsock CID {cid}: {source}")]
    Claim {
        /// Which.
        cid: u32,
        /// Why.
        source: io::Error,
    },
    /// The step could not be written down.
    #[error("{0}")]
    State(#[from] StateError),
    /// None is left.
    #[error("no vsock CID is free: all of {} to {} are in use", CIDS.start(), CIDS.end())]
    Exhausted,
}

/// The leases of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Leases {
    dir: PathBuf,
}

impl Leases {
    /// Those beside the sandboxes under `base`.
    pub fn under(base: &Path) -> Self {
        Self { dir: base.join(FOLDER) }
    }

    /// Leases the first of `among` that nobody has leased, or if there is none, the first that a dead shim has left; and that `claim` gets of the
    /// kernel: other programs have guests too. `record` is called before the lease is made.
    ///
    /// # Errors
    ///
    /// When none is free, or a file operation, `record` or `claim` failed.
    pub fn lease(
        &self,
        among: RangeInclusive<u32>,
        holder: &Holder,
        record: &mut dyn FnMut(u32) -> Result<(), StateError>,
        claim: &mut dyn FnMut(u32) -> io::Result<bool>,
    ) -> Result<u32, CidError> {
        let _lock = self.lock()?;
        // Looking for each one's shim takes longer than all else, and others wait for the lock.
        let leased = self.leased()?;
        let (taken, free): (Vec<u32>, Vec<u32>) = among.partition(|cid| leased.contains(cid));
        for cid in free.into_iter().chain(taken) {
            if leased.contains(&cid) && self.is_held(cid)?
                || !claim(cid).map_err(|source| CidError::Claim { cid, source })?
            {
                continue;
            }
            record(cid)?;
            self.write(cid, holder)?;
            return Ok(cid);
        }
        Err(CidError::Exhausted)
    }

    /// Who holds a CID; none when nobody does, or nobody knows.
    ///
    /// # Errors
    ///
    /// When its file cannot be read.
    pub fn holder(&self, cid: u32) -> Result<Option<Holder>, CidError> {
        let path = self.path(cid);
        match fs::read(&path) {
            // One that cannot be understood is nobody's: the kernel still keeps a living guest's CID from others.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CidError::Io { what: "read", path, source }),
        }
    }

    /// Gives back a CID, if it is still the one that this shim has leased.
    ///
    /// # Errors
    ///
    /// When a file operation failed.
    pub fn release(&self, cid: u32, shim: ProcessId) -> Result<(), CidError> {
        if !self.dir.exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        if self.holder(cid)?.is_none_or(|holder| holder.shim != shim) {
            return Ok(());
        }
        let path = self.path(cid);
        fs::remove_file(&path).map_err(|source| CidError::Io { what: "remove", path, source })
    }

    fn leased(&self) -> Result<HashSet<u32>, CidError> {
        let failed = |source| CidError::Io { what: "list", path: self.dir.clone(), source };
        let listing =
            fs::read_dir(&self.dir).and_then(|entries| entries.collect::<io::Result<Vec<_>>>()).map_err(failed)?;
        Ok(listing.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }

    fn is_held(&self, cid: u32) -> Result<bool, CidError> {
        let Some(holder) = self.holder(cid)? else { return Ok(false) };
        holder.shim.runs().map_err(|source| CidError::Io {
            what: "look for the holder of",
            path: self.path(cid),
            source,
        })
    }

    /// Renamed into its place: whoever reads it, without the lock, finds all of it or nothing.
    fn write(&self, cid: u32, holder: &Holder) -> Result<(), CidError> {
        let (path, new) = (self.path(cid), self.dir.join("new"));
        let write = || -> io::Result<()> {
            let bytes = serde_json::to_vec(holder)?;
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?.write_all(&bytes)?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| CidError::Io { what: "write", path, source })
    }

    fn path(&self, cid: u32) -> PathBuf {
        self.dir.join(cid.to_string())
    }

    fn lock(&self) -> Result<Flock<File>, CidError> {
        let path = self.dir.join(LOCK);
        let failed = |source| CidError::Io { what: "lock", path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(failed)?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = file.map_err(failed)?;
        let deadline = Instant::now() + LOCKED;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((again, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < deadline => file = again,
                Err((_, error)) => return Err(failed(error.into())),
            }
            std::thread::sleep(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::process::{Child, Command};
    use std::sync::Mutex;

    fn holder(shim: ProcessId) -> Holder {
        Holder { namespace: "ns".into(), sandbox: "s1".into(), shim }
    }

    fn own() -> Holder {
        holder(ProcessId::own().unwrap())
    }

    fn lease(leases: &Leases, among: RangeInclusive<u32>, holder: &Holder) -> Result<u32, CidError> {
        leases.lease(among, holder, &mut |_| Ok(()), &mut |_| Ok(true))
    }

    /// A process in the place of a shim.
    fn shim() -> (Child, ProcessId) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        (child, id)
    }

    #[test]
    fn each_gets_another_until_there_are_none_and_those_given_back_come_again() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        assert_eq!([4, 5, 6].map(|_| lease(&leases, 4..=6, &own()).unwrap()), [4, 5, 6]);
        let none = lease(&leases, 4..=6, &own()).unwrap_err().to_string();
        assert_eq!(none, "no vsock CID is free: all of 4 to 65535 are in use");
        leases.release(5, own().shim).unwrap();
        assert_eq!(leases.holder(5).unwrap(), None);
        leases.release(5, own().shim).unwrap();
        assert_eq!(lease(&leases, 4..=6, &own()).unwrap(), 5);
        assert_eq!(leases.holder(5).unwrap(), Some(own()));
        assert_eq!((*CIDS.start(), *CIDS.end()), (4, 65535));
    }

    #[test]
    fn at_once_nobody_gets_anothers() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        // Threads lock by descriptors of their own, as processes do.
        let got = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..16 {
                        let cid = lease(&leases, CIDS, &own()).unwrap();
                        got.lock().unwrap().push(cid);
                    }
                });
            }
        });
        let got = got.into_inner().unwrap();
        assert_eq!(got.iter().collect::<BTreeSet<_>>().len(), 128, "{got:?}");
        assert_eq!(got.iter().max(), Some(&131));
    }

    #[test]
    fn a_dead_shims_is_taken_over_and_not_given_back_by_who_cleans_up_after_it() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        let (mut child, dead) = shim();
        assert_eq!(lease(&leases, 4..=5, &holder(dead)).unwrap(), 4);
        assert_eq!(lease(&leases, 4..=5, &own()).unwrap(), 5);
        assert!(lease(&leases, 4..=5, &own()).is_err(), "a living shim's was taken");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(lease(&leases, 4..=6, &own()).unwrap(), 6, "a dead one's before one that was nobody's");
        assert_eq!(lease(&leases, 4..=6, &own()).unwrap(), 4);
        leases.release(4, dead).unwrap();
        assert_eq!(leases.holder(4).unwrap(), Some(own()), "the new holder's lease was removed");
    }

    #[test]
    fn what_the_kernel_gives_to_others_is_left_alone_and_nothing_is_done_before_it_is_written_down() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        fs::create_dir_all(base.path().join(FOLDER)).unwrap();
        fs::write(base.path().join(FOLDER).join("5"), "{").unwrap();
        let mut recorded = Vec::new();
        let mut record = |cid| {
            assert!(!leases.holder(cid).is_ok_and(|holder| holder.is_some()), "leased before it was recorded");
            recorded.push(cid);
            Ok(())
        };
        // What cannot be read of 5 does not hold it; a guest of another program has 4.
        assert_eq!(leases.lease(4..=5, &own(), &mut record, &mut |cid| Ok(cid != 4)).unwrap(), 5);
        assert_eq!(recorded, [5]);
        let refuse = &mut |_| Err(StateError::NotFound(base.path().into()));
        assert!(leases.lease(CIDS, &own(), refuse, &mut |cid| Ok(cid != 4)).is_err());
        assert_eq!(leases.holder(6).unwrap(), None);
        let broken = &mut |_| Err(io::ErrorKind::PermissionDenied.into());
        let error = leases.lease(6..=6, &own(), &mut |_| Ok(()), broken).unwrap_err().to_string();
        assert_eq!(error, "claim vsock CID 6: permission denied");
    }

    #[test]
    fn a_lock_that_nobody_gives_back_is_an_error_and_not_a_wait_without_end() {
        let base = tempfile::tempdir().unwrap();
        let leases = Leases::under(base.path());
        let _held = leases.lock().unwrap();
        let error = lease(&leases, CIDS, &own()).unwrap_err().to_string();
        assert!(error.starts_with("lock ") && error.contains(".cids/lock: "), "{error}");
    }

    #[test]
    fn who_cleans_up_after_a_killed_shim_gives_back_what_it_had_leased() {
        use crate::state::{Owner, State, Step};
        let base = tempfile::tempdir().unwrap();
        let mut state = State::create(base.path(), "ns", "s1").unwrap();
        let (leases, holder) = (state.leases(), own());
        assert_eq!(leases, Leases::under(base.path()));
        let step = |cid| Step::Cid { cid, leases: leases.clone(), shim: holder.shim };
        let mut record = |cid| state.record(&Owner::Sandbox, [step(cid)]);
        assert_eq!(leases.lease(CIDS, &holder, &mut record, &mut |_| Ok(true)).unwrap(), 4);
        // Killed between writing it down and leasing it.
        state.record(&Owner::Sandbox, [step(5)]).unwrap();
        drop(state);
        State::load(base.path(), "ns", "s1").unwrap().undo_all(Duration::from_secs(1)).unwrap();
        assert_eq!(leases.holder(4).unwrap(), None);
        assert!(!base.path().join("ns").exists());
    }

    #[test]
    fn nothing_to_give_back_makes_nothing() {
        let base = tempfile::tempdir().unwrap();
        Leases::under(base.path()).release(4, own().shim).unwrap();
        assert!(!base.path().join(FOLDER).exists());
    }
}
