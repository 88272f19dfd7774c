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
    recent: Recent,
}

impl Journal {
    /// Shares `state`.
    pub fn new(state: State) -> Self {
        Self { dir: state.dir().to_owned(), state: Arc::new(Mutex::new(Some(state))), recent: Recent::default() }
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

    /// Undoes the steps of `owner`.
    pub(crate) async fn undo(&self, owner: Owner) -> Result<(), StateError> {
        self.blocking(move |state| match state.as_mut() {
            Some(state) => state.undo(&owner, UNDO),
            None => Ok(()),
        })
        .await
    }

    /// Runs those `poststop` hooks of a container that have not run yet. Unlike [`undo`](Self::undo), it does not hold
    /// the lock on the state meanwhile.
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

    /// Undoes everything and removes the sandbox's directory. A second call has no effect.
    pub async fn undo_all(&self) -> Result<(), StateError> {
        self.blocking(|state| match state.take() {
            Some(state) => state.undo_all(UNDO),
            None => Ok(()),
        })
        .await
    }

    async fn blocking(
        &self,
        work: impl FnOnce(&mut Option<State>) -> Result<(), StateError> + Send + 'static,
    ) -> Result<(), StateError> {
        let state = self.state.clone();
        let done = tokio::task::spawn_blocking(move || work(&mut lock(&state))).await;
        done.unwrap_or_else(|error| {
            Err(StateError::Io { what: "undo steps of", path: self.dir.clone(), source: std::io::Error::other(error) })
        })
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
    use super::VmState::*;
    use super::*;

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

    #[tokio::test]
    async fn a_death_after_everything_was_undone_is_ignored() {
        let base = tempfile::tempdir().unwrap();
        let journal = Journal::new(State::create(base.path(), "ns", "s1").unwrap());
        journal.undo_all().await.unwrap();
        journal.record_vm_death("QEMU was killed").unwrap();
        assert_eq!(journal.vm(), None);
    }
}
