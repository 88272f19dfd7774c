//! Runs a spec's hooks on the host (runtime spec, config.md, "POSIX-platform Hooks"): `prestart`, `createRuntime`,
//! `poststart` and `poststop` run in the runtime's own namespaces. nerdctl sets two in every container.
//!
//! A hook receives the container's state on stdin, as the runtime spec requires. The PID in it is that of the container's
//! holder (`holder.rs`), which is in the sandbox's network namespace; its other namespaces are the host's.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use husk_protos::chain::Chain;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::host::cgroup::home;
use crate::host::child::{self, ChildExit};
use crate::host::process::pidfd_open;

/// Time limit of a hook without a timeout of its own.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a failed hook's stderr in the error message.
const STDERR_TAIL: usize = 1024;
/// Most reads of stderr in a row. They empty a full pipe, and end even if the hook writes without end.
const STDERR_READS: usize = 64;
/// The runtime spec's version that the state follows.
const OCI_VERSION: &str = "1.0.2";

/// A hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hook {
    /// Its place in the spec, such as `hooks.createRuntime[0]`.
    pub field: String,
    /// The program, an absolute path on the host.
    pub path: PathBuf,
    /// The arguments, including the program's name.
    pub args: Vec<String>,
    /// The complete environment, as `NAME=value`.
    pub env: Vec<String>,
    /// Its time limit, seconds.
    pub timeout: Option<u32>,
}

/// A container's hooks, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hooks {
    /// Run before the container is created: `prestart`, then `createRuntime`.
    pub create: Vec<Hook>,
    /// Run after the container's process was started.
    pub poststart: Vec<Hook>,
    /// Run after the container was deleted.
    pub poststop: Vec<Hook>,
}

impl Hooks {
    /// Whether the container has no hooks.
    pub(crate) fn is_empty(&self) -> bool {
        self.create.is_empty() && self.poststart.is_empty() && self.poststop.is_empty()
    }
}

/// The container in the state that hooks receive (runtime.md, "State").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Subject {
    /// The container's id.
    pub id: String,
    /// Its bundle on the host, which is also the hook's working directory.
    pub bundle: PathBuf,
    /// The spec's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The container's holder; 0 in the state of a shim that had none.
    #[serde(default)]
    pub pid: u32,
}

/// The container's status in the state that hooks receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContainerStatus {
    /// Before its creation.
    Creating,
    /// After the start of its process.
    Running,
    /// After its deletion.
    Stopped,
}

impl Subject {
    fn state(&self, status: ContainerStatus) -> Vec<u8> {
        let name = match status {
            ContainerStatus::Creating => "creating",
            ContainerStatus::Running => "running",
            ContainerStatus::Stopped => "stopped",
        };
        let mut state = serde_json::json!({
            "ociVersion": OCI_VERSION,
            "id": self.id,
            "status": name,
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        // Like runc: a stopped container has no process.
        if status != ContainerStatus::Stopped {
            state["pid"] = self.pid.into();
        }
        state.to_string().into_bytes()
    }
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
#[error("{field} {}", path.display())]
pub(crate) struct HookError {
    field: String,
    path: PathBuf,
    #[source]
    failure: HookFailure,
}

#[derive(Debug, thiserror::Error)]
enum HookFailure {
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    #[error("did not exit within {0:?} and was killed{1}")]
    Timeout(Duration, StderrTail),
    #[error("{0}{1}")]
    Exit(ChildExit, StderrTail),
}

/// The last bytes of a hook's stderr. Displays as the end of an error message.
#[derive(Debug, Default)]
struct StderrTail(Vec<u8>);

impl StderrTail {
    fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.0.drain(..self.0.len().saturating_sub(STDERR_TAIL));
    }
}

impl fmt::Display for StderrTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(&self.0);
        if text.trim().is_empty() { Ok(()) } else { write!(f, "; stderr: {}", text.trim()) }
    }
}

/// Runs hooks in order until one fails. Blocks. Each hook has its own time limit.
///
/// # Errors
/// That of the hook that failed. A hook that exceeds its time limit is killed with its process group.
pub(crate) fn run(hooks: &[Hook], subject: &Subject, status: ContainerStatus) -> Result<(), HookError> {
    hooks.iter().try_for_each(|hook| run_one(hook, subject, status, Duration::MAX))
}

