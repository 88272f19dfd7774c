//! A private containerd: its `/run`, mounts and processes live in namespaces that end with it.
//!
//! The daemon runs in its own PID and network namespaces, and in a mount namespace whose `/run` is an empty tmpfs. Its
//! paths are therefore the usual ones but private, bridges and firewall rules do not reach the machine, and a test sees
//! the processes, mounts and network devices that a shim leaves behind, and no others. However the test ends, the kernel
//! then kills the daemon, its shims and their VMs, and drops their mounts and network devices.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use husk_protos::lock::lock;
use husk_shim::prepare::host::Places;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::artifacts::{Runtime, Version, built, repository};
use crate::cgroup;
use crate::command::{self, Output};
use crate::fifo;
use crate::netns;
use crate::process::{self, Process};

/// The containerd namespace of all tests.
pub const NAMESPACE: &str = "husk-test";
/// Deadline for a daemon to become ready.
const START: Duration = Duration::from_secs(60);
/// Deadline for one `ctr` call, on a loaded machine that emulates its VMs.
const CTR: Duration = Duration::from_secs(90);
/// Lines of the daemon's log kept for failure messages.
const LOG_LINES: usize = 2000;

const CONFIG: &str = r#"version = 2
root = "/run/containerd/root"
state = "/run/containerd/state"
disabled_plugins = [DISABLED]
[grpc]
address = "/run/containerd/containerd.sock"
"#;

/// What no test uses, and what only [`Setup::cri`] uses.
const DISABLED: &str = r#""io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt""#;
const DISABLED_WITHOUT_CRI: &str =
    r#", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime""#;

/// The fifo that makes process 1 restart containerd. Process 1 waits on it after containerd has exited; without the
/// fifo it exits too.
const RESTART_FIFO: &str = "/run/again";

/// Process 1 is a shell that reaps the processes orphaned by shims, as a machine's init does; containerd reaps only its
/// own children. `env` resets SIGINT and SIGQUIT, which a shell ignores in background jobs and containers would
/// inherit.
const ENTRYPOINT: &str = r#"set -e
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
ip link set lo up
touch /run/ready
mount --bind "$HUSK_TEST_READY" /run/ready
mkdir -p /run/containerd /run/lock
printf %s "$HUSK_TEST_CONFIG" > /run/containerd/config.toml
printf %s "$HUSK_TEST_HUSK" > "$HUSK_CONFIG"
unset HUSK_TEST_CONFIG HUSK_TEST_HUSK HUSK_TEST_READY
while :; do
  env --default-signal=INT,QUIT "$0" --log-level "${HUSK_TEST_LOG:-info}" -c /run/containerd/config.toml &
  wait $! || [ -p /run/again ] || exit 1
  [ -p /run/again ] || exit 0
  read -r leave </run/again
done"#;

/// A running daemon with the test image imported.
pub struct Containerd {
    version: Version,
    runtime: Runtime,
    bin: PathBuf,
    pid: i32,
    ready: UnixDatagram,
    token: String,
    image: String,
    next: AtomicU32,
    unpacked: OnceLock<Result<(), String>>,
    log: Arc<Mutex<VecDeque<String>>>,
    ended: Mutex<mpsc::Receiver<std::io::Result<ExitStatus>>>,
}

/// Additions to the environment of the daemon, which its shims inherit: husk's configuration is in the daemon's own /run.
pub const ENV: [(&str, &str); 1] = [("HUSK_CONFIG", "/run/containerd/husk.toml")];

/// A containerd whose shims read their own husk configuration.
pub struct Configured {
    /// The daemon.
    pub containerd: Containerd,
}

impl Configured {
    /// Starts a daemon; `config` is [`Setup::husk`].
    pub fn start(config: &str) -> Result<Self> {
        Ok(Self { containerd: Containerd::with(Setup { husk: config.to_owned(), ..Setup::default() })? })
    }
}

/// husk's configuration for tests: where there is no KVM, husk emulates the CPU only if it is told to.
pub fn husk_config(lines: &str) -> String {
    let emulate = !lines.contains("accel =") && !Places::of_process().kvm;
    format!("{}{lines}", if emulate { "accel = \"tcg\"\n" } else { "" })
}

