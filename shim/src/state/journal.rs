//! The sandbox's state as its asynchronous parts share it: one writer at a time, and what may block does so on a thread made for it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::json;

use super::error::StateError;
use super::store::{Owner, State};
use super::undo::Step;
use crate::host::hooks;
use crate::state::life::{Life, VmState};
use crate::state::recent::{Kind, Recent};

/// How long undoing may take: most of it is waiting for killed processes to be gone.
const UNDO: Duration = Duration::from_secs(4);
/// How long the hooks at a container's end may take: all of them, while containerd waits for the answer to its Delete.
const HOOKS: Duration = Duration::from_secs(60);

/// A handle on the state of one sandbox. Clones share it.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
    /// None once everything has been undone.
    state: Arc<Mutex<Option<State>>>,
    recent: Recent,
}

impl Journal {
    /// Shares `state`.
    pub fn new(state: State) -> Self {
        Self { dir: state.dir().to_owned(), state: Arc::new(Mutex::new(Some(state))), recent: Recent::default() }
    }

    /// What has happened lately; the VM's states are noted there by themselves.
    pub fn recent(&self) -> &Recent {
        &self.recent
    }

    /// The sandbox's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Does something with the state: recording a step, noting a container. Nothing that waits.
    ///
    /// # Errors
    ///
    /// Those of `work`; [`StateError::NotFound`] when everything has been undone already.
    pub fn with<T>(&self, work: impl FnOnce(&mut State) -> Result<T, StateError>) -> Result<T, StateError> {
        match self.lock().as_mut() {
            Some(state) => work(state),
            None => Err(StateError::NotFound(self.dir.clone())),
        }
    }

    /// Writes steps down before their effects are made.
    pub fn record(&self, owner: &Owner, steps: impl IntoIterator<Item = Step>) -> Result<(), StateError> {
        self.with(|state| state.record(owner, steps))
    }

    /// The VM is in another state now: logged, and written at once.
    ///
    /// # Errors
    ///
    /// When that state cannot follow the one before, or cannot be written.
    pub fn vm_enters(&self, to: VmState, cause: &str) -> Result<(), StateError> {
        self.with(|state| {
            self.enter(state, to, cause)?;
            state.save()
        })
    }

    /// The same, but written with what is written next: for a state that something is recorded in at once.
    ///
    /// # Errors
    ///
    /// When that state cannot follow the one before.
    pub fn vm_passes(&self, to: VmState, cause: &str) -> Result<(), StateError> {
        self.with(|state| self.enter(state, to, cause))
    }

    /// The VM is dead. That is a failure unless its end was asked for, or is known already.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn vm_died(&self, cause: &str) -> Result<(), StateError> {
        match self.lock().as_mut() {
            Some(state) if state.vm().is_some_and(|vm| vm.state() == VmState::Running) => {
                self.enter(state, VmState::Failed, cause)?;
                state.save()
            }
            _ => Ok(()),
        }
    }

    /// What the VM is, as long as not everything has been undone.
    pub fn vm(&self) -> Option<VmState> {
        self.lock().as_ref().and_then(|state| state.vm()).map(Life::state)
    }

    /// Undoes what `owner` made.
    pub async fn undo(&self, owner: Owner) -> Result<(), StateError> {
        self.blocking(move |state| match state.as_mut() {
            Some(state) => state.undo(&owner, UNDO),
            None => Ok(()),
        })
        .await
    }

    /// Runs a container's `poststop` hooks, if it has any that have not been run. Not as undoing does it, which keeps others from the state.
    ///
    /// # Errors
    ///
    /// When the state cannot be written.
    pub async fn run_poststop_hooks(&self, id: &str) -> Result<(), StateError> {
        let Some((container, hooks)) = self.lock().as_ref().and_then(|state| state.poststop_hooks(id)) else {
            return Ok(());
        };
        let ran = tokio::task::spawn_blocking(move || hooks::run_to_the_end(&hooks, &container, HOOKS)).await;
        if let Err(error) = ran {
            tracing::error!(container = id, %error, "the thread of the poststop hooks ended");
        }
        match self.lock().as_mut() {
            Some(state) => state.poststop_hooks_ran(id),
            None => Ok(()),
        }
    }

    /// Undoes everything, and removes the sandbox's folder. Without effect the second time.
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
        let from = state.vm_enters(to, cause)?;
        tracing::info!(%from, %to, cause, "the VM's state");
        self.recent.note(Kind::Vm, "the VM's state", json!({"from": from, "to": to, "cause": cause}));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        lock(&self.state)
    }
}

fn lock(state: &Mutex<Option<State>>) -> MutexGuard<'_, Option<State>> {
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::VmState::*;
    use super::*;

    #[test]
    fn a_death_is_a_failure_only_of_a_vm_that_runs() {
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
                journal.vm_enters(state, "a test").unwrap();
            }
            journal.vm_died("QEMU was killed").unwrap();
            assert_eq!(journal.vm(), Some(after));
            let written = State::load(base.path(), "ns", "s1").unwrap();
            assert_eq!(written.vm().unwrap().state(), after);
            let illegal = journal.vm_enters(Pending, "a test").unwrap_err().to_string();
            assert_eq!(illegal, format!("a VM that is {after} cannot become Pending"));
        }
    }

    #[tokio::test]
    async fn a_death_after_everything_was_undone_is_nothing_to_note() {
        let base = tempfile::tempdir().unwrap();
        let journal = Journal::new(State::create(base.path(), "ns", "s1").unwrap());
        journal.undo_all().await.unwrap();
        journal.vm_died("QEMU was killed").unwrap();
        assert_eq!(journal.vm(), None);
    }
}
