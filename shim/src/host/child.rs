//! Starting the programs that a VM consists of, so that none of them outlives the shim, and waiting for their end.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, LazyLock, Mutex, mpsc};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::host::process::{ProcessId, pidfd_open, pidfd_send_signal};

/// The first number for descriptors that a child inherits. Far above those in use when it is started, because `Command` has a
/// socket of its own there, by which it learns of a failed exec, and that must not be overwritten.
pub const FIRST_FD: i32 = 900;
/// Where they are parked between fork and exec: above all numbers that they may end up at, and below 1024, the usual limit.
const PARKING: i32 = 960;

/// Up to here, numbers can be given to children too, once [`reserve`] has been called.
pub const LAST_RESERVED: i32 = 5;

/// Takes all low numbers that nobody has, for good: then `Command`'s own socket is not among them, and no child's descriptor comes in its
/// way. To be called first of all, when whoever has one keeps it.
///
/// # Errors
/// When /dev/null cannot be opened.
pub fn reserve() -> io::Result<()> {
    loop {
        let fd = File::open("/dev/null")?;
        if fd.as_raw_fd() > LAST_RESERVED {
            return Ok(());
        }
        // Kept open to the process's end.
        let _ = fd.into_raw_fd();
    }
}

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct LaunchError {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError { what, source }
}

/// A program, and what it gets.
#[derive(Debug)]
pub struct Launch {
    /// The binary.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// All of its environment. containerd's is not for it: the LD_LIBRARY_PATH in it may name the bundle's folder.
    pub env: Vec<(OsString, OsString)>,
    /// Descriptors, and the numbers at which the program finds them: from [`FIRST_FD`] to 959, or up to [`LAST_RESERVED`]. It inherits no
    /// others.
    pub fds: Vec<(OwnedFd, i32)>,
    /// Whom it runs as (uid, gid), without supplementary groups; root if none.
    pub user: Option<(u32, u32)>,
    /// Its standard output and error.
    pub output: File,
    /// The `cgroup.procs` of each cgroup that it lives in, opened for writing.
    pub cgroups: Vec<File>,
    /// Whether it leads a process group of its own, with which it is killed: for a program that starts others.
    pub leads: bool,
}

type Job = (Command, mpsc::SyncSender<io::Result<u32>>);

/// The thread that forks all children. The death signal that a child asks for is sent when the *thread* ends that forked it
/// (prctl(2)), so it has to be one that lives as long as the process.
static SPAWNER: LazyLock<io::Result<mpsc::SyncSender<Job>>> = LazyLock::new(|| {
    let (jobs, queue) = mpsc::sync_channel::<Job>(8);
    std::thread::Builder::new().name("spawner".into()).spawn(move || {
        for (mut command, done) in queue {
            // Whoever asked waits for the answer, and for nothing else.
            let _ = done.send(command.spawn().map(|child| child.id()));
        }
    })?;
    Ok(jobs)
});

impl Launch {
    /// Starts the program. It is killed when the calling process ends, however that comes.
    ///
    /// # Errors
    ///
    /// When it cannot be started; then there is no process.
    pub fn spawn(self) -> Result<Child, LaunchError> {
        let mut command = Command::new(&self.program);
        let error = self.output.try_clone().map_err(failed("duplicate the log's descriptor"))?;
        command.args(&self.args).env_clear().envs(self.env);
        command.stdin(Stdio::null()).stdout(self.output).stderr(error);
        let (user, cgroups, leads) = (self.user, self.cgroups, self.leads);
        let shim = std::process::id();
        let fds: Vec<(i32, i32)> = self.fds.iter().map(|(fd, target)| (fd.as_raw_fd(), *target)).collect();
        // SAFETY: only async-signal-safe calls between fork and exec, on memory that was allocated before; the descriptors stay
        // open in `self.fds` until the spawn is done.
        unsafe {
            command.pre_exec(move || {
                // Here and not by Command, which would change the user first.
                join(&cgroups)?;
                if leads {
                    nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
                }
                if let Some((uid, gid)) = user {
                    become_user(uid, gid)?;
                }
                die_with(shim)?;
                place(&fds)
            })
        };
        let jobs = SPAWNER.as_ref().map_err(|error| failed("start the spawner thread")(clone_error(error)))?;
        let (done, answer) = mpsc::sync_channel(1);
        let gone = || failed("start")(io::Error::other("the spawner thread has ended"));
        jobs.send((command, done)).map_err(|_| gone())?;
        let pid = answer.recv().map_err(|_| gone())?.map_err(failed("start"))?;
        Child::adopt(pid, leads)
    }
}

