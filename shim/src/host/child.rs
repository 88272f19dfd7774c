//! Starts programs that must not outlive this process, and waits for their exit.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, LazyLock, Mutex, mpsc};

use husk_protos::lock::lock;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::host::jail::Jail;
use crate::host::process::{ProcessId, pidfd_open, pidfd_send_signal};

/// Lowest number for an inherited descriptor. It is far above the descriptors in use at the fork: one of these is the
/// socket on which `Command` reports a failed exec, and it must not be overwritten.
pub(crate) const FIRST_FD: i32 = 900;
/// Temporary numbers between fork and exec: above all final ones, and below 1024, the usual limit.
const PARKING: i32 = 960;

/// Highest number for an inherited descriptor.
pub(crate) const LAST_FD: i32 = PARKING - 1;

/// After [`reserve`], inherited descriptors may also have numbers up to this one.
pub(crate) const LAST_RESERVED: i32 = 5;

/// Occupies all unused numbers up to [`LAST_RESERVED`] for the life of the process, so that `Command`'s socket never
/// gets one. Call it first, before other code opens descriptors that it later closes.
///
/// # Errors
/// When /dev/null cannot be opened.
pub(crate) fn reserve() -> io::Result<()> {
    loop {
        let fd = File::open("/dev/null")?;
        if fd.as_raw_fd() > LAST_RESERVED {
            return Ok(());
        }
        // Stays open until the process exits.
        let _ = fd.into_raw_fd();
    }
}

/// A program could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{action}")]
pub struct LaunchError {
    action: &'static str,
    source: io::Error,
}

pub(super) fn failed(action: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError { action, source }
}

/// A program to start.
#[derive(Debug)]
pub(crate) struct Launch {
    /// The binary.
    pub(crate) program: PathBuf,
    /// The arguments after the program's name.
    pub(crate) args: Vec<OsString>,
    /// The complete environment. containerd's is not passed on: its LD_LIBRARY_PATH may name the bundle's directory.
    pub(crate) env: Vec<(OsString, OsString)>,
    /// The inherited descriptors and their numbers in the program: from [`FIRST_FD`] to [`LAST_FD`], or up to
    /// [`LAST_RESERVED`]. All others are closed.
    pub(crate) fds: Vec<(OwnedFd, i32)>,
    /// What separates it from the host; if `None`, it has the caller's user, namespaces and privileges.
    pub(crate) jail: Option<Jail>,
    /// Standard output and standard error.
    pub(crate) output: File,
    /// The `cgroup.procs` files of the cgroups to join, open for writing.
    pub(crate) cgroups: Vec<File>,
    /// Make the program the leader of a process group, which is killed with it: for programs that start others.
    pub(crate) leads: bool,
}

/// A command, whether it has a PID namespace of its own, and where its PID goes.
type Job = (Command, bool, mpsc::SyncSender<io::Result<u32>>);

/// The thread that forks all children. The kernel sends a child's death signal when the forking *thread* ends
/// (prctl(2)), so this thread lives as long as the process.
static SPAWNER: LazyLock<io::Result<mpsc::SyncSender<Job>>> = LazyLock::new(|| {
    let (jobs, queue) = mpsc::sync_channel::<Job>(8);
    std::thread::Builder::new().name("spawner".into()).spawn(move || {
        for (command, own_pids, done) in queue {
            let started = if own_pids { start_with_own_pids(command) } else { start(command) };
            // The caller is waiting on the channel, so this cannot fail.
            let _ = done.send(started);
        }
    })?;
    Ok(jobs)
});

fn start(mut command: Command) -> io::Result<u32> {
    command.spawn().map(|child| child.id())
}

/// Starts a command as the first process of a new PID namespace.
fn start_with_own_pids(mut command: Command) -> io::Result<u32> {
    let own = File::open("/proc/self/ns/pid")?;
    // Applies to the children that this thread starts from now on, not to itself (pid_namespaces(7)).
    unshare(CloneFlags::CLONE_NEWPID)?;
    let started = command.spawn();
    match (setns(&own, CloneFlags::CLONE_NEWPID), started) {
        (Ok(()), started) => started.map(|child| child.id()),
        (Err(errno), Ok(mut child)) => {
            child.kill()?;
            child.wait()?;
            Err(errno.into())
        }
        (Err(_), Err(error)) => Err(error),
    }
}

