//! A shared handle on the sandbox's state for asynchronous code: one writer at a time, and blocking work on its own
//! thread.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use serde_json::json;

use super::error::StateError;
use super::facts::MachineRecord;
use super::life::{Life, VmState};
use super::recent::{EventKind, Recent};
use super::store::{Owner, State};
use super::undo::Step;
use crate::host::hooks;

/// Time limit for undoing steps: most of it is waiting until killed processes are dead.
const UNDO: Duration = Duration::from_secs(4);
/// Time limit for all `poststop` hooks of a container: containerd waits for the response to Delete meanwhile.
const HOOKS: Duration = Duration::from_secs(60);

/// A handle on the state of one sandbox. Clones share the state.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
    /// `None` after everything has been undone.
    state: Arc<Mutex<Option<State>>>,
    /// Held while steps are undone: one call at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
    recent: Recent,
}

impl Journal {
    /// Shares `state`.
    pub fn new(state: State) -> Self {
        let dir = state.dir().to_owned();
        Self { dir, state: Arc::new(Mutex::new(Some(state))), turn: Arc::default(), recent: Recent::default() }
    }

    /// The sandbox's latest events, which include all transitions of its VM.
    pub(crate) fn recent(&self) -> &Recent {
        &self.recent
    }

    /// The sandbox's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Calls `work` with the state. `work` must not block.
    ///
    /// # Errors
    /// Errors of `work`; [`StateError::NotFound`] after everything has been undone.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut State) -> Result<T, StateError>) -> Result<T, StateError> {
        match self.lock().as_mut() {
            Some(state) => work(state),
            None => Err(StateError::NotFound(self.dir.clone())),
        }
    }

    /// Records undo steps. Call it before their effects happen.
    pub(crate) fn record(&self, owner: &Owner, steps: impl IntoIterator<Item = Step>) -> Result<(), StateError> {
        self.with(|state| state.record(owner, steps))
    }

    /// Changes the VM's state, logs the transition and writes it to disk.
    ///
    /// # Errors
    /// The transition is not allowed, or the file cannot be written.
    pub(crate) fn set_vm_state(&self, to: VmState, cause: &str) -> Result<(), StateError> {
        self.with(|state| {
            self.enter(state, to, cause)?;
            state.save()
        })
    }

    /// Changes the VM's state and logs the transition, but leaves the write to the next change: for states in which
    /// another change follows at once.
    ///
    /// # Errors
    /// The transition is not allowed.
    pub(crate) fn set_vm_state_unsaved(&self, to: VmState, cause: &str) -> Result<(), StateError> {
        self.with(|state| self.enter(state, to, cause))
    }

    /// Changes what is recorded of the VM's machine, if there is one, and writes it to disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn change_machine(&self, change: impl FnOnce(&mut MachineRecord)) -> Result<(), StateError> {
        self.with(|state| {
            let Some(mut machine) = state.machine().cloned() else { return Ok(()) };
            change(&mut machine);
            state.set_machine(machine);
            state.save()
        })
    }

    /// Records that the VM is dead. The death of a VM that is not running, because it was stopped or has failed
    /// already, changes nothing.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn record_vm_death(&self, cause: &str) -> Result<(), StateError> {
        match self.lock().as_mut() {
            Some(state) if state.vm().is_some_and(|vm| vm.state() == VmState::Running) => {
                self.enter(state, VmState::Failed, cause)?;
                state.save()
            }
            _ => Ok(()),
        }
    }

    /// The VM's state; `None` after everything has been undone.
    pub(crate) fn vm(&self) -> Option<VmState> {
        self.lock().as_ref().and_then(|state| state.vm()).map(Life::state)
    }

    /// Undoes the steps of `owner`, last step first, and removes a container's facts. The state stays accessible
    /// meanwhile: an unmount can take as long as the host needs to write a disk's caches.
    ///
    /// # Errors
    /// [`StateError::Undo`] with every failure; the file cannot be written.
    pub(crate) async fn undo(&self, owner: Owner) -> Result<(), StateError> {
        let _turn = self.turn.lock().await;
        let Some(undoing) = self.lock().as_ref().map(|state| state.undoing(owner)) else { return Ok(()) };
        let undone = self.blocking(move || undoing.run(UNDO)).await?;
        match self.lock().as_mut() {
            Some(state) => state.undone(undone),
            None => Ok(()),
        }
    }

    /// Runs those `poststop` hooks of a container that have not run yet.
    ///
    /// # Errors
    /// The state cannot be written.
    pub(crate) async fn run_poststop_hooks(&self, id: &str) -> Result<(), StateError> {
        let Some((container, hooks)) = self.lock().as_ref().and_then(|state| state.poststop_hooks(id)) else {
            return Ok(());
        };
        let ran = tokio::task::spawn_blocking(move || hooks::run_to_the_end(&hooks, &container, HOOKS)).await;
        if let Err(error) = ran {
            tracing::error!(container = id, error = %Chain(&error), "the thread of the poststop hooks ended early");
        }
        match self.lock().as_mut() {
            Some(state) => state.remove_poststop_hooks(id),
            None => Ok(()),
        }
    }

    /// Undoes everything and removes the sandbox's directory. Meanwhile, the state is as if it were removed. A second
    /// call only waits for the first.
    ///
    /// # Errors
    /// [`StateError::Undo`] with every failure; the directory cannot be removed.
    pub async fn undo_all(&self) -> Result<(), StateError> {
        let _turn = self.turn.lock().await;
        let Some(state) = self.lock().take() else { return Ok(()) };
        self.blocking(move || state.undo_all(UNDO)).await?
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, StateError> {
        let failed = |error| StateError::Io {
            what: "undo steps of",
            path: self.dir.clone(),
            source: std::io::Error::other(error),
        };
        tokio::task::spawn_blocking(work).await.map_err(failed)
    }

    fn enter(&self, state: &mut State, to: VmState, cause: &str) -> Result<(), StateError> {
        let from = state.set_vm_state(to, cause)?;
        tracing::info!(%from, %to, cause, "the VM's state");
        self.recent.note(EventKind::Vm, "the VM's state", json!({"from": from, "to": to, "cause": cause}));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        lock(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::io::Write;

    use super::VmState::*;
    use super::*;
    use crate::host::hooks::{Hook, Subject};

    #[test]
    fn only_the_death_of_a_running_vm_is_a_failure() {
        let up = [Provisioning, Configured, Starting, Running];
        let table = [
            (up[..3].to_vec(), Starting),
            (up.to_vec(), Failed),
            ([&up[..], &[Stopping]].concat(), Stopping),
            ([&up[..], &[Stopping, Stopped]].concat(), Stopped),
            ([&up[..], &[Failed]].concat(), Failed),
        ];
        for (states, after) in table {
            let base = tempfile::tempdir().unwrap();
            let journal = Journal::new(State::create(base.path(), "ns", "s1").unwrap());
            for state in states {
                journal.set_vm_state(state, "a test").unwrap();
            }
            journal.record_vm_death("QEMU was killed").unwrap();
            assert_eq!(journal.vm(), Some(after));
            let written = State::load(base.path(), "ns", "s1").unwrap();
            assert_eq!(written.vm().unwrap().state(), after);
            let invalid = journal.set_vm_state(Pending, "a test").unwrap_err().to_string();
            assert_eq!(invalid, format!("a VM that is {after} cannot become Pending"));
        }
    }

    /// A hook stands for any step that takes long. Without the mend, `record` returns after the hook was killed.
    #[tokio::test]
    async fn the_state_stays_accessible_while_steps_are_undone() {
        let base = tempfile::tempdir().unwrap();
        let journal = Journal::new(State::create(base.path(), "ns", "s1").unwrap());
        let (fifo, later) = (base.path().join("fifo"), journal.dir().join("later"));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let container =
            Subject { id: "c".into(), bundle: base.path().into(), annotations: BTreeMap::default(), pid: 0 };
        let hook = Hook {
            field: "hooks.poststop[0]".into(),
            path: "/bin/cat".into(),
            args: vec!["cat".into(), fifo.display().to_string()],
            env: Vec::new(),
            timeout: None,
        };
        let owner = Owner::Container("c".into());
        journal.record(&owner, [Step::Hooks { container, poststop: vec![hook] }]).unwrap();
        let undoing = tokio::spawn({
            let (journal, owner) = (journal.clone(), owner.clone());
            async move { journal.undo(owner).await }
        });
        let opened = tokio::task::spawn_blocking(move || File::options().write(true).open(fifo));
        let mut hook_reads = opened.await.unwrap().unwrap();
        journal.record(&owner, [Step::File { path: later.clone() }]).unwrap();
        std::fs::write(&later, "").unwrap();
        // Fails with EPIPE if the hook is dead.
        hook_reads.write_all(b"read").unwrap();
        drop(hook_reads);
        undoing.await.unwrap().unwrap();
        assert!(later.exists());
        let steps = journal.with(|state| Ok(state.steps(&owner).cloned().collect::<Vec<_>>())).unwrap();
        assert_eq!(steps, [Step::File { path: later.clone() }]);
        journal.undo(owner).await.unwrap();
        assert!(!later.exists());
    }

    #[tokio::test]
    async fn a_death_after_everything_was_undone_is_ignored() {
        let base = tempfile::tempdir().unwrap();
        let journal = Journal::new(State::create(base.path(), "ns", "s1").unwrap());
        journal.undo_all().await.unwrap();
        journal.record_vm_death("QEMU was killed").unwrap();
        assert_eq!(journal.vm(), None);
    }
}
