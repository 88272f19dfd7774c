//! Who waits. Each waiting shim has a directory in the pool, whose name begins with the VM's key and size, and offers
//! itself by a socket in it. Renaming the socket claims the shim: only one process can.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_protos::chain::Chain;
use nix::fcntl::Flock;

use crate::config::settings::PoolSettings;
use crate::host::lock;
use crate::host::process::{ProcessId, wait_dead};
use crate::state::{POOL, State, StateError, io_error};

/// The socket of a shim that waits.
pub(crate) const OFFERED: &str = "waiting.sock";
/// The socket of a shim that somebody has claimed.
pub(crate) const CLAIMED: &str = "claimed.sock";
/// How long a claimed shim may take to end its VM.
const END: Duration = Duration::from_secs(10);

/// A directory of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    base: PathBuf,
    id: String,
}

impl Member {
    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its directory.
    pub(crate) fn dir(&self) -> PathBuf {
        self.base.join(POOL).join(&self.id)
    }

    /// Which sandboxes its VM may serve.
    pub fn key(&self) -> &str {
        self.id.split('-').next().unwrap_or_default()
    }

    /// Its VM's memory, MiB.
    fn memory_mib(&self) -> u64 {
        self.id.split('-').nth(1).and_then(|part| part.parse().ok()).unwrap_or(0)
    }

    /// Whether its VM has booted and nobody has claimed it.
    pub fn is_offered(&self) -> bool {
        self.dir().join(OFFERED).exists()
    }

    /// Whether somebody has claimed it.
    pub fn is_claimed(&self) -> bool {
        self.dir().join(CLAIMED).exists()
    }

    /// Its state on disk.
    ///
    /// # Errors
    /// See [`State::load_waiting`].
    pub fn state(&self) -> Result<State, StateError> {
        State::load_waiting(&self.base, &self.id)
    }

    /// Claims it. False if it is not offered, for example because another process was faster.
    ///
    /// # Errors
    /// The socket cannot be renamed.
    pub(crate) fn claim(&self) -> Result<bool, StateError> {
        let dir = self.dir();
        match fs::rename(dir.join(OFFERED), dir.join(CLAIMED)) {
            Ok(()) => Ok(true),
            Err(error) if lock::is_gone(&error) => Ok(false),
            Err(source) => Err(io_error("claim", &dir)(source)),
        }
    }

    /// Its shim, if that runs.
    pub(crate) fn shim(&self) -> Result<Option<ProcessId>, StateError> {
        let state = match self.state() {
            Err(StateError::NotFound(_)) => return Ok(None),
            state => state?,
        };
        Ok(if state.shim_lives()? { state.shim() } else { None })
    }