/// Runs all `poststop` hooks in order, within the given time in total. Failures are logged and do not stop the rest
/// (runtime.md, "Lifecycle").
pub(crate) fn run_to_the_end(hooks: &[Hook], subject: &Subject, within: Duration) {
    let deadline = Instant::now() + within;
    for hook in hooks {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Err(error) = run_one(hook, subject, ContainerStatus::Stopped, left) {
            tracing::warn!(container = subject.id, error = %Chain(&error), "hook failed");
        }
    }
}

/// Runs a hook within its own time limit and `limit`.
fn run_one(hook: &Hook, subject: &Subject, status: ContainerStatus, limit: Duration) -> Result<(), HookError> {
    let own = hook.timeout.map_or(DEFAULT_TIMEOUT, |seconds| Duration::from_secs(seconds.into()));
    let result = run_within(hook, subject, status, own.min(limit));
    result.map_err(|failure| HookError { field: hook.field.clone(), path: hook.path.clone(), failure })
}

fn run_within(hook: &Hook, subject: &Subject, status: ContainerStatus, within: Duration) -> Result<(), HookFailure> {
    let mut child = spawn(hook, subject).map_err(|error| HookFailure::Io("start", error))?;
    let state = subject.state(status);
    let (stderr, exited) = serve(&mut child, &state, Instant::now() + within).unwrap_or_else(|error| {
        tracing::warn!(hook = hook.field, %error, "failed to serve a hook's pipes; killing it");
        (StderrTail::default(), false)
    });
    if !exited {
        // The child is not reaped yet, so no other process group can have its PID.
        match killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::warn!(hook = hook.field, %error, "failed to kill a hook's process group"),
        }
    }
    let exit = ChildExit(child.wait().map_err(|error| HookFailure::Io("wait for the exit", error))?);
    match (exited, exit.0.success()) {
        (false, _) => Err(HookFailure::Timeout(within, stderr)),
        (true, false) => Err(HookFailure::Exit(exit, stderr)),
        (true, true) => Ok(()),
    }
}

/// Starts a hook in a process group of its own.
fn spawn(hook: &Hook, subject: &Subject) -> io::Result<Child> {
    let mut command = Command::new(&hook.path);
    let mut args = hook.args.iter();
    command.arg0(args.next().map_or_else(|| hook.path.as_os_str(), |name| name.as_ref())).args(args);
    command.env_clear().envs(hook.env.iter().filter_map(|variable| variable.split_once('=')));
    command.current_dir(if subject.bundle.is_dir() { subject.bundle.as_path() } else { Path::new("/") });
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let home = home::files()?;
    // SAFETY: prctl(2) and write(2) are async-signal-safe and change no memory. The forking thread waits for the hook, so it does
    // not end earlier and trigger the signal.
    unsafe {
        command.pre_exec(move || {
            child::join(&home)?;
            Ok(set_pdeathsig(Signal::SIGKILL)?)
        })
    };
    command.spawn()
}

/// Writes the state to a hook's stdin and reads its stderr, until it exits or the deadline passes. Neither stream
/// blocks the other. Returns whether the hook exited.
fn serve(child: &mut Child, state: &[u8], deadline: Instant) -> io::Result<(StderrTail, bool)> {
    let pidfd = pidfd_open(child.id())?.ok_or(io::ErrorKind::NotFound)?;
    let mut stdin = child.stdin.take();
    let mut stderr = child.stderr.take();
    for fd in [stdin.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)].into_iter().flatten() {
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let (mut unsent, mut tail) = (state, StderrTail::default());
    loop {
        let mut fds = vec![PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        fds.extend(stderr.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        fds.extend(stdin.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)));
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => continue,
            ready => ready?,
        };
        let exited = fds[0].any().unwrap_or(false);
        stdin = stdin.and_then(|pipe| send_state(pipe, &mut unsent));
        if let Some(pipe) = stderr.take() {
            stderr = read_stderr(pipe, &mut tail)?;
        }
        if exited || Instant::now() >= deadline {
            return Ok((tail, exited));
        }
    }
}

/// Writes as much of the state as the pipe takes. Closes the pipe when everything is written, or when the hook has
/// closed its end.
fn send_state(mut pipe: ChildStdin, unsent: &mut &[u8]) -> Option<ChildStdin> {
    match pipe.write(unsent) {
        Ok(written) => *unsent = &unsent[written..],
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(_) => return None,
    }
    (!unsent.is_empty()).then_some(pipe)
}