impl Launch {
    /// Starts the program. The kernel kills it when the calling process ends for whatever reason.
    ///
    /// # Errors
    /// When the program cannot be started; no process is left.
    pub(crate) fn spawn(self) -> Result<Child, LaunchError> {
        let mut command = Command::new(&self.program);
        let error = self.output.try_clone().map_err(failed("duplicate the output's descriptor"))?;
        command.args(&self.args).env_clear().envs(self.env);
        command.stdin(Stdio::null()).stdout(self.output).stderr(error);
        let (jail, cgroups, leads) = (self.jail, self.cgroups, self.leads);
        let own_pids = jail.as_ref().is_some_and(Jail::has_own_pids);
        let parent = std::process::id();
        let fds: Vec<(i32, i32)> = self.fds.iter().map(|(fd, target)| (fd.as_raw_fd(), *target)).collect();
        // SAFETY: the closure makes only async-signal-safe calls, on memory that was allocated before the fork. The
        // descriptors stay open in `self.fds` until spawn() returns.
        unsafe {
            command.pre_exec(move || {
                // Not with Command's own methods: they change the user first.
                join(&cgroups)?;
                if leads {
                    nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
                }
                if let Some(jail) = &jail {
                    jail.enter()?;
                }
                // A core file would contain the guest's memory.
                setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
                die_with(parent)?;
                place(&fds)?;
                jail.as_ref().map_or(Ok(()), Jail::restrict)
            })
        };
        spawn(command, own_pids, leads)
    }
}

/// Starts a command on the thread that lives as long as the process. Descriptors that its `pre_exec` uses must stay
/// open until this returns. With `own_pids`, it is the first process of a new PID namespace.
pub(super) fn spawn(command: Command, own_pids: bool, leads: bool) -> Result<Child, LaunchError> {
    let jobs = SPAWNER.as_ref().map_err(|error| failed("start the spawner thread")(clone_error(error)))?;
    let (done, result) = mpsc::sync_channel(1);
    let gone = || failed("start")(io::Error::other("the spawner thread has ended"));
    jobs.send((command, own_pids, done)).map_err(|_| gone())?;
    let pid = result.recv().map_err(|_| gone())?.map_err(failed("start"))?;
    Child::adopt(pid, leads)
}

pub(super) fn clone_error(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

/// In the child: joins its cgroups before it allocates memory, which would otherwise be charged to the parent's
/// cgroups.
pub(crate) fn join(cgroups: &[File]) -> io::Result<()> {
    for procs in cgroups {
        // 0 means the writing process (cgroup-v2.rst; v1 does the same).
        let mut procs = procs;
        procs.write_all(b"0")?;
    }
    Ok(())
}

/// In the child: requests SIGKILL for the end of the parent. Call it after a change of user, which resets the request
/// (prctl(2)).
pub(super) fn die_with(parent: u32) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // If the parent ended before the call, the signal would never be sent.
    if parent_now()? != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

/// In the child: its parent's PID, as the parent knows it.
fn parent_now() -> io::Result<u32> {
    match nix::unistd::getppid().as_raw() {
        // The parent is in another PID namespace, whose /proc this still is.
        0 => {
            let stat = open("/proc/self/stat", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            let mut text = [0; 512];
            let length = nix::unistd::read(&stat, &mut text)?;
            parent_in(&text[..length]).ok_or_else(|| io::Error::from_raw_os_error(libc::EBADMSG))
        }
        pid => Ok(pid as u32),
    }
}

/// The fourth field of `/proc/<pid>/stat`. Allocates no memory, as the crate `procfs` does.
fn parent_in(stat: &[u8]) -> Option<u32> {
    // The name, in parentheses, may contain some itself: proc_pid_stat(5).
    let after_name = stat.iter().rposition(|byte| *byte == b')')? + 1;
    let mut fields = stat[after_name..].split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
    std::str::from_utf8(fields.nth(1)?).ok()?.parse().ok()
}

/// In the child: closes all descriptors but the standard streams at the exec. Those that this process inherited without
/// close-on-exec must not reach the child.
pub(super) fn close_at_exec() -> io::Result<()> {
    // SAFETY: the call changes flags of descriptors and touches no memory.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// In the child: moves each descriptor to its number, without close-on-exec. The moves go through temporary numbers,
/// because one descriptor's target may be another's source.
fn place(fds: &[(i32, i32)]) -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    close_at_exec()?;
    for (index, (fd, _)) in fds.iter().enumerate() {
        // SAFETY: dup3 on numbers touches no memory.
        check(unsafe { libc::dup3(*fd, PARKING + index as i32, libc::O_CLOEXEC) })?;
    }
    for (index, (_, target)) in fds.iter().enumerate() {
        // SAFETY: as above.
        check(unsafe { libc::dup2(PARKING + index as i32, *target) })?;
    }
    Ok(())
}

/// How a child ended. Displays as "exited with status 1" or "was killed by signal 9".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChildExit(pub ExitStatus);

impl fmt::Display for ChildExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.code(), self.0.signal()) {
            (Some(code), _) => write!(f, "exited with status {code}"),
            (_, Some(signal)) => write!(f, "was killed by signal {signal}"),
            _ => write!(f, "ended with {}", self.0),
        }
    }
}

