//! The last steps of a container's process, in the process itself: find the program and execute it.
//!
//! libcontainer's own executor checks a program's x bit only for "others", rejects a process without PATH, and does not
//! apply the container's seccomp filter to an exec. This executor asks the kernel whether the user may run the program,
//! and returns runc's error messages.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::seccomp::initialize_seccomp;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::fcntl::AtFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{AccessFlags, execve, faccessat};
use oci_spec::runtime::{LinuxSeccomp, Spec};

use super::console;
use super::hooks::StartHooks;
use super::identity::Identity;

/// A container's process that is about to run.
#[derive(Debug, Default, Clone)]
pub(super) struct Workload {
    /// The filter to apply: that of the container, for an exec.
    pub(super) seccomp: Option<LinuxSeccomp>,
    /// The process has CAP_SYS_ADMIN only to apply the filter, and drops it afterwards.
    pub(super) drop_admin: bool,
    failure: StartFailure,
    /// The process waits until PID 1 has set up its terminal; see [`super::console`].
    gated: bool,
    /// The user that libcontainer cannot set.
    identity: Option<Identity>,
    /// The hooks to run at the start, before the program.
    hooks: Option<StartHooks>,
    /// The names of the environment's variables in the order of the spec, from [`Executor::validate`] to
    /// [`Executor::setup_envs`].
    names: RefCell<Vec<String>>,
    /// The environment as completed by libcontainer, from [`Executor::setup_envs`] to [`Executor::exec`].
    environment: RefCell<Vec<CString>>,
}

impl Workload {
    pub(super) fn with_seccomp(seccomp: LinuxSeccomp, drop_admin: bool) -> Self {
        Self { seccomp: Some(seccomp), drop_admin, ..Self::default() }
    }

    /// Makes the process report to `failure` why it cannot run.
    pub(super) fn reporting(self, failure: &StartFailure) -> Self {
        Self { failure: failure.clone(), ..self }
    }

    pub(super) fn becoming(self, identity: Option<Identity>) -> Self {
        Self { identity, ..self }
    }

    pub(super) fn hooked(self, hooks: Option<StartHooks>) -> Self {
        Self { hooks, ..self }
    }

    pub(super) fn gated(self, gated: bool) -> Self {
        Self { gated, ..self }
    }

    fn find(&self, spec: &Spec) -> Result<PathBuf, String> {
        find(spec).inspect_err(|reason| self.failure.report(reason))
    }
}

/// Why a process could not run, in a memory file that the worker shares with the processes that it clones.
/// libcontainer's error contains the reason too, but in the middle of its own text.
#[derive(Debug, Default, Clone)]
pub(super) struct StartFailure(Option<Rc<File>>);

impl StartFailure {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Some(Rc::new(File::from(memfd_create(c"failure", MFdFlags::MFD_CLOEXEC)?)))))
    }

    fn report(&self, reason: &str) {
        if let Some(file) = &self.0 {
            // If this fails, the caller returns libcontainer's error.
            let _ = file.write_at(reason.as_bytes(), 0);
        }
    }

    /// The reason, if the process has reported one.
    pub(super) fn reason(&self) -> Option<String> {
        let mut reason = [0; REASON_MAX];
        let length = self.0.as_ref()?.read_at(&mut reason, 0).ok().filter(|length| *length > 0)?;
        Some(String::from_utf8_lossy(&reason[..length]).into_owned())
    }
}

/// Maximum length of a reason in bytes. It has room for a path of PATH_MAX.
const REASON_MAX: usize = 8192;

impl Executor for Workload {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let name = |entry: &String| entry.split('=').next().unwrap_or_default().to_owned();
        *self.names.borrow_mut() = environment(spec).iter().map(name).collect();
        let ready = match &self.identity {
            Some(identity) => identity.assume().inspect_err(|reason| self.failure.report(reason)),
            None => Ok(()),
        };
        // After the change of user, because the user's permissions decide whether the program can run.
        ready.and_then(|()| self.find(spec)).map(drop).map_err(ExecutorValidationError::ArgValidationError)
    }

    fn setup_envs(&self, mut environment: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        if let Some(identity) = &self.identity {
            identity.correct_home(&mut environment);
        }
        // libcontainer has set HOME if passwd(5) contains the user.
        if environment.get("HOME").is_none_or(String::is_empty) {
            environment.insert("HOME".into(), "/".into());
        }
        // Stored here rather than in this process's environment: set_var panics on names that execve(2) accepts.
        *self.environment.borrow_mut() = in_order(&self.names.borrow(), environment)
            .into_iter()
            .map(|(name, value)| CString::new(format!("{name}={value}")))
            .collect::<Result<_, _>>()
            .map_err(|_| ExecutorSetEnvsError::Other("process.env contains a NUL byte".into()))?;
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if let Some(hooks) = &self.hooks {
            hooks.run(&self.environment.borrow()).map_err(ExecutorError::Other)?;
        }
        let program = self.find(spec).map_err(ExecutorError::Other)?;
        let path =
            CString::new(program.into_os_string().into_encoded_bytes()).map_err(|_| ExecutorError::InvalidArg)?;
        let args: Vec<CString> = arguments(spec)
            .iter()
            .map(|arg| CString::new(arg.as_bytes()))
            .collect::<Result<_, _>>()
            .map_err(|_| ExecutorError::InvalidArg)?;
        if self.gated {
            console::pass_gate().map_err(|e| ExecutorError::Other(format!("wait for the terminal: {e}")))?;
        }
        // Rust's runtime ignores SIGPIPE. If the program inherited that, `yes | head` would not exit.
        // SAFETY: SIG_DFL installs no handler.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(|e| ExecutorError::Execution(e.into()))?;
        if let Some(seccomp) = &self.seccomp {
            initialize_seccomp(seccomp).map_err(|e| ExecutorError::Execution(e.into()))?;
        }
        if self.drop_admin {
            drop_admin().map_err(|e| ExecutorError::Execution(e.into()))?;
        }
        let Err(error) = execve(&path, &args, &self.environment.borrow());
        // The start has already succeeded for the client. Like runc, write the error to the process's stderr, where a
        // user sees it.
        let text = format!("exec {}: {}\n", path.to_string_lossy(), error.desc().to_lowercase());
        let _ = std::io::stderr().write_all(text.as_bytes());
        Err(ExecutorError::Execution(text.trim_end().to_owned().into()))
    }
}

