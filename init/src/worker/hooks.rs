//! The spec's startContainer hooks: programs of the container, run in its own process before that becomes its program (config.md of the
//! runtime spec, "POSIX-platform Hooks").
//!
//! libcontainer would run them as well, but tells them that the container is being created, and no pid; and when one fails, the process ends
//! without a word to the caller of Start. So they are taken out of what libcontainer sees, and the process runs them itself. What fails it
//! says on a fifo in the bundle, whose end tells that it has become its program, or is gone.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::rc::Rc;

use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use libcontainer::utils::parse_env;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{getpid, mkfifo};
use oci_spec::runtime::{Hook, Spec};

use crate::error::chain;
use crate::places::START_OUTCOME;

/// Most bytes of what a process says: room for a path of PATH_MAX, and less than the least that a pipe holds.
const OUTCOME_MAX: u64 = 8192;

/// The hooks of one container, with the fifo that its process holds.
#[derive(Debug, Clone)]
pub struct StartHooks {
    hooks: Vec<Hook>,
    state: State,
    outcome: Rc<File>,
}

impl StartHooks {
    /// Takes the hooks out of a spec, if it has any, and makes the fifo.
    ///
    /// # Errors
    /// `AlreadyExists` when that was done with this bundle before: its spec has lost them since.
    pub fn take(spec: &mut Spec, id: &str, bundle: &Path) -> io::Result<Option<Self>> {
        let taken = spec.hooks_mut().as_mut().and_then(|hooks| {
            let taken = hooks.start_container().clone();
            hooks.set_start_container(None);
            taken
        });
        let Some(hooks) = taken.filter(|hooks| !hooks.is_empty()) else { return Ok(None) };
        let mut state = State::new(id, ContainerStatus::Created, None, bundle.to_owned());
        state.annotations = spec.annotations().clone();
        let path = bundle.join(START_OUTCOME);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        // For both: to write alone would wait for who reads.
        let outcome = OpenOptions::new().read(true).write(true).open(&path)?;
        Ok(Some(Self { hooks, state, outcome: Rc::new(outcome) }))
    }

    /// Runs them one after the other, as a process that has `environment`.
    ///
    /// # Errors
    /// The first that fails; it has been said on the fifo.
    pub fn run(&self, environment: &[CString]) -> Result<(), String> {
        let environment: Vec<String> = environment.iter().map(|one| one.to_string_lossy().into_owned()).collect();
        let environment = parse_env(&environment);
        // As the container sees it, which is where they run.
        let state = State { pid: Some(getpid().as_raw()), ..self.state.clone() };
        for (index, hook) in self.hooks.iter().enumerate() {
            run_hooks(Some(&vec![hook.clone()]), Some(&state), None, None, Some(&environment)).map_err(|e| {
                self.failed(format!("hooks.startContainer[{index}] {}: {}", hook.path().display(), chain(&e)))
            })?;
        }
        Ok(())
    }

    /// Says why the process will not become its program.
    pub fn failed(&self, why: String) -> String {
        let most = why.len().min(OUTCOME_MAX as usize);
        if let Err(error) = (&*self.outcome).write_all(&why.as_bytes()[..most]) {
            tracing::error!(%error, "tell of a start that failed");
        }
        why
    }
}

/// The reader's end of a container's fifo.
#[derive(Debug)]
pub struct Outcome(File);

impl Outcome {
    /// Of the container with this bundle, if it has hooks. Before its start, or its words could be gone with it.
    ///
    /// # Errors
    /// What open(2) said.
    pub fn of(bundle: &Path) -> io::Result<Option<Self>> {
        // Not to wait for a process that has ended already.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(bundle.join(START_OUTCOME));
        match opened {
            Ok(fifo) => Ok(Some(Self(fifo))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until the process has become its program, or is gone; as long as this worker may live. Answers what it said, if it failed.
    ///
    /// # Errors
    /// What read(2) said.
    pub fn wait(self) -> io::Result<Option<String>> {
        fcntl(&self.0, FcntlArg::F_SETFL(OFlag::empty()))?;
        let mut said = Vec::new();
        self.0.take(OUTCOME_MAX).read_to_end(&mut said)?;
        Ok((!said.is_empty()).then(|| String::from_utf8_lossy(&said).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hooked(bundle: &Path, scripts: &[&str]) -> StartHooks {
        let hooks: Vec<_> =
            scripts.iter().map(|script| json!({"path": "/bin/sh", "args": ["sh", "-c", script]})).collect();
        let spec = json!({"ociVersion": "1.0.2", "hooks": {"startContainer": hooks}, "annotations": {"a": "b"}});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let taken = StartHooks::take(&mut spec, "c", bundle).unwrap().unwrap();
        assert_eq!(*spec.hooks().as_ref().unwrap().start_container(), None);
        taken
    }

    #[test]
    fn hooks_run_in_order_with_the_state_and_the_environment() {
        let bundle = tempfile::tempdir().unwrap();
        let told = bundle.path().join("told");
        let first = format!("cat > {}; echo $COLOUR >> {0}", told.display());
        let second = format!("echo second >> {}", told.display());
        let hooks = hooked(bundle.path(), &[&first, &second]);
        let outcome = Outcome::of(bundle.path()).unwrap().unwrap();
        hooks.run(&[c"COLOUR=green".into(), c"PATH=/bin:/usr/bin".into()]).unwrap();
        drop(hooks);
        assert_eq!(outcome.wait().unwrap(), None);
        let told = std::fs::read_to_string(told).unwrap();
        let (state, rest) = told.split_once("green\n").unwrap();
        assert_eq!(rest, "second\n");
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(
            (&state["status"], &state["id"], &state["annotations"]["a"]),
            (&json!("created"), &json!("c"), &json!("b"))
        );
        assert_eq!(state["pid"], json!(std::process::id()));
    }

    #[test]
    fn a_hook_that_fails_is_named_and_those_after_it_do_not_run() {
        let bundle = tempfile::tempdir().unwrap();
        let hooks = hooked(bundle.path(), &["true", "exit 3", &format!("touch {}/ran", bundle.path().display())]);
        let outcome = Outcome::of(bundle.path()).unwrap().unwrap();
        let why = hooks.run(&[c"PATH=/bin:/usr/bin".into()]).unwrap_err();
        assert_eq!(why, "hooks.startContainer[1] /bin/sh: hook command exited with non-zero exit code: 3");
        drop(hooks);
        assert_eq!(outcome.wait().unwrap(), Some(why));
        assert!(!bundle.path().join("ran").exists());
    }

    #[test]
    fn a_bundle_is_used_once_and_one_without_hooks_has_no_outcome() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(Outcome::of(bundle.path()).unwrap().is_none());
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2"})).unwrap();
        assert!(StartHooks::take(&mut spec, "c", bundle.path()).unwrap().is_none());
        drop(hooked(bundle.path(), &["true"]));
        let hooks = json!({"startContainer": [{"path": "/bin/true"}]});
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "hooks": hooks})).unwrap();
        let again = StartHooks::take(&mut spec, "c", bundle.path()).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }
}
