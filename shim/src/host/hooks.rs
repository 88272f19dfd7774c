//! The hooks of a spec that are the host's (config.md of the runtime spec, "POSIX-platform Hooks"): `prestart`, `createRuntime`, `poststart`
//! and `poststop` are programs of the runtime's own namespaces, so the shim runs them. nerdctl has two in every container.
//!
//! A hook learns of the container what its state says, by its standard input. It has no pid to be told: there is no process of the
//! container on the host, and whoever goes by a pid all the same finds none, rather than the namespaces of the host.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::host::child::Ended;
use crate::host::process::pidfd_open;

/// Time that a hook has that asks for no limit of its own.
const DEADLINE: Duration = Duration::from_secs(60);
/// The end of what a failed hook wrote to its standard error, bytes, for the error message.
const WORDS: usize = 1024;
/// The runtime spec's version that the state follows.
const OCI_VERSION: &str = "1.0.2";

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Where it stands in the spec.
    pub field: String,
    /// The program, an absolute path of the host.
    pub path: PathBuf,
    /// Its arguments, the name that it is called by among them.
    pub args: Vec<String>,
    /// All of its environment, each `NAME=value`.
    pub env: Vec<String>,
    /// Seconds that it has.
    pub timeout: Option<u32>,
}

/// A container's hooks, each list in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Before the container is created: `prestart`, then `createRuntime`.
    pub create: Vec<Hook>,
    /// After its process was started.
    pub poststart: Vec<Hook>,
    /// After the container was deleted.
    pub poststop: Vec<Hook>,
}

impl Hooks {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.create.is_empty() && self.poststart.is_empty() && self.poststop.is_empty()
    }
}

/// What a hook is told of its container (runtime.md, "State").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// The container's id.
    pub id: String,
    /// Its bundle on the host; the hook's working folder too.
    pub bundle: PathBuf,
    /// The spec's annotations.
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// The point in the container's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It is being created.
    Creating,
    /// Its process was started.
    Running,
    /// It has been deleted.
    Stopped,
}

impl Subject {
    fn state(&self, status: Status) -> Vec<u8> {
        let status = match status {
            Status::Creating => "creating",
            Status::Running => "running",
            Status::Stopped => "stopped",
        };
        let state = serde_json::json!({
            "ociVersion": OCI_VERSION, "id": self.id, "status": status, "bundle": self.bundle, "annotations": self.annotations,
        });
        state.to_string().into_bytes()
    }
}

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
#[error("{field} {}: {why}", path.display())]
pub struct Error {
    field: String,
    path: PathBuf,
    why: Failure,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
    #[error("did not end within {0:?}, and was killed{1}")]
    Late(Duration, Words),
    #[error("{0}{1}")]
    Ended(Ended, Words),
}

/// The end of what a program wrote to its standard error.
#[derive(Debug)]
struct Words(Vec<u8>);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(&self.0);
        if text.trim().is_empty() { Ok(()) } else { write!(f, "; it says: {}", text.trim()) }
    }
}

/// Runs hooks one after the other, up to the first that fails. Blocks; each has its own time.
///
/// # Errors
/// That of the hook that failed. One whose time is over is killed, with its process group.
pub fn run(hooks: &[Hook], subject: &Subject, status: Status) -> Result<(), Error> {
    hooks.iter().try_for_each(|hook| run_one(hook, subject, status, Duration::MAX))
}

/// Runs the `poststop` hooks, all of them `within` that time. One that fails is logged, and those after it run all the same (runtime.md,
/// "Lifecycle").
pub fn run_to_the_end(hooks: &[Hook], subject: &Subject, within: Duration) {
    let until = Instant::now() + within;
    for hook in hooks {
        let left = until.saturating_duration_since(Instant::now());
        if let Err(error) = run_one(hook, subject, Status::Stopped, left) {
            tracing::warn!(container = subject.id, %error, "hook failed");
        }
    }
}

/// Runs one hook for its own time, and no longer than `most`.
fn run_one(hook: &Hook, subject: &Subject, status: Status, most: Duration) -> Result<(), Error> {
    let own = hook.timeout.map_or(DEADLINE, |seconds| Duration::from_secs(seconds.into()));
    let done = run_within(hook, subject, status, own.min(most));
    done.map_err(|why| Error { field: hook.field.clone(), path: hook.path.clone(), why })
}

fn run_within(hook: &Hook, subject: &Subject, status: Status, within: Duration) -> Result<(), Failure> {
    let mut command = Command::new(&hook.path);
    let mut args = hook.args.iter();
    command.arg0(args.next().map_or_else(|| hook.path.as_os_str(), |name| name.as_ref())).args(args);
    command.env_clear().envs(hook.env.iter().filter_map(|variable| variable.split_once('=')));
    command.current_dir(if subject.bundle.is_dir() { subject.bundle.as_path() } else { Path::new("/") });
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    // SAFETY: prctl(2) is async-signal-safe and touches no memory. The thread that forks waits for the hook, so it does not end before it.
    unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    let mut child = command.spawn().map_err(|error| Failure::Io("start", error))?;
    let state = subject.state(status);
    let (words, in_time) = attend(&mut child, &state, Instant::now() + within).unwrap_or_else(|error| {
        tracing::warn!(hook = hook.field, %error, "a hook is killed because it cannot be followed");
        (Words(Vec::new()), false)
    });
    if !in_time {
        // Not yet waited for, so the group is its.
        match killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => tracing::warn!(hook = hook.field, %error, "a hook's group cannot be killed"),
        }
    }
    let ended = Ended(child.wait().map_err(|error| Failure::Io("wait for it", error))?);
    match (in_time, ended.0.success()) {
        (false, _) => Err(Failure::Late(within, words)),
        (true, false) => Err(Failure::Ended(ended, words)),
        (true, true) => Ok(()),
    }
}