/// Options of a daemon.
#[derive(Default)]
pub struct Setup {
    /// [`Version::default_for_tests`] by default.
    pub version: Option<Version>,
    /// [`Runtime::under_test`] by default.
    pub runtime: Option<Runtime>,
    /// Additional lines of containerd's configuration.
    pub config: String,
    /// husk's configuration. Unless it says otherwise, VMs run on a host without KVM as well.
    pub husk: String,
    /// Whether containerd serves Kubernetes' Container Runtime Interface.
    pub cri: bool,
}

impl Containerd {
    /// Starts a daemon of the given version for the runtime under test.
    pub fn start(version: Version) -> Result<Self> {
        Self::with(Setup { version: Some(version), ..Setup::default() })
    }

    /// The daemon shared by the tests of one binary; it ends with the process.
    pub fn shared() -> Result<&'static Self> {
        Self::shared_of(Version::default_for_tests())
    }

    /// The shared daemon of this version.
    pub fn shared_of(version: Version) -> Result<&'static Self> {
        const COUNT: usize = Version::ALL.len();
        static SHARED: [OnceLock<Result<Containerd, String>>; COUNT] = [const { OnceLock::new() }; COUNT];
        let shared = SHARED[version as usize].get_or_init(|| Self::start(version).map_err(|e| format!("{e:?}")));
        shared.as_ref().map_err(|e| anyhow!("{e}"))
    }

    /// Starts a daemon with these options.
    pub fn with(setup: Setup) -> Result<Self> {
        static DAEMONS: AtomicU32 = AtomicU32::new(0);
        let version = setup.version.unwrap_or_else(Version::default_for_tests);
        let runtime = setup.runtime.unwrap_or_else(Runtime::under_test);
        let token = format!("{}x{}", std::process::id(), DAEMONS.fetch_add(1, Ordering::Relaxed));
        let bin = version.bin()?;
        let tarball = built("images/busybox.tar")?;
        if runtime == Runtime::Husk {
            built(runtime.shim())?;
        }

        let disabled = format!("{DISABLED}{}", if setup.cri { "" } else { DISABLED_WITHOUT_CRI });
        // An abstract address would be unknown in the daemon's network namespace.
        let folder = tempfile::tempdir().context("create the folder of the readiness socket")?;
        let address = folder.path().join("ready");
        let ready = UnixDatagram::bind(&address).context("bind the readiness socket")?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--net", "--fork", "--kill-child=KILL", "--propagation", "slave"]);
        command.arg("--mount-proc").args(["sh", "-c", ENTRYPOINT]).arg(bin.join("containerd"));
        command
            .env("PATH", search_path(&bin))
            .env("NOTIFY_SOCKET", "/run/ready")
            .env("HUSK_TEST_READY", &address)
            .env("HUSK_TEST_CONFIG", CONFIG.replace("DISABLED", &disabled) + &setup.config)
            .env("HUSK_TEST_HUSK", husk_config(&setup.husk));
        command.envs(ENV);

        let log = Arc::new(Mutex::new(VecDeque::new()));
        let (pid, ended) = spawn_daemon(command, log.clone())?;
        let mut daemon = Self {
            version,
            runtime,
            bin,
            pid,
            ready,
            token,
            image: String::new(),
            next: AtomicU32::new(0),
            unpacked: OnceLock::new(),
            log,
            ended: Mutex::new(ended),
        };
        daemon.ready.set_read_timeout(Some(Duration::from_millis(200)))?;
        daemon.await_ready().with_context(|| daemon.log_tail())?;
        // From here on, process 1 of the namespace instead of `unshare`.
        daemon.pid = daemon.child().context("unshare has no child process")?.pid;
        daemon.image = daemon.import(&tarball).with_context(|| daemon.log_tail())?;
        Ok(daemon)
    }

    /// Blocks until the daemon is ready. Fails if it exits or the deadline expires.
    fn await_ready(&self) -> Result<()> {
        let mut message = [0; 256];
        command::wait_for(START, "containerd reports readiness", || match self.ready.recv(&mut message) {
            Ok(length) if message[..length].starts_with(b"READY=1") => Some(Ok(())),
            _ => Process::read(self.pid).is_none_or(|p| p.zombie).then(|| bail!("containerd has exited")),
        })?
    }

    /// The only direct child of `pid`, which is `unshare` until process 1 is known.
    fn child(&self) -> Option<Process> {
        process::descendants(self.pid).into_iter().find(|process| process.parent == self.pid)
    }

    /// Sends containerd this signal and waits until it has exited. Its shims keep running.
    pub fn stop(&self, signal: Signal) -> Result<()> {
        let daemon = self.daemon()?;
        fifo::make(&self.path(RESTART_FIFO))?;
        kill(Pid::from_raw(daemon.pid), signal)?;
        command::wait_for(START, "containerd exits", || (!daemon.is_alive()).then_some(()))
    }

    /// Starts containerd again after [`Self::stop`] and waits until it is ready.
    pub fn restart(&self) -> Result<()> {
        let fifo = self.path(RESTART_FIFO);
        // Opening a fifo only for writing would block until the shell opens it: fifo(7).
        let mut writer = OpenOptions::new().read(true).write(true).open(&fifo)?;
        writer.write_all(b"\n")?;
        self.await_ready().with_context(|| self.log_tail())?;
        std::fs::remove_file(fifo)?;
        Ok(())
    }

    fn daemon(&self) -> Result<Process> {
        let program = self.bin.join("containerd").display().to_string();
        let ours = |process: &Process| process.parent == self.pid && process.command.starts_with(&program);
        process::descendants(self.pid).into_iter().find(ours).context("containerd is not running")
    }

    fn import(&self, tarball: &Path) -> Result<String> {
        self.ctr(["image", "import"]).arg(tarball.display()).ok()?;
        let images = self.ctr(["image", "ls", "-q"]).ok()?.text();
        Ok(images.lines().next().context("no image after the import")?.to_owned())
    }

    /// Mount point of the image, read-only, for callers that build their own overlay.
    pub fn unpacked_image(&self) -> Result<&'static str> {
        const FOLDER: &str = "/run/image";
        let mount = || {
            std::fs::create_dir_all(self.path(FOLDER))?;
            self.ctr(["image", "mount", &self.image, FOLDER]).ok().map(drop)
        };
        let unpacked = self.unpacked.get_or_init(|| mount().map_err(|e| format!("{e:?}")));
        unpacked.as_ref().map(|()| FOLDER).map_err(|e| anyhow!("{e}"))
    }

    /// Release line of the daemon.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The runtime of its containers.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// Name of the imported busybox image.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Process 1 of the daemon's PID namespace, as the test sees it: the ancestor of everything that the daemon and its
    /// shims start.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A part of every container id of this daemon, unique to it.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// PATH of the daemon and its shims: husk's programs, then this containerd's with its runc, then `mkfs.erofs`, then the machine's.
    pub fn search_path(&self) -> String {
        search_path(&self.bin)
    }

    /// Directory of the daemon's programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The shim process that serves `id`, and its descendants.
    pub fn shim_of(&self, id: &str) -> Result<(Process, Vec<Process>)> {
        let ours = |process: &Process| process.name.starts_with("containerd-shim") && process.command.contains(id);
        let shim = process::descendants(self.pid).into_iter().find(ours);
        let shim = shim.with_context(|| format!("no shim has {id} in its command line"))?;
        Ok((shim.clone(), process::descendants(shim.pid)))
    }

    /// The descendant of the shim that serves `id` whose name starts with `name`; its own child if there are several.
    pub fn shim_child(&self, id: &str, name: &str) -> Result<Process> {
        let (shim, below) = self.shim_of(id)?;
        let mut found: Vec<_> = below.iter().filter(|process| process.name.starts_with(name)).collect();
        found.sort_by_key(|process| process.parent != shim.pid);
        found.first().map(|process| (*process).clone()).with_context(|| format!("the shim has no {name}: {below:#?}"))
    }

    /// QEMU of the shim that serves `id`.
    pub fn qemu_of(&self, id: &str) -> Result<Process> {
        self.shim_child(id, "qemu")
    }

    /// Socket of the shim that serves `id`, as the test reaches it.
    pub fn shim_socket(&self, id: &str) -> Result<PathBuf> {
        let bundle = self.path("/run/containerd/state/io.containerd.runtime.v2.task").join(NAMESPACE).join(id);
        let address = std::fs::read_to_string(bundle.join("address")).context("the bundle's `address`")?;
        Ok(self.path(address.strip_prefix("unix://").context("not a unix socket")?))
    }

    /// A unique container id.
    pub fn id(&self, name: &str) -> String {
        format!("{name}-{}-{}", self.token, self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The path by which the test reaches the daemon's `path`.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        PathBuf::from(format!("/proc/{}/root", self.pid)).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A command that runs in the daemon's mount, PID and network namespaces.
    pub fn enter(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--mount", "--pid", "--net", "--"]).arg(program.as_ref());
        command.envs(ENV);
        command
    }

    /// Runs `work` in the daemon's network namespace, where the ports of host programs are.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        netns::within(&PathBuf::from(format!("/proc/{}/ns/net", self.pid)), work)
    }

    /// Runs a shell command in the daemon's namespaces.
    pub fn sh(&self, script: &str) -> Result<Output> {
        let mut command = self.enter("sh");
        command.args(["-c", script]);
        command::run(command, None, CTR)?.ok()
    }

    /// A `ctr` call, to be completed by the caller.
    pub fn ctr<'a>(&'a self, args: impl IntoIterator<Item = &'a str>) -> Ctr<'a> {
        let args = args.into_iter().map(str::to_owned).collect();
        Ctr { containerd: self, args, stdin: None, deadline: CTR }
    }

    /// `ctr run --rm` with the runtime and the image under test.
    pub fn run<'a>(&'a self, flags: &[&str], id: &str, args: &[&str]) -> Ctr<'a> {
        let ctr = self.ctr(["run", "--rm", "--runtime", self.runtime.name()]);
        ctr.args(flags).args([&self.image, id]).args(args)
    }

    /// Runs a shell script in its own container and returns its output.
    pub fn script(&self, flags: &[&str], name: &str, script: &str) -> Result<String> {
        Ok(self.run(flags, &self.id(name), &["sh", "-c", script]).ok()?.text())
    }

    /// `ctr run --detach`. The container is killed and removed on drop.
    pub fn detached(&self, flags: &[&str], name: &str, args: &[&str]) -> Result<Container<'_>> {
        self.detached_with(self.runtime, flags, name, args)
    }

    /// Like [`Self::detached`], with another runtime.
    pub fn detached_with(&self, runtime: Runtime, flags: &[&str], name: &str, args: &[&str]) -> Result<Container<'_>> {
        let container = Container { containerd: self, id: self.id(name) };
        let ctr = self.ctr(["run", "--detach", "--runtime", runtime.name()]);
        ctr.args(flags).args([&self.image, container.id()]).args(args).ok()?;
        Ok(container)
    }

    /// A container that the test creates itself. It is killed and removed on drop.
    pub fn adopt(&self, id: &str) -> Container<'_> {
        Container { containerd: self, id: id.to_owned() }
    }

    /// The last lines of the daemon's log, which include the shims' lines.
    pub fn log_tail(&self) -> String {
        let log = lock(&self.log);
        let lines: Vec<_> = log.iter().skip(log.len().saturating_sub(40)).cloned().collect();
        format!("containerd {}: end of the log:\n{}", self.version.name(), lines.join("\n"))
    }

    /// Lines of the daemon's log that contain `needle`.
    pub fn logged(&self, needle: &str) -> Vec<String> {
        lock(&self.log).iter().filter(|line| line.contains(needle)).cloned().collect()
    }

    /// Waits until at least `count` lines contain `needle`, and returns them: a shim's line takes a moment to arrive.
    pub fn await_logged(&self, needle: &str, count: usize) -> Result<Vec<String>> {
        let found = || Some(self.logged(needle)).filter(|lines| lines.len() >= count);
        command::wait_for(START, needle, found).with_context(|| self.log_tail())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The kernel kills the rest of the PID namespace with its process 1.
        if let Some(process) = Process::read(self.pid) {
            process.kill();
        }
        let ended = lock(&self.ended);
        if ended.recv_timeout(START).is_err() && !thread::panicking() {
            panic!("containerd did not exit within {START:?} of SIGKILL");
        }
        cgroup::remove(&self.token);
    }
}