fn drop_admin() -> Result<(), caps::errors::CapsError> {
    let admin = caps::Capability::CAP_SYS_ADMIN;
    caps::drop(None, caps::CapSet::Ambient, admin)?;
    caps::drop(None, caps::CapSet::Effective, admin)?;
    caps::drop(None, caps::CapSet::Permitted, admin)
}

fn arguments(spec: &Spec) -> &[String] {
    spec.process().as_ref().and_then(|process| process.args().as_deref()).unwrap_or_default()
}

fn environment(spec: &Spec) -> &[String] {
    spec.process().as_ref().and_then(|process| process.env().as_deref()).unwrap_or_default()
}

/// Sorts the variables in the order of `names`, where a repeated name counts once, at its first place. HOME comes last if
/// libcontainer has added it.
fn in_order(names: &[String], mut environment: HashMap<String, String>) -> Vec<(String, String)> {
    let mut ordered: Vec<_> = names.iter().filter_map(|name| environment.remove_entry(name)).collect();
    ordered.extend(environment);
    ordered
}

/// Finds the process's program like execvp(3) and runc, in the PATH of the process's environment.
fn find(spec: &Spec) -> Result<PathBuf, String> {
    let name = arguments(spec).first().filter(|name| !name.is_empty()).ok_or("process.args is empty")?;
    if name.contains('/') {
        return match runnable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(nix::errno::Errno::ENOENT) => Err(format!("exec: {name:?}: stat {name}: no such file or directory")),
            Err(error) => Err(format!("exec: {name:?}: {}", error.desc().to_lowercase())),
        };
    }
    let path = environment(spec).iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let mut denied = false;
    for directory in path.split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match runnable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(nix::errno::Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    Err(if denied {
        format!("exec: {name:?}: permission denied")
    } else {
        format!("exec: {name:?}: executable file not found in $PATH")
    })
}

fn runnable(path: &Path) -> nix::Result<()> {
    if fs::metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        return Err(nix::errno::Errno::EISDIR);
    }
    let runnable = |flags| faccessat(nix::fcntl::AT_FDCWD, path, AccessFlags::X_OK, flags);
    // Checks the effective IDs, which are those of the process's user by now. This takes faccessat2(2), which seccomp
    // profiles from before Linux 5.8 reject. The real IDs, which are the same, take faccessat(2).
    match runnable(AtFlags::AT_EACCESS) {
        Err(nix::errno::Errno::EPERM | nix::errno::Errno::ENOSYS) => runnable(AtFlags::empty()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use oci_spec::runtime::{ProcessBuilder, SpecBuilder};

    use super::*;

    fn spec(args: &[&str], env: &[String]) -> Spec {
        let args: Vec<String> = args.iter().map(|arg| arg.to_string()).collect();
        let process = ProcessBuilder::default().args(args).env(env.to_vec()).build().unwrap();
        SpecBuilder::default().process(process).build().unwrap()
    }

    #[test]
    fn the_environment_keeps_its_order() {
        let names = ["Z", "A", "GONE", "A", "B"].map(str::to_owned);
        let pairs = |all: &[(&str, &str)]| all.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect::<Vec<_>>();
        let given = pairs(&[("HOME", "/root"), ("A", "2"), ("B", ""), ("Z", "x=y")]);
        let expected = pairs(&[("Z", "x=y"), ("A", "2"), ("B", ""), ("HOME", "/root")]);
        assert_eq!(in_order(&names, given.into_iter().collect()), expected);
    }

    #[test]
    fn missing_programs_are_reported_in_runcs_words() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        let plain = directory.path().join("plain");
        fs::write(&program, "").unwrap();
        // Only the owner may run it, which a check for "others" gets wrong.
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(&plain, "").unwrap();
        fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
        let path = [format!("PATH=/nowhere:{}", directory.path().display())];
        let (program_text, plain_text) = (program.to_str().unwrap(), plain.to_str().unwrap());

        assert_eq!(find(&spec(&["program"], &path)), Ok(program.clone()));
        assert_eq!(find(&spec(&[program_text], &[])), Ok(program.clone()));
        let cases = [
            (vec!["absent"], "exec: \"absent\": executable file not found in $PATH".to_owned()),
            (vec!["/absent"], "exec: \"/absent\": stat /absent: no such file or directory".to_owned()),
            (vec!["plain"], "exec: \"plain\": permission denied".to_owned()),
            (vec![plain_text], format!("exec: {plain_text:?}: permission denied")),
            (vec!["/"], "exec: \"/\": is a directory".to_owned()),
            (vec![], "process.args is empty".to_owned()),
            (vec![""], "process.args is empty".to_owned()),
        ];
        for (args, expected) in cases {
            assert_eq!(find(&spec(&args, &path)), Err(expected), "{args:?}");
        }
        assert!(find(&spec(&["program"], &[])).is_err(), "found without PATH");
    }
}