    /// Ends it, whatever it does: its shim cleans up, or is killed, and everything that it leaves is undone.
    pub(crate) fn end(&self, patience: Duration) -> Result<(), StateError> {
        if let Some(shim) = self.shim()? {
            let io = |source| io_error("end the shim of", &self.dir())(source);
            let ended = match shim.send_terminate().map_err(io)? {
                Some(handle) => {
                    wait_dead(&handle, patience).map_err(|source| io_error("wait for", &self.dir())(source))?
                }
                None => true,
            };
            if !ended {
                shim.kill(END).map_err(|source| io_error("kill the shim of", &self.dir())(source))?;
            }
        }
        match self.state() {
            Ok(state) => state.undo_all(END),
            Err(StateError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The directories of the pool, with those of VMs that serve a sandbox by now.
fn directories(base: &Path) -> Result<Vec<Member>, StateError> {
    let pool = base.join(POOL);
    let listing = match fs::read_dir(&pool) {
        Ok(listing) => listing.collect::<io::Result<Vec<_>>>().map_err(io_error("list", &pool))?,
        Err(error) if lock::is_gone(&error) => return Ok(Vec::new()),
        Err(source) => return Err(io_error("list", &pool)(source)),
    };
    let names = listing.into_iter().filter_map(|entry| entry.file_name().into_string().ok());
    let mut members: Vec<_> = names.map(|id| Member { base: base.to_owned(), id }).collect();
    members.sort_by(|one, other| one.id.cmp(&other.id));
    Ok(members)
}

/// The VMs of this key that can be claimed at the moment.
///
/// # Errors
/// The pool cannot be read.
pub(crate) fn offered(base: &Path, key: &str) -> Result<Vec<Member>, StateError> {
    let mut members = directories(base)?;
    members.retain(|member| member.key() == key && member.is_offered());
    Ok(members)
}

/// The VMs that wait or boot to wait, the oldest first, and their states. Undoes what dead shims of the pool have left.
///
/// # Errors
/// The pool cannot be read.
pub fn waiting(base: &Path) -> Result<Vec<(Member, State)>, StateError> {
    if !base.join(POOL).exists() {
        return Ok(Vec::new());
    }
    let _locked = Locked::take(base)?;
    waiting_locked(base)
}

fn waiting_locked(base: &Path) -> Result<Vec<(Member, State)>, StateError> {
    let mut waiting = Vec::new();
    for member in directories(base)? {
        let state = match member.state() {
            Ok(state) => state,
            Err(StateError::NotFound(_)) => continue,
            Err(error) => {
                tracing::warn!(member = member.id, error = %Chain(&error), "failed to read the state of a waiting VM");
                continue;
            }
        };
        match state.shim_lives()? {
            true if state.is_waiting() => waiting.push((member, state)),
            true => {}
            // containerd lets `delete` undo a sandbox that it knows.
            false if state.is_named() => {}
            false => {
                if let Err(error) = state.undo_all(END) {
                    tracing::warn!(member = member.id, error = %Chain(&error), "failed to undo what a waiting VM has left");
                }
            }
        }
    }
    waiting.sort_by_key(|(_, state)| state.created_ms());
    Ok(waiting)
}

/// Joins the pool as the shim of a VM with this key and memory, within the limits. If nobody waits with the key and the
/// pool is full of others, the oldest of these has to go: the pool follows what is asked for.
///
/// # Errors
/// The pool cannot be read or changed.
pub(crate) fn join(
    base: &Path,
    key: &str,
    memory_mib: u64,
    limits: &PoolSettings,
    random: u64,
) -> Result<Option<State>, StateError> {
    let _locked = Locked::take(base)?;
    let mut others: Vec<Member> = waiting_locked(base)?.into_iter().map(|(member, _)| member).collect();
    let is_known = others.iter().any(|member| member.key() == key);
    while !fits(others.iter().map(Member::memory_mib), memory_mib, limits) {
        if is_known || others.is_empty() {
            return Ok(None);
        }
        let oldest = others.remove(0);
        if oldest.claim()?
            && let Some(shim) = oldest.shim()?
        {
            shim.send_terminate().map_err(io_error("end the shim of", &oldest.dir()))?;
        }
    }
    Ok(Some(State::create_waiting(base, &format!("{key}-{memory_mib}-{random:016x}"))?))
}

/// Whether another VM of this memory may wait.
fn fits(others: impl Iterator<Item = u64> + Clone, memory_mib: u64, limits: &PoolSettings) -> bool {
    let memory = others.clone().fold(memory_mib, u64::saturating_add);
    others.count() < limits.size as usize && limits.max_memory_mib.is_none_or(|most| memory <= most)
}

/// Ends every waiting VM. Returns how many there were.
///
/// # Errors
/// One of them cannot be ended; the others are.
pub fn drain(base: &Path) -> Result<usize, StateError> {
    let waiting = waiting(base)?;
    let (mut ended, mut result) = (0, Ok(()));
    for (member, _) in &waiting {
        // One that boots has no socket yet, and one that is claimed belongs to somebody else.
        let drained = match member.claim() {
            Ok(false) if member.is_claimed() => continue,
            Ok(_) => member.end(END),
            Err(error) => Err(error),
        };
        ended += usize::from(drained.is_ok());
        result = result.and(drained);
    }
    result.map(|()| ended)
}

/// The pool's lock, until it is dropped.
struct Locked {
    pool: PathBuf,
    _lock: Flock<File>,
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Fails while there are members. Whoever waits for the lock notices.
        let _ = fs::remove_dir(&self.pool);
    }
}

impl Locked {
    /// Locks the pool, which is created if necessary.
    fn take(base: &Path) -> Result<Self, StateError> {
        let pool = base.join(POOL);
        let open = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&pool)?;
            match File::open(&pool) {
                // The last member has left in between.
                Err(error) if lock::is_gone(&error) => Ok(None),
                opened => opened.map(Some),
            }
        };
        let locked = lock::lock(&pool, lock::TIMEOUT, open).map_err(io_error("lock", &pool))?;
        Ok(Self { pool, _lock: locked })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(size: u32, max_memory_mib: Option<u64>) -> PoolSettings {
        PoolSettings { size, idle: Duration::from_secs(1), max_memory_mib }
    }

    #[test]
    fn the_pool_has_as_many_vms_and_as_much_memory_as_it_may() {
        for (others, size, most, expected) in [
            (&[][..], 0, None, false),
            (&[], 1, None, true),
            (&[512], 1, None, false),
            (&[512], 2, Some(1024), true),
            (&[512], 2, Some(1023), false),
            (&[u64::MAX], 2, Some(u64::MAX - 1), false),
        ] {
            assert_eq!(fits(others.iter().copied(), 512, &limits(size, most)), expected, "{others:?} {size} {most:?}");
        }
    }

    #[test]
    fn a_vm_is_claimed_once_and_a_full_pool_makes_room_for_a_key_that_nobody_waits_with() {
        let folder = tempfile::tempdir().unwrap();
        let (base, limits) = (folder.path(), limits(1, None));
        let first = join(base, "a", 512, &limits, 1).unwrap().unwrap();
        assert!(join(base, "a", 512, &limits, 2).unwrap().is_none());
        let member = waiting(base).unwrap().remove(0).0;
        assert_eq!((member.key(), member.memory_mib(), member.is_offered()), ("a", 512, false));
        assert!(!member.claim().unwrap());
        fs::write(first.dir().join(OFFERED), "").unwrap();
        assert_eq!(offered(base, "a").unwrap(), std::slice::from_ref(&member));
        assert_eq!(offered(base, "b").unwrap(), []);
        let claims = std::thread::scope(|scope| {
            let claims: Vec<_> = (0..8).map(|_| scope.spawn(|| member.claim().unwrap())).collect();
            claims.into_iter().map(|claim| usize::from(claim.join().unwrap())).sum::<usize>()
        });
        assert_eq!(claims, 1);
        // Not offered any more, so this test's process, the shim of both, is not ended.
        assert!(join(base, "b", 64, &limits, 3).unwrap().is_some());
    }
}