/// Spawns the daemon from a thread that lives as long as the daemon: the parent-death signal follows the thread that
/// forked, not the process (prctl(2)).
fn spawn_daemon(
    mut command: Command,
    log: Arc<Mutex<VecDeque<String>>>,
) -> Result<(i32, mpsc::Receiver<std::io::Result<ExitStatus>>)> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: prctl(2) is async-signal-safe and touches nothing of the parent's memory.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
    let (started, start) = mpsc::channel();
    let (done, ended) = mpsc::channel();
    thread::spawn(move || {
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(e) => return drop(started.send(Err(e))),
        };
        let stderr = child.stderr.take();
        drop(started.send(Ok(child.id() as i32)));
        for line in stderr.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok) {
            let mut log = lock(&log);
            log.push_back(line);
            if log.len() > LOG_LINES {
                log.pop_front();
            }
        }
        drop(done.send(child.wait()));
    });
    let pid = start.recv().context("the daemon's thread has exited")?.context("start unshare")?;
    Ok((pid, ended))
}

/// A `ctr` call under construction.
pub struct Ctr<'a> {
    containerd: &'a Containerd,
    args: Vec<String>,
    stdin: Option<Vec<u8>>,
    deadline: Duration,
}

impl Ctr<'_> {
    /// Adds an argument.
    pub fn arg(mut self, arg: impl ToString) -> Self {
        self.args.push(arg.to_string());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets stdin, which is /dev/null by default.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Replaces the default deadline.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The call as a command, for callers that don't wait for its exit.
    pub fn command(&self) -> Command {
        let mut command = self.containerd.enter(self.containerd.bin.join("ctr"));
        command.args(["--namespace", NAMESPACE]).args(&self.args);
        // Newer versions warn of the machine's cgroup v1, and tests look at the errors.
        command.env("CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS", "true");
        command
    }

    /// Runs the call until it exits, with any exit code.
    pub fn output(self) -> Result<Output> {
        let command = self.command();
        command::run(command, self.stdin, self.deadline).with_context(|| self.containerd.log_tail())
    }

    /// Runs the call and expects exit code 0.
    pub fn ok(self) -> Result<Output> {
        self.expect_code(0)
    }

    /// Runs the call and expects this exit code.
    pub fn expect_code(self, code: i32) -> Result<Output> {
        let containerd = self.containerd;
        self.output()?.expect_code(code).with_context(|| containerd.log_tail())
    }
}