/// Gives a hook its state and takes its words until it ends, or its time is over. Neither holds the other up.
fn attend(child: &mut Child, state: &[u8], until: Instant) -> io::Result<(Words, bool)> {
    let pidfd = pidfd_open(child.id())?.ok_or(io::ErrorKind::NotFound)?;
    let mut stdin = child.stdin.take();
    let mut stderr = child.stderr.take();
    for fd in [stdin.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)].into_iter().flatten() {
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let (mut left, mut words) = (state, Words(Vec::new()));
    loop {
        let mut fds = vec![PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        fds.extend(stderr.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        fds.extend(stdin.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)));
        let wait = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(wait.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            ready => ready?,
        };
        let ended = fds[0].any().unwrap_or(false);
        if let Some(pipe) = &mut stdin {
            match pipe.write(left) {
                Ok(written) => left = &left[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // It does not care.
                Err(_) => left = &[],
            }
            if left.is_empty() {
                stdin = None;
            }
        }
        if let Some(pipe) = &mut stderr
            && !listen(pipe, &mut words)?
        {
            stderr = None;
        }
        if ended || Instant::now() >= until {
            return Ok((words, ended));
        }
    }
}

/// Reads what is there; false at the end.
fn listen(pipe: &mut impl Read, words: &mut Words) -> io::Result<bool> {
    let mut buffer = [0; WORDS];
    // As much as a pipe holds, so that one that writes without end is not listened to without end.
    for _ in 0..64 {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(read) => {
                words.0.extend_from_slice(&buffer[..read]);
                words.0.drain(..words.0.len().saturating_sub(WORDS));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
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
        Subject { id: "c1".into(), bundle: bundle.into(), annotations }
    }

    #[test]
    fn a_hook_gets_its_state_its_environment_and_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let hook = shell("cat > state; env > env; echo $0 > name", &["A=1"], None);
        run(&[hook], &subject(folder.path()), Status::Creating).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let state: serde_json::Value = serde_json::from_str(&read("state")).unwrap();
        assert_eq!((&state["id"], &state["status"]), (&"c1".into(), &"creating".into()));
        assert_eq!(state["bundle"], folder.path().to_str().unwrap());
        assert_eq!(state["annotations"]["a/b"].as_str().unwrap().len(), 200_000);
        assert_eq!(state.get("pid"), None);
        let env = read("env");
        assert!(env.contains("A=1\n") && !env.contains("PATH=") && !env.contains("HOME="), "{env}");
        assert_eq!(read("name"), "hook\n");
    }

    #[test]
    fn a_failure_says_which_hook_and_why() {
        let folder = tempfile::tempdir().unwrap();
        let flood =
            "i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789 >&2; i=$((i + 1)); done";
        for (hook, want) in [
            (shell("echo no luck >&2; exit 3", &[], None), "exited with status 3; it says: no luck"),
            (shell("exec 0<&-; exit 4", &[], None), "exited with status 4"),
            (shell("kill -9 $$", &[], None), "was killed by signal 9"),
            (shell(&format!("{flood}; echo last >&2; exit 5"), &[], None), "last"),
            (shell("sleep 1000 & echo $! > child; sleep 1000", &[], Some(1)), "did not end within 1s, and was killed"),
            (Hook { path: "/nonexistent".into(), ..shell("", &[], None) }, "start: No such file"),
        ] {
            let error = run(&[hook], &subject(folder.path()), Status::Creating).unwrap_err().to_string();
            assert!(error.starts_with("hooks.createRuntime[0] /"), "{error}");
            assert!(error.contains(want) && error.len() < 2 * WORDS, "{want}: {error}");
        }
        let child: u32 = std::fs::read_to_string(folder.path().join("child")).unwrap().trim().parse().unwrap();
        let gone = match ProcessId::of(child).unwrap().map(|child| child.pidfd().unwrap()) {
            Some(Some(pidfd)) => wait_dead(pidfd, Duration::from_secs(10)).unwrap(),
            _ => true,
        };
        assert!(gone, "what a late hook started goes on");
    }

    #[test]
    fn those_after_one_that_fails_do_not_run_and_all_have_one_time() {
        let folder = tempfile::tempdir().unwrap();
        let hooks = [shell("echo 1 >> ran", &[], None), shell("exit 1", &[], None), shell("echo 3 >> ran", &[], None)];
        run(&hooks, &subject(folder.path()), Status::Stopped).unwrap_err();
        assert_eq!(std::fs::read_to_string(folder.path().join("ran")).unwrap(), "1\n");
        let late = shell("sleep 1000", &[], None);
        let error = run_one(&late, &subject(folder.path()), Status::Stopped, Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("did not end within"), "{error}");
    }
}