fn clone_error(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

/// In the child: into its cgroups, before it has allocated anything that would be somebody else's.
fn join(cgroups: &[File]) -> io::Result<()> {
    for procs in cgroups {
        // 0 stands for the writer (cgroup-v2.rst; the same on v1).
        let mut procs = procs;
        procs.write_all(b"0")?;
    }
    Ok(())
}

/// In the child.
fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(gid));
    nix::unistd::setgroups(&[])?;
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    Ok(())
}

/// In the child, after a change of user (which would reset it, prctl(2)): SIGKILL when the shim ends.
fn die_with(shim: u32) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // It may have ended before the call: then nobody would ever send the signal.
    if nix::unistd::getppid().as_raw() as u32 != shim {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

/// In the child: moves each descriptor to its number, without close-on-exec. By way of numbers far above, because a target may be
/// another's source.
fn place(fds: &[(i32, i32)]) -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // Whatever the shim itself was given without close-on-exec is not for them.
    // SAFETY: it changes a flag of descriptors and touches no memory.
    check(unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) })?;
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

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended(pub ExitStatus);

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.code(), self.0.signal()) {
            (Some(code), _) => write!(f, "exited with status {code}"),
            (_, Some(signal)) => write!(f, "was killed by signal {signal}"),
            _ => write!(f, "ended with {}", self.0),
        }
    }
}

/// A child of the shim. Whoever drops it leaves the process running.
#[derive(Debug)]
pub struct Child {
    id: ProcessId,
    pidfd: OwnedFd,
    leads: bool,
    waited_for: Arc<Mutex<bool>>,
    ended: watch::Receiver<Option<Ended>>,
}