/// A child process. Dropping this value leaves the process running.
#[derive(Debug)]
pub(crate) struct Child {
    id: ProcessId,
    pidfd: OwnedFd,
    leads: bool,
    reaped: Arc<Mutex<bool>>,
    exit: watch::Receiver<Option<ChildExit>>,
}

impl Child {
    /// Wraps a child that was just started, and starts to wait for its exit.
    fn adopt(pid: u32, leads: bool) -> Result<Self, LaunchError> {
        // The child is not reaped yet, so no other process can have its PID.
        let id = ProcessId::of(pid).and_then(|id| id.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let id = id.map_err(failed("read the child's start time"))?;
        let open = || pidfd_open(pid).and_then(|fd| fd.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let pidfd = open().map_err(failed("open the child's pidfd"))?;
        let waiter = open().map_err(failed("open the child's pidfd"))?;
        // SAFETY: the AsyncFd owns the OwnedFd, which stays open and unchanged until both are dropped.
        let waiter =
            unsafe { AsyncFd::register(waiter) }.map_err(|error| failed("watch the child")(error.into_parts().1))?;
        let (sender, exit) = watch::channel(None);
        let reaped = Arc::new(Mutex::new(false));
        let mark = reaped.clone();
        tokio::spawn(async move { sender.send_replace(Some(wait(waiter, &mark).await)) });
        Ok(Self { id, pidfd, leads, reaped, exit })
    }

    /// Identifies the process.
    pub(crate) fn process(&self) -> ProcessId {
        self.id
    }

    /// Waits for the exit. Can be called repeatedly.
    pub(crate) async fn exited(&self) -> ChildExit {
        let exit = self.exit.clone().wait_for(Option::is_some).await.map_or(None, |exit| *exit);
        match exit {
            Some(exit) => exit,
            // The runtime is shutting down.
            None => std::future::pending().await,
        }
    }

    /// Sends SIGKILL, to the whole process group if the child leads one. If the leader has already exited, the rest of
    /// its group is left alone: it may have started them to stay.
    pub(crate) fn kill(&self) {
        if !self.leads {
            return self.signal(libc::SIGKILL);
        }
        // Hold the lock until the signal is sent: once the leader is reaped, its number may belong to another group.
        let reaped = lock(&self.reaped);
        if !*reaped && let Err(error) = killpg(Pid::from_raw(self.id.pid as i32), Signal::SIGKILL) {
            tracing::error!(pid = self.id.pid, %error, "failed to kill the process group");
        }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: i32) {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => tracing::error!(pid = self.id.pid, signal, %error, "failed to signal the process"),
        }
    }
}

/// The only wait for this child in the process.
async fn wait(pidfd: AsyncFd<OwnedFd>, reaped: &Mutex<bool>) -> ChildExit {
    // The pidfd becomes readable at the exit (pidfd_open(2)). Ignore epoll's errors: waitid reports its own.
    let _ = pidfd.readable().await;
    let mut reaped = lock(reaped);
    *reaped = true;
    let raw = match waitid(Id::PIDFd(std::os::fd::AsFd::as_fd(pidfd.get_ref())), WaitPidFlag::WEXITED) {
        Ok(WaitStatus::Exited(_, code)) => code << 8,
        Ok(WaitStatus::Signaled(_, signal, _)) => signal as i32,
        Ok(other) => {
            tracing::error!(?other, "waitid returned an event that is no exit");
            0
        }
        Err(errno) => {
            tracing::error!(%errno, "failed to wait for a child");
            0
        }
    };
    ChildExit(ExitStatus::from_raw(raw))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};
    use std::os::unix::net::UnixStream;

    use husk_protos::chain::Chain;

