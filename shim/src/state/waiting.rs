//! The state of a VM that waits in the pool, and how it becomes a sandbox's.
//!
//! The directory of a waiting VM is `<state>/.pool/<id>/`, and it stays there: QEMU's share, the logs and the sockets are
//! in it. When the VM gets a sandbox, `state.json` names that sandbox, and `<state>/<namespace>/<sandbox>` becomes a
//! symbolic link to the directory. A shim that is killed between the two leaves a directory in the pool, which the next
//! process that looks at the pool undoes.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use super::error::{StateError, check_identifier, io_error};
use super::life;
use super::places::{POOL, remove_empty, sandbox_dir};
use super::store::State;

/// How often `adopt` retries when another shim removes the empty namespace directory at the same time.
const ATTEMPTS: u32 = 16;

impl State {
    /// Creates the directory of a VM that waits, with the calling process as its shim.
    ///
    /// # Errors
    /// See [`State::create`].
    pub(crate) fn create_waiting(base: &Path, id: &str) -> Result<Self, StateError> {
        check_identifier("id", id)?;
        Self::create_in(base.join(POOL).join(id), POOL, id)
    }

    /// Reads the state of a directory in the pool. It may belong to a sandbox by now.
    ///
    /// # Errors
    /// See [`State::load`].
    pub fn load_waiting(base: &Path, id: &str) -> Result<Self, StateError> {
        check_identifier("id", id)?;
        let dir = base.join(POOL).join(id);
        if dir.is_dir() { Self::load_in(dir, POOL, id) } else { Err(StateError::NotFound(dir)) }
    }

    /// Whether the VM has no sandbox yet.
    pub fn is_waiting(&self) -> bool {
        self.namespace() == POOL
    }

    /// Whether the sandbox's name leads to this directory.
    pub(crate) fn is_named(&self) -> bool {
        self.link().is_some_and(|link| self.is_ours(&link))
    }

    /// Makes this the state of a sandbox.
    ///
    /// # Errors
    /// [`StateError::Exists`] if there is one with this name; the file or the link cannot be written.
    pub(crate) fn adopt(&mut self, namespace: &str, sandbox: &str) -> Result<(), StateError> {
        let base = self.dir.ancestors().nth(2).unwrap_or(Path::new("/")).to_owned();
        let link = sandbox_dir(&base, namespace, sandbox)?;
        if fs::symlink_metadata(&link).is_ok() {
            return Err(StateError::Exists(link));
        }
        // First: the link must not lead to the state of another.
        namespace.clone_into(&mut self.contents.namespace);
        sandbox.clone_into(&mut self.contents.sandbox);
        self.contents.created_ms = Some(life::now_ms());
        self.save()?;
        let parent = base.join(namespace);
        let target = Path::new("..").join(POOL).join(self.dir.file_name().unwrap_or_default());
        for _ in 0..ATTEMPTS {
            DirBuilder::new().recursive(true).mode(0o700).create(&parent).map_err(io_error("create", &parent))?;
            match symlink(&target, &link) {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(StateError::Exists(link)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io_error("create", &link)(e)),
            }
        }
        Err(io_error("create", &link)(io::ErrorKind::NotFound.into()))
    }

    /// Removes the sandbox's link to this directory, if there is one, and its namespace's directory if that is empty.
    pub(super) fn remove_link(&self) -> Result<(), StateError> {
        let Some(link) = self.link() else { return Ok(()) };
        if self.is_ours(&link) {
            fs::remove_file(&link).map_err(io_error("remove", &link))?;
        }
        link.parent().map_or(Ok(()), remove_empty)
    }

    /// Where the link is that leads here, if this is a sandbox's directory in the pool.
    fn link(&self) -> Option<PathBuf> {
        let pool = self.dir.parent().filter(|pool| pool.ends_with(POOL))?;
        (!self.is_waiting()).then(|| pool.with_file_name(self.namespace()).join(self.sandbox()))
    }

    fn is_ours(&self, link: &Path) -> bool {
        fs::read_link(link).is_ok_and(|target| target.file_name() == self.dir.file_name())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::state::{Owner, Step};

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_waiting_vm_becomes_a_sandbox_that_is_found_and_undone_under_its_name() {
        let base = tempfile::tempdir().unwrap();
        let mut state = State::create_waiting(base.path(), "k-1").unwrap();
        let file = state.dir().join("file");
        state.record(&Owner::Sandbox, [Step::File { path: file.clone() }]).unwrap();
        fs::write(&file, "x").unwrap();
        assert!(State::load(base.path(), POOL, "k-1").is_err());
        state.adopt("ns", "s1").unwrap();
        let found = State::load(base.path(), "ns", "s1").unwrap();
        assert_eq!((found.namespace(), found.sandbox(), found.dir()), ("ns", "s1", state.dir()));
        assert!(base.path().join("ns/s1/file").exists() && found.is_named() && !found.is_waiting());
        assert!(matches!(State::create(base.path(), "ns", "s1"), Err(StateError::Exists(_))));
        let mut other = State::create_waiting(base.path(), "k-2").unwrap();
        assert!(matches!(other.adopt("ns", "s1"), Err(StateError::Exists(_))));
        other.undo_all(SECOND).unwrap();
        found.undo_all(SECOND).unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_shim_that_is_killed_while_it_takes_a_name_leaves_a_directory_that_the_pool_finds() {
        let base = tempfile::tempdir().unwrap();
        let mut state = State::create_waiting(base.path(), "k-1").unwrap();
        state.adopt("ns", "s1").unwrap();
        fs::remove_file(base.path().join("ns/s1")).unwrap();
        let found = State::load_waiting(base.path(), "k-1").unwrap();
        assert!(!found.is_waiting() && !found.is_named());
        // Another sandbox has the name by now.
        let successor = State::create(base.path(), "ns", "s1").unwrap();
        found.undo_all(SECOND).unwrap();
        assert!(successor.dir().is_dir());
        successor.undo_all(SECOND).unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }
}