impl Child {
    /// Takes charge of a child that was just started, and of waiting for it.
    fn adopt(pid: u32, leads: bool) -> Result<Self, LaunchError> {
        // It is our child and not yet waited for, so the pid cannot be anybody else's.
        let id = ProcessId::of(pid).and_then(|id| id.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let id = id.map_err(failed("read the child's start time"))?;
        let open = || pidfd_open(pid).and_then(|fd| fd.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let pidfd = open().map_err(failed("open the child's pidfd"))?;
        let waiter = open().map_err(failed("open the child's pidfd"))?;
        // SAFETY: an OwnedFd stays open, and the same, as long as the AsyncFd that owns it.
        let waiter =
            unsafe { AsyncFd::register(waiter) }.map_err(|error| failed("watch the child")(error.into_parts().1))?;
        let (end, ended) = watch::channel(None);
        let waited_for = Arc::new(Mutex::new(false));
        let mark = waited_for.clone();
        tokio::spawn(async move { end.send_replace(Some(wait(waiter, &mark).await)) });
        Ok(Self { id, pidfd, leads, waited_for, ended })
    }

    /// Its pid and start time.
    pub fn process(&self) -> ProcessId {
        self.id
    }

    /// Waits for its end, as long as it takes; any number of times.
    pub async fn exited(&self) -> Ended {
        let ended = self.ended.clone().wait_for(Option::is_some).await.map_or(None, |ended| *ended);
        match ended {
            Some(ended) => ended,
            // Only when the runtime shuts down.
            None => std::future::pending().await,
        }
    }

    /// Sends SIGKILL, also to those of its group if it leads one. A leader that has ended by itself may have meant to leave others behind: they
    /// are left alone.
    pub fn kill(&self) {
        if !self.leads {
            return self.signal(libc::SIGKILL);
        }
        // Held until the signal is sent: only while nobody has waited for the leader can its number not be another group's.
        let waited_for = self.waited_for.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !*waited_for && let Err(error) = killpg(Pid::from_raw(self.id.pid as i32), Signal::SIGKILL) {
            tracing::error!(pid = self.id.pid, %error, "its group cannot be killed");
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => tracing::error!(pid = self.id.pid, signal, %error, "cannot be signalled"),
        }
    }
}

/// The only wait for this child in the process.
async fn wait(pidfd: AsyncFd<OwnedFd>, waited_for: &Mutex<bool>) -> Ended {
    // Readable means that it has ended (pidfd_open(2)). An error here would be one of epoll: then waiting below says what it is.
    let _ = pidfd.readable().await;
    let mut waited_for = waited_for.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    *waited_for = true;
    let raw = match waitid(Id::PIDFd(std::os::fd::AsFd::as_fd(pidfd.get_ref())), WaitPidFlag::WEXITED) {
        Ok(WaitStatus::Exited(_, code)) => code << 8,
        Ok(WaitStatus::Signaled(_, signal, _)) => signal as i32,
        Ok(other) => {
            tracing::error!(?other, "a wait for an exit returned something else");
            0
        }
        Err(errno) => {
            tracing::error!(%errno, "a child could not be waited for");
            0
        }
    };
    Ended(ExitStatus::from_raw(raw))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::unix::net::UnixStream;

    fn shell(script: &str, output: &File, fds: Vec<(OwnedFd, i32)>, user: Option<(u32, u32)>) -> Child {
        launch(script, output, fds, user, false)
    }

    fn launch(script: &str, output: &File, fds: Vec<(OwnedFd, i32)>, user: Option<(u32, u32)>, leads: bool) -> Child {
        let args = ["-c".into(), script.into()].to_vec();
        // Not sh: dash has no redirection to descriptors of two digits.
        Launch {
            program: "/bin/bash".into(),
            args,
            env: Vec::new(),
            fds,
            user,
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
    async fn descriptors_arrive_at_their_numbers_and_no_others() {
        let output = tempfile::tempfile().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (other, crossed) = UnixStream::pair().unwrap();
        // Each at the number that the other has here.
        let numbers = (theirs.as_raw_fd(), crossed.as_raw_fd());
        let fds = vec![(theirs.into(), numbers.1), (crossed.into(), numbers.0)];
        let script = format!("echo a >&{}; echo b >&{}; ls /proc/self/fd | wc -l", numbers.1, numbers.0);
        let child = shell(&script, &output, fds, None);
        assert_eq!(child.exited().await.to_string(), "exited with status 0");
        for (mut end, expected) in [(ours, "a\n"), (other, "b\n")] {
            let mut text = String::new();
            end.read_to_string(&mut text).unwrap();
            assert_eq!(text, expected);
        }
        // Standard streams, the two, and the one that ls itself has open.
        assert_eq!(written(output).trim(), "6");
    }

    #[tokio::test]
    async fn the_end_is_told_as_it_was() {
        let output = tempfile::tempfile().unwrap();
        let child = shell("exit 7", &output, Vec::new(), None);
        assert_eq!(child.exited().await.to_string(), "exited with status 7");
        let child = shell("sleep 60", &output, Vec::new(), None);
        child.kill();
        assert_eq!(child.exited().await.to_string(), "was killed by signal 9");
        assert_eq!(child.exited().await.to_string(), "was killed by signal 9", "and again");
        child.kill();
    }

    /// Starts a shell that starts another program and does `then`; the other one's id and a handle on it.
    fn with_another(then: &str, leads: bool) -> (Child, ProcessId, OwnedFd) {
        let output = tempfile::tempfile().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let script = format!("sleep 60 & echo $! >&{FIRST_FD}; {then}");
        let child = launch(&script, &output, vec![(theirs.into(), FIRST_FD)], None, leads);
        let mut pid = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(&mut ours), &mut pid).unwrap();
        let other = ProcessId::of(pid.trim().parse().unwrap()).unwrap().unwrap();
        (child, other, other.pidfd().unwrap().unwrap())
    }

    #[tokio::test]
    async fn a_leader_is_killed_with_its_group_and_only_as_long_as_it_is_there() {
        let second = std::time::Duration::from_secs(1);
        let cases = [("wait", true, true), ("wait", false, false), ("exit 0", true, false)];
        for (then, leads, dies) in cases {
            let (child, other, handle) = with_another(then, leads);
            if then != "wait" {
                child.exited().await;
            }
            child.kill();
            child.exited().await;
            // Its own signal would have been sent by now, if it was sent at all.
            let within = if dies { 10 * second } else { second / 10 };
            assert_eq!(crate::host::process::wait_dead(&handle, within).unwrap(), dies, "{then} {leads}");
            other.kill(10 * second).unwrap();
        }
    }

    #[tokio::test]
    async fn another_user_has_no_privileges_left_and_still_dies_with_us() {
        let output = tempfile::tempfile().unwrap();
        let script = "grep -E '^(Uid|Gid|Groups|CapEff)' /proc/self/status";
        let child = shell(script, &output, Vec::new(), Some((65534, 65533)));
        child.exited().await;
        let text = written(output);
        let fields: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(fields[..5], ["Uid:", "65534", "65534", "65534", "65534"], "{text}");
        assert!(text.contains("Gid:\t65533"), "{text}");
        assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        let output = tempfile::tempfile().unwrap();
        let launch = Launch {
            program: "/nonexistent/program".into(),
            args: Vec::new(),
            env: Vec::new(),
            fds: Vec::new(),
            user: None,
            output,
            cgroups: Vec::new(),
            leads: false,
        };
        assert_eq!(launch.spawn().unwrap_err().to_string(), "start: No such file or directory (os error 2)");
    }
}