/// Reads what the pipe holds. Closes the pipe at its end.
fn read_stderr(mut pipe: ChildStderr, tail: &mut StderrTail) -> io::Result<Option<ChildStderr>> {
    let mut buffer = [0; STDERR_TAIL];
    for _ in 0..STDERR_READS {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(length) => tail.push(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(Some(pipe))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process::{ProcessId, wait_dead};

    fn shell(script: &str, env: &[&str], timeout: Option<u32>) -> Hook {
        Hook {
            field: "hooks.createRuntime[0]".into(),
            path: "/bin/sh".into(),
            args: ["hook", "-c", script].map(String::from).to_vec(),
            env: env.iter().map(ToString::to_string).collect(),
            timeout,
        }
    }

    fn subject(bundle: &Path) -> Subject {
        let annotations = [("a/b".to_owned(), "x".repeat(200_000))].into();
        Subject { id: "c1".into(), bundle: bundle.into(), annotations, pid: 77 }
    }

    #[test]
    fn a_hook_gets_its_state_environment_and_directory() {
        let folder = tempfile::tempdir().unwrap();
        let hook = shell("cat > state; env > env; echo $0 > name", &["A=1"], None);
        run(&[hook], &subject(folder.path()), ContainerStatus::Creating).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let state: serde_json::Value = serde_json::from_str(&read("state")).unwrap();
        assert_eq!((&state["id"], &state["status"]), (&"c1".into(), &"creating".into()));
        assert_eq!(state["bundle"], folder.path().to_str().unwrap());
        assert_eq!(state["annotations"]["a/b"].as_str().unwrap().len(), 200_000);
        assert_eq!(state["pid"], 77);
        let stopped = subject(folder.path()).state(ContainerStatus::Stopped);
        let stopped: serde_json::Value = serde_json::from_slice(&stopped).unwrap();
        assert_eq!((&stopped["status"], stopped.get("pid")), (&"stopped".into(), None));
        let env = read("env");
        assert!(env.contains("A=1\n") && !env.contains("PATH=") && !env.contains("HOME="), "{env}");
        assert_eq!(read("name"), "hook\n");
    }

    #[test]
    fn a_failure_names_the_hook_and_the_cause() {
        let folder = tempfile::tempdir().unwrap();
        let flood =
            "i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789 >&2; i=$((i + 1)); done";
        for (hook, expected) in [
            (shell("echo no luck >&2; exit 3", &[], None), "exited with status 3; stderr: no luck"),
            (shell("exec 0<&-; exit 4", &[], None), "exited with status 4"),
            (shell("kill -9 $$", &[], None), "was killed by signal 9"),
            (shell(&format!("{flood}; echo last >&2; exit 5"), &[], None), "last"),
            (shell("sleep 1000 & echo $! > child; sleep 1000", &[], Some(1)), "did not exit within 1s and was killed"),
            (Hook { path: "/nonexistent".into(), ..shell("", &[], None) }, "start: No such file"),
        ] {
            let error = run(&[hook], &subject(folder.path()), ContainerStatus::Creating).unwrap_err();
            let error = Chain(&error).to_string();
            assert!(error.starts_with("hooks.createRuntime[0] /"), "{error}");
            assert!(error.contains(expected) && error.len() < 2 * STDERR_TAIL, "{expected}: {error}");
        }
        let child: u32 = std::fs::read_to_string(folder.path().join("child")).unwrap().trim().parse().unwrap();
        let gone = match ProcessId::of(child).unwrap().map(|child| child.pidfd().unwrap()) {
            Some(Some(pidfd)) => wait_dead(pidfd, Duration::from_secs(10)).unwrap(),
            _ => true,
        };
        assert!(gone, "a process that the hook started is still running");
    }

    #[test]
    fn hooks_after_a_failed_one_do_not_run_and_the_total_time_is_limited() {
        let folder = tempfile::tempdir().unwrap();
        let hooks = [shell("echo 1 >> ran", &[], None), shell("exit 1", &[], None), shell("echo 3 >> ran", &[], None)];
        run(&hooks, &subject(folder.path()), ContainerStatus::Stopped).unwrap_err();
        assert_eq!(std::fs::read_to_string(folder.path().join("ran")).unwrap(), "1\n");
        let late = shell("sleep 1000", &[], None);
        let error =
            run_one(&late, &subject(folder.path()), ContainerStatus::Stopped, Duration::from_millis(50)).unwrap_err();
        let error = Chain(&error).to_string();
        assert!(error.contains("did not exit within"), "{error}");
    }
}
