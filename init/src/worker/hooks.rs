//! The spec's startContainer hooks: programs of the container that run in its process before that executes its own
//! program (config.md of the runtime spec, "POSIX-platform Hooks").
//!
//! libcontainer could run them, but passes the status "creating" and no PID, and if one fails, the process exits
//! without an error for the caller of Start. So the worker removes them from the spec that libcontainer sees, and the
//! process runs them itself. If one fails, the process writes the reason to a FIFO in the bundle. The FIFO's end of
//! file means that the process has executed its program or exited.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::rc::Rc;

use husk_protos::chain::Chain;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use libcontainer::utils::parse_env;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{getpid, mkfifo};
use oci_spec::runtime::{Hook, Spec};

use crate::paths::START_OUTCOME;

/// Maximum length of a reason in bytes: it has room for a path of PATH_MAX, and fits into the smallest pipe buffer.
const REASON_MAX: u64 = 8192;

/// The hooks of a container, and the process's end of the FIFO.
#[derive(Debug, Clone)]
pub(super) struct StartHooks {
    hooks: Vec<Hook>,
    state: State,
    outcome: Rc<File>,
}

impl StartHooks {
    /// Moves the hooks out of a spec and creates the FIFO. Returns `None` if the spec has no hooks. Fails with
    /// `AlreadyExists` if the bundle was used before: its spec has lost its hooks since.
    pub(super) fn take(spec: &mut Spec, id: &str, bundle: &Path) -> io::Result<Option<Self>> {
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
        // Opened for both directions, because opening it only for writing would wait for a reader.
        let outcome = OpenOptions::new().read(true).write(true).open(&path)?;
        Ok(Some(Self { hooks, state, outcome: Rc::new(outcome) }))
    }

    /// Runs the hooks in order, in a process that has `environment`. Stops at the first failure and writes its reason
    /// to the FIFO.
    pub(super) fn run(&self, environment: &[CString]) -> Result<(), String> {
        let environment: Vec<String> = environment.iter().map(|one| one.to_string_lossy().into_owned()).collect();
        let environment = parse_env(&environment);
        // The PID as the container sees it, because the hooks run inside.
        let state = State { pid: Some(getpid().as_raw()), ..self.state.clone() };
        for (index, hook) in self.hooks.iter().enumerate() {
            run_hooks(Some(&vec![hook.clone()]), Some(&state), None, None, Some(&environment)).map_err(|e| {
                self.report(format!("hooks.startContainer[{index}] {}: {}", hook.path().display(), Chain(&e)))
            })?;
        }
        Ok(())
    }

    /// Writes to the FIFO why the process will not execute its program.
    fn report(&self, reason: String) -> String {
        let length = reason.len().min(REASON_MAX as usize);
        if let Err(error) = (&*self.outcome).write_all(&reason.as_bytes()[..length]) {
            tracing::error!(%error, "failed to report a failed start");
        }
        reason
    }
}

/// The reader's end of a container's FIFO.
#[derive(Debug)]
pub(super) struct StartOutcome(File);

impl StartOutcome {
    /// Opens the FIFO of a bundle, if its container has hooks. Open it before the start: a reason that was written
    /// without a reader could be lost.
    pub(super) fn open(bundle: &Path) -> io::Result<Option<Self>> {
        // Non-blocking, because the process may have exited already.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(bundle.join(START_OUTCOME));
        match opened {
            Ok(fifo) => Ok(Some(Self(fifo))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until the process has executed its program or exited; the worker's timeout limits the wait. Returns the
    /// reason if a hook failed.
    pub(super) fn wait(self) -> io::Result<Option<String>> {
        fcntl(&self.0, FcntlArg::F_SETFL(OFlag::empty()))?;
        let mut reason = Vec::new();
        self.0.take(REASON_MAX).read_to_end(&mut reason)?;
        Ok((!reason.is_empty()).then(|| String::from_utf8_lossy(&reason).into_owned()))
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
        let output = bundle.path().join("output");
        let first = format!("cat > {}; echo $COLOUR >> {0}", output.display());
        let second = format!("echo second >> {}", output.display());
        let hooks = hooked(bundle.path(), &[&first, &second]);
        let outcome = StartOutcome::open(bundle.path()).unwrap().unwrap();
        hooks.run(&[c"COLOUR=green".into(), c"PATH=/bin:/usr/bin".into()]).unwrap();
        drop(hooks);
        assert_eq!(outcome.wait().unwrap(), None);
        let output = std::fs::read_to_string(output).unwrap();
        let (state, rest) = output.split_once("green\n").unwrap();
        assert_eq!(rest, "second\n");
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(
            (&state["status"], &state["id"], &state["annotations"]["a"]),
            (&json!("created"), &json!("c"), &json!("b"))
        );
        assert_eq!(state["pid"], json!(std::process::id()));
    }

    #[test]
    fn a_failing_hook_is_named_and_later_hooks_do_not_run() {
        let bundle = tempfile::tempdir().unwrap();
        let hooks = hooked(bundle.path(), &["true", "exit 3", &format!("touch {}/ran", bundle.path().display())]);
        let outcome = StartOutcome::open(bundle.path()).unwrap().unwrap();
        let reason = hooks.run(&[c"PATH=/bin:/usr/bin".into()]).unwrap_err();
        assert_eq!(reason, "hooks.startContainer[1] /bin/sh: hook command exited with non-zero exit code: 3");
        drop(hooks);
        assert_eq!(outcome.wait().unwrap(), Some(reason));
        assert!(!bundle.path().join("ran").exists());
    }

    #[test]
    fn a_bundle_with_hooks_can_be_used_only_once() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(StartOutcome::open(bundle.path()).unwrap().is_none());
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2"})).unwrap();
        assert!(StartHooks::take(&mut spec, "c", bundle.path()).unwrap().is_none());
        drop(hooked(bundle.path(), &["true"]));
        let hooks = json!({"startContainer": [{"path": "/bin/true"}]});
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "hooks": hooks})).unwrap();
        let again = StartHooks::take(&mut spec, "c", bundle.path()).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }
}
