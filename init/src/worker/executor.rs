//! The last steps of a container's process, in the process itself: find the program, and become it.
//!
//! libcontainer's own executor tests a program's x bit for "others" only, refuses a process without PATH, and leaves an exec without
//! the container's seccomp filter. This one asks the kernel whether the user may run the program, and says what runc would say.

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

/// A process of a container, about to be run.
#[derive(Debug, Default, Clone)]
pub struct Workload {
    /// Filter that is still to be applied: the container's, for an exec.
    pub seccomp: Option<LinuxSeccomp>,
    /// The process was given CAP_SYS_ADMIN only to apply the filter, and must not keep it.
    pub drop_admin: bool,
    /// Where a process that cannot be run says why, to the worker that has cloned it.
    refusal: Refusal,
    /// Its streams are a terminal, which PID 1 gets ready first; see [`super::console`].
    gated: bool,
    /// Whom it becomes before anything else, if libcontainer could not make it so.
    identity: Option<Identity>,
    /// What it runs when it is started, before anything of itself.
    hooks: Option<StartHooks>,
    /// Environment as libcontainer completed it, from [`Executor::setup_envs`] to [`Executor::exec`].
    environment: RefCell<Vec<CString>>,
}

impl Workload {
    /// A process that has `seccomp` still before it.
    pub fn with_seccomp(seccomp: LinuxSeccomp, drop_admin: bool) -> Self {
        Self { seccomp: Some(seccomp), drop_admin, ..Self::default() }
    }

    /// The same process, which says on `refusal` why it cannot be run.
    pub fn refusing(self, refusal: &Refusal) -> Self {
        Self { refusal: refusal.clone(), ..self }
    }

    /// The same, which becomes `identity` first, if there is one.
    pub fn becoming(self, identity: Option<Identity>) -> Self {
        Self { identity, ..self }
    }

    /// The same, which runs `hooks` first, if there are any.
    pub fn hooked(self, hooks: Option<StartHooks>) -> Self {
        Self { hooks, ..self }
    }

    fn find(&self, spec: &Spec) -> Result<PathBuf, String> {
        find(spec).inspect_err(|why| self.refusal.say(why))
    }

    /// The same, behind a gate or not.
    pub fn gated(self, gated: bool) -> Self {
        Self { gated, ..self }
    }
}

/// Why a program was not run, in a memory file that the worker shares with what it clones. libcontainer tells it too, in the middle of words of its
/// own.
#[derive(Debug, Default, Clone)]
pub struct Refusal(Option<Rc<File>>);

impl Refusal {
    /// An empty one.
    ///
    /// # Errors
    /// What memfd_create(2) said.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Some(Rc::new(File::from(memfd_create(c"refusal", MFdFlags::MFD_CLOEXEC)?)))))
    }

    fn say(&self, why: &str) {
        if let Some(file) = &self.0 {
            // Without it, libcontainer's words have to do.
            let _ = file.write_at(why.as_bytes(), 0);
        }
    }

    /// What was said, if anything.
    pub fn heard(&self) -> Option<String> {
        let mut why = [0; REFUSAL_MAX];
        let length = self.0.as_ref()?.read_at(&mut why, 0).ok().filter(|length| *length > 0)?;
        Some(String::from_utf8_lossy(&why[..length]).into_owned())
    }
}

/// Most bytes of a reason: room for a path of PATH_MAX.
const REFUSAL_MAX: usize = 8192;

impl Executor for Workload {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let ready = match &self.identity {
            Some(identity) => identity.assume().inspect_err(|why| self.refusal.say(why)),
            None => Ok(()),
        };
        // The user's permissions decide on the program.
        ready.and_then(|()| self.find(spec)).map(drop).map_err(ExecutorValidationError::ArgValidationError)
    }

    fn setup_envs(&self, mut environment: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        if let Some(identity) = &self.identity {
            identity.correct_home(&mut environment);
        }
        // Kept aside instead of made this process's own: set_var panics on names that execve(2) takes.
        *self.environment.borrow_mut() = environment
            .into_iter()
            .map(|(name, value)| CString::new(format!("{name}={value}")))
            .collect::<Result<_, _>>()
            .map_err(|_| ExecutorSetEnvsError::Other("process.env has a zero byte".into()))?;
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
        // SAFETY: SIG_DFL installs no handler. Rust's start ignores SIGPIPE, which would be inherited: `yes | head` would not end.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(|e| ExecutorError::Execution(e.into()))?;
        if let Some(seccomp) = &self.seccomp {
            initialize_seccomp(seccomp).map_err(|e| ExecutorError::Execution(e.into()))?;
        }
        if self.drop_admin {
            drop_admin().map_err(|e| ExecutorError::Execution(e.into()))?;
        }
        let Err(error) = execve(&path, &args, &self.environment.borrow());
        // The start has been answered already: the process's own stderr is where a user looks, and where runc says it.
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

/// The program that the process names, looked for as execvp(3) and runc do, in the PATH of the process's own environment.
fn find(spec: &Spec) -> Result<PathBuf, String> {
    let name = arguments(spec).first().filter(|name| !name.is_empty()).ok_or("process.args is empty")?;
    if name.contains('/') {
        return match runnable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(nix::errno::Errno::ENOENT) => Err(format!("exec: {name:?}: stat {name}: no such file or directory")),
            Err(error) => Err(format!("exec: {name:?}: {}", error.desc().to_lowercase())),
        };
    }
    let environment = spec.process().as_ref().and_then(|process| process.env().as_deref()).unwrap_or_default();
    let path = environment.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let mut denied = false;
    for folder in path.split(':') {
        let candidate = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
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
    // By the effective ids: libcontainer has become the process's user by now.
    faccessat(nix::fcntl::AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
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
    fn programs_are_found_and_missed_as_runc_says_it() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there");
        let plain = folder.path().join("plain");
        fs::write(&there, "").unwrap();
        // Only its owner may run it: the case that a test for "others" gets wrong.
        fs::set_permissions(&there, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(&plain, "").unwrap();
        fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
        let path = [format!("PATH=/nowhere:{}", folder.path().display())];
        let (there_text, plain_text) = (there.to_str().unwrap(), plain.to_str().unwrap());

        assert_eq!(find(&spec(&["there"], &path)), Ok(there.clone()));
        assert_eq!(find(&spec(&[there_text], &[])), Ok(there.clone()));
        let cases = [
            (vec!["absent"], "exec: \"absent\": executable file not found in $PATH".to_owned()),
            (vec!["/absent"], "exec: \"/absent\": stat /absent: no such file or directory".to_owned()),
            (vec!["plain"], "exec: \"plain\": permission denied".to_owned()),
            (vec![plain_text], format!("exec: {plain_text:?}: permission denied")),
            (vec!["/"], "exec: \"/\": is a directory".to_owned()),
            (vec![], "process.args is empty".to_owned()),
            (vec![""], "process.args is empty".to_owned()),
        ];
        for (args, want) in cases {
            assert_eq!(find(&spec(&args, &path)), Err(want), "{args:?}");
        }
        assert!(find(&spec(&["there"], &[])).is_err(), "no PATH, no search");
    }
}