/// A container in the background.
pub struct Container<'a> {
    containerd: &'a Containerd,
    id: String,
}

impl Container<'_> {
    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `ctr task exec` of a command in the container.
    pub fn exec(&self, args: &[&str]) -> Ctr<'_> {
        let id = self.containerd.id("exec");
        self.containerd.ctr(["task", "exec", "--exec-id"]).arg(id).arg(&self.id).args(args)
    }

    /// Runs a shell script in the container and returns its output.
    pub fn script(&self, script: &str) -> Result<String> {
        Ok(self.exec(&["sh", "-c", script]).ok()?.text())
    }

    /// `ctr task kill`.
    pub fn kill(&self, signal: &str) -> Result<Output> {
        self.containerd.ctr(["task", "kill", "--signal", signal, &self.id]).ok()
    }

    /// Kills the container with SIGKILL and waits until `ctr task ls` shows it as stopped.
    pub fn kill_and_wait(&self) -> Result<()> {
        self.kill("SIGKILL")?;
        self.await_status("STOPPED")
    }

    /// `ctr task rm`. Returns the exit status that it reports.
    pub fn delete_task(&self) -> Result<i32> {
        let deleted = self.containerd.ctr(["task", "rm", &self.id]).output()?;
        // Some versions exit with the status, others only print a warning.
        match (deleted.code(), deleted.errors().rsplit_once("non-zero exit code ")) {
            (0, Some((_, status))) => {
                let digits: String = status.chars().take_while(char::is_ascii_digit).collect();
                Ok(digits.parse()?)
            }
            (0, None) => Ok(0),
            (code, _) if deleted.errors().is_empty() => Ok(code),
            _ => bail!("{deleted}"),
        }
    }

    /// The status column of `ctr task ls`, or `None` without such a task.
    pub fn status(&self) -> Result<Option<String>> {
        let list = self.containerd.ctr(["task", "ls"]).ok()?.text();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(&self.id));
        Ok(line.and_then(|line| line.split_whitespace().nth(2)).map(str::to_owned))
    }

    /// Waits until `ctr task ls` shows this status.
    pub fn await_status(&self, status: &str) -> Result<()> {
        command::wait_for(CTR, &format!("task {} is {status}", self.id), || {
            self.status().map(|now| (now.as_deref() == Some(status)).then_some(())).transpose()
        })?
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Both fail if the test has already deleted the container.
        let _ = self.containerd.ctr(["task", "rm", "--force", &self.id]).deadline(Duration::from_secs(30)).output();
        let _ = self.containerd.ctr(["container", "rm", &self.id]).deadline(Duration::from_secs(30)).output();
    }
}

fn search_path(bin: &Path) -> String {
    let (out, erofs) = (repository().join("out"), repository().join(".cache/erofs"));
    let machine = std::env::var("PATH").unwrap_or_default();
    format!("{}:{}:{}:{machine}", out.display(), bin.display(), erofs.display())
}