    use super::*;

    fn shell(script: &str, output: &File, fds: Vec<(OwnedFd, i32)>) -> Child {
        launch(script, output, fds, false)
    }

    fn launch(script: &str, output: &File, fds: Vec<(OwnedFd, i32)>, leads: bool) -> Child {
        let args = ["-c".into(), script.into()].to_vec();
        // Not sh: dash cannot redirect to descriptors of two digits.
        Launch {
            program: "/bin/bash".into(),
            args,
            env: Vec::new(),
            fds,
            jail: None,
            output: output.try_clone().unwrap(),
            cgroups: Vec::new(),
            leads,
        }
        .spawn()
        .unwrap()
    }

    fn written(mut file: File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn a_program_inherits_its_descriptors_and_no_others() {
        let output = tempfile::tempfile().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (other, crossed) = UnixStream::pair().unwrap();
        // Each gets the number that the other has in this process.
        let numbers = (theirs.as_raw_fd(), crossed.as_raw_fd());
        let fds = vec![(theirs.into(), numbers.1), (crossed.into(), numbers.0)];
        let script = format!("echo a >&{}; echo b >&{}; ls /proc/self/fd | wc -l", numbers.1, numbers.0);
        let child = shell(&script, &output, fds);
        assert_eq!(child.exited().await.to_string(), "exited with status 0");
        for (mut end, expected) in [(ours, "a\n"), (other, "b\n")] {
            let mut text = String::new();
            end.read_to_string(&mut text).unwrap();
            assert_eq!(text, expected);
        }
        // The standard streams, these two, and the one that ls opens.
        assert_eq!(written(output).trim(), "6");
    }

    #[tokio::test]
    async fn the_exit_names_the_status_or_the_signal() {
        let output = tempfile::tempfile().unwrap();
        let child = shell("exit 7", &output, Vec::new());
        assert_eq!(child.exited().await.to_string(), "exited with status 7");
        let child = shell("sleep 60", &output, Vec::new());
        child.kill();
        assert_eq!(child.exited().await.to_string(), "was killed by signal 9");
        assert_eq!(child.exited().await.to_string(), "was killed by signal 9", "repeated");
        child.kill();
    }

    /// Starts a shell that starts another program and runs `then`. Returns the other program and a handle on it.
    fn with_another(then: &str, leads: bool) -> (Child, ProcessId, OwnedFd) {
        let output = tempfile::tempfile().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let script = format!("sleep 60 & echo $! >&{FIRST_FD}; {then}");
        let child = launch(&script, &output, vec![(theirs.into(), FIRST_FD)], leads);
        let mut pid = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(&mut ours), &mut pid).unwrap();
        let other = ProcessId::of(pid.trim().parse().unwrap()).unwrap().unwrap();
        (child, other, other.pidfd().unwrap().unwrap())
    }

    #[tokio::test]
    async fn a_leader_is_killed_with_its_group_unless_it_has_exited() {
        let second = std::time::Duration::from_secs(1);
        let cases = [("wait", true, true), ("wait", false, false), ("exit 0", true, false)];
        for (then, leads, dies) in cases {
            let (child, other, handle) = with_another(then, leads);
            if then != "wait" {
                child.exited().await;
            }
            child.kill();
            child.exited().await;
            // A signal to the group would have been sent before this one's.
            let within = if dies { 10 * second } else { second / 10 };
            assert_eq!(crate::host::process::wait_dead(&handle, within).unwrap(), dies, "{then} {leads}");
            other.kill(10 * second).unwrap();
        }
    }

    #[test]
    fn the_parent_is_found_whatever_the_programs_name_is() {
        let table = [("1 (sh) S 42 7", Some(42)), ("1 (a) R 3 (b) S 42 7", Some(42)), ("1 (sh", None), ("", None)];
        for (stat, parent) in table {
            assert_eq!(parent_in(stat.as_bytes()), parent, "{stat}");
        }
    }

    #[tokio::test]
    async fn a_missing_program_is_an_error() {
        let output = tempfile::tempfile().unwrap();
        let launch = Launch {
            program: "/nonexistent/program".into(),
            args: Vec::new(),
            env: Vec::new(),
            fds: Vec::new(),
            jail: None,
            output,
            cgroups: Vec::new(),
            leads: false,
        };
        let error = launch.spawn().unwrap_err();
        assert_eq!(Chain(&error).to_string(), "start: No such file or directory (os error 2)");
    }
}
