//! A running VM with all that belongs to it: the machine, the share's virtiofsd, the vsock device, the console, and the guest
//! that answered. Boots it, notices its death, and ends it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_shim_protos::api::ShutdownRequest;
use husk_protos::extras::SUPERVISOR_GRACE;
use husk_protos::system::Hello;
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::context::with_duration;

use crate::config::workspace::Workspace;
use crate::console::{Attached, Words};
use crate::guest::client::Guest;
use crate::guest::link;
use crate::guest::link::{Carrier, Link};
use crate::guest::report;
use crate::guest::report::{Heard, Listening};
use crate::host::child::Child;
use crate::host::process::ProcessId;
use crate::metadata;
use crate::metadata::token::Identity;
use crate::state::journal::Journal;
use crate::state::life::VmState;
use crate::state::{Boot, Machine as Facts, Owner, StateError, Step};
use crate::vm::cgroup::{CgroupError, Hierarchies};
use crate::vm::virtiofsd;
use crate::vmm::{Machine, Sockets, Spec, Vmm};

/// How long QEMU may take to end by itself, when the guest does not answer, and after it was killed.
const EXIT: Duration = Duration::from_secs(3);
/// How long a guest that has stopped everything is kept for what is still on its way from it.
pub const DELIVERED: Duration = Duration::from_millis(500);
/// How long the machine's end may be noticed after its sockets'.
const MACHINE_BEHIND: Duration = Duration::from_millis(200);
/// The same for the guest's connection, which ends when QEMU begins to: on a host under load it takes a while to give its memory back.
const MACHINE_FAR_BEHIND: Duration = Duration::from_millis(600);
/// How long a VM's death may be noticed after the loss of a call: the machine's end, and its last words, are waited for.
const DEATH_BEHIND: Duration = Duration::from_secs(2);
/// Lines of the console that explain an end.
const CONSOLE_LINES: usize = 24;
/// How long the console's last words may take to arrive when the machine has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What a VM is booted from.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The machine.
    pub spec: Spec,
    /// What carries its vsock.
    pub carrier: Carrier,
    /// virtiofsd's program.
    pub virtiofsd: PathBuf,
    /// The folder that the guest sees.
    pub share: PathBuf,
    /// From QEMU's start to the guest's hello.
    pub boot_timeout: Duration,
    /// For one call to the guest.
    pub call_timeout: Duration,
    /// How often the guest tells that it turns.
    pub heartbeat: Duration,
    /// The least severe level that the guest's init logs at.
    pub guest_level: tracing::Level,
    /// The guest is in debug mode: it serves processes in the VM itself.
    pub debug: bool,
    /// The guest has a supervisor agent, which has time of its own to end.
    pub supervisor: bool,
    /// The cgroup that the VM's processes live in, as the OCI runtime spec writes it; their parent's if none.
    pub cgroup: Option<String>,
    /// How the metadata service signs its tokens.
    pub tokens: crate::config::settings::TokenSettings,
    /// What it tells of the workspace.
    pub workspace: Option<Workspace>,
}

/// Why a VM did not come up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine's process.
    #[error("{0}")]
    Machine(#[from] crate::vmm::Error),
    /// The disk for extras.
    #[error("{0}")]
    Extras(#[from] crate::extras::disk::DiskError),
    /// The share's process.
    #[error("{0}")]
    Virtiofsd(#[from] virtiofsd::VirtiofsdError),
    /// The way to the guest.
    #[error("{0}")]
    Link(#[from] link::Error),
    /// The metadata service.
    #[error("{0}")]
    Metadata(#[from] metadata::Error),
    /// The cgroup.
    #[error("{0}")]
    Cgroup(#[from] CgroupError),
    /// The journal.
    #[error("{0}")]
    State(#[from] StateError),
    /// A file or socket of the VM.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The VM ended before it was ready.
    #[error("the VM ended while it booted: {cause}{}", lines("its console's last lines", console))]
    Ended {
        /// Which part ended, and how.
        cause: String,
        /// The console's last lines.
        console: String,
    },
    /// The VM did not get ready in time.
    #[error("the VM was not ready after {} ms{}", deadline.as_millis(), lines("its console's last lines", console))]
    Deadline {
        /// How long it was waited for.
        deadline: Duration,
        /// The console's last lines.
        console: String,
    },
    /// Its first words were not understood.
    #[error("the guest's hello: {0}")]
    Hello(#[from] husk_protos::frame::Error),
    /// It said hello, but could not be called.
    #[error("{0}")]
    Guest(#[from] crate::guest::client::Error),
}

impl Error {
    /// What it was, without the console.
    pub fn cause(&self) -> String {
        match self {
            Self::Ended { cause, .. } => cause.clone(),
            Self::Deadline { deadline, .. } => format!("it was not ready after {} ms", deadline.as_millis()),
            other => other.to_string(),
        }
    }
}

fn lines(title: &str, text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("; {title}:\n{text}") }
}

/// A VM that was killed, and yet is there.
#[derive(Debug, thiserror::Error)]
#[error("a process of the VM is still there {} ms after its end", EXIT.as_millis())]
pub struct StillThere;

/// A VM whose guest is ready, until it dies.
pub struct Vm {
    /// The guest's services.
    pub guest: Arc<Guest>,
    /// The guest's first words.
    pub hello: Hello,
    /// It is in debug mode.
    pub debug: bool,
    machine: Arc<dyn Machine>,
    share: Arc<Child>,
    share_workers: Vec<ProcessId>,
    console: Attached,
    heard: Arc<Heard>,
    /// For the answer to the guest's shutdown.
    shutdown_timeout: Duration,
    stopping: AtomicBool,
    /// Why it has to end, as soon as somebody says so.
    condemned: watch::Sender<Option<String>>,
    dead: watch::Receiver<Option<String>>,
}

impl Vm {
    /// Boots a VM. On an error its processes have been killed; what the journal records is for the caller to undo. What the VM becomes with that,
    /// running or not, is for the caller to say.
    /// What it reaches is noted in `reached`.
    pub async fn boot(
        vmm: &dyn Vmm,
        plan: &Plan,
        journal: &Journal,
        words: &Words,
        reached: &mut Boot,
    ) -> Result<Arc<Self>, Error> {
        let io = |what| move |source| Error::Io { what, source };
        journal.set_vm_state_unsaved(VmState::Provisioning, "a container needs it")?;
        let link::Made { link, mut ready, qemus: vsock } = link::make(plan.carrier, journal).await?;
        let identity = identity(journal, link.cid())?;
        metadata::provide(&link, identity, &plan.tokens, plan.workspace.as_ref(), journal.dir())?;
        let mut spec = plan.spec.clone();
        if let Link::Kernel(cid) = link {
            spec.kernel_cid = Some(cid);
        }
        spec.kernel_params.extend(ready.parameter());
        let (console_ours, console_theirs) =
            std::os::unix::net::UnixStream::pair().map_err(io("make a socket pair for the console"))?;
        console_ours.set_nonblocking(true).map_err(io("make the console non-blocking"))?;
        let console = words.console.attach(UnixStream::from_std(console_ours).map_err(io("register the console"))?);

        let cgroups = join_later(plan, journal)?;
        let (share_listener, share_socket) = virtiofsd::socket(journal.dir())?;
        let log = open_log(&journal.dir().join("qemu.log")).map_err(io("open qemu.log"))?;
        let sockets = Sockets { vsock, share: Some(share_socket), console: console_theirs.into(), log };
        let (vcpus, memory_mib, accel) = (plan.spec.vcpus, plan.spec.memory_mib, plan.spec.accel);
        let configured = format!("ready to be started with vcpus={vcpus} memory_mib={memory_mib} accel={accel:?}");
        journal.set_vm_state_unsaved(VmState::Configured, &configured)?;
        reached.reached("configured");
        let machine: Arc<dyn Machine> = vmm.start(&spec, sockets).await?.into();
        let kill_machine = Otherwise::new({
            let machine = machine.clone();
            move || machine.kill()
        });
        reached.reached("QEMU started");
        // Written with the process, and what it went through with it: a boot waits for each write.
        journal.with(|state| {
            state.set_machine(Facts::of(&spec, machine.process(), link.cid(), plan.debug));
            Ok(())
        })?;
        journal.set_vm_state_unsaved(VmState::Starting, &format!("QEMU runs as process {}", machine.process().pid))?;
        journal.record(&Owner::Sandbox, [Step::Process { id: machine.process(), name: "qemu".into() }])?;

        // Second, because it is ready much sooner; and it waits for its cgroup, which takes a grace period of the host's kernel, while QEMU
        // starts. QEMU follows it there without waiting, before the guest has any memory.
        let log = open_log(&journal.dir().join("virtiofsd.log")).map_err(io("open virtiofsd.log"))?;
        let again = cgroups.iter().map(File::try_clone).collect::<std::io::Result<_>>();
        let again = again.map_err(io("duplicate a descriptor"))?;
        let share = virtiofsd::start(&plan.virtiofsd, &plan.share, share_listener, log, again)?;
        let share = Arc::new(share);
        reached.reached("virtiofsd started");
        let kill_share = Otherwise::new({
            let share = share.clone();
            move || share.kill()
        });
        journal.record(&Owner::Sandbox, [Step::Process { id: share.process(), name: "virtiofsd".into() }])?;
        for mut procs in cgroups {
            match procs.write_all(machine.process().pid.to_string().as_bytes()) {
                // It has ended already: what it died of is told below.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                moved => moved.map_err(io("move QEMU to its cgroup"))?,
            }
        }

        let hello = async {
            let mut stream = ready.accept().await.map_err(link::Error::from)?;
            let hello: Hello = husk_protos::frame::read(&mut stream).await?;
            Ok::<_, Error>((stream, hello))
        };
        let ended = |cause: String| async {
            let cause = console.explain(cause, LAST_WORDS).await;
            let mut last = console.tail(CONSOLE_LINES);
            for log in ["qemu.log", "virtiofsd.log"] {
                if let Ok(words) = std::fs::read_to_string(journal.dir().join(log)) {
                    last = format!("{last}\n{}", words.trim()).trim().to_owned();
                }
            }
            Error::Ended { cause, console: last }
        };
        // A virtiofsd that fails takes the machine with it; one that the machine has let go of ends well.
        let with_share = |cause: String| async {
            match tokio::time::timeout(MACHINE_BEHIND, share.exited()).await {
                Ok(exit) if !exit.0.success() => format!("{cause}; virtiofsd {exit}"),
                _ => cause,
            }
        };
        let (stream, hello) = tokio::select! {
            hello = hello => match hello {
                Ok(hello) => hello,
                // The connection goes with the machine, whose end says more.
                Err(error) => match tokio::time::timeout(MACHINE_BEHIND, machine.exited()).await {
                    Ok(cause) => return Err(ended(with_share(cause).await).await),
                    Err(_) => return Err(error),
                },
            },
            cause = machine.exited() => return Err(ended(with_share(cause).await).await),
            exit = share.exited() => {
                let cause = match tokio::time::timeout(MACHINE_BEHIND, machine.exited()).await {
                    Ok(cause) => with_share(cause).await,
                    Err(_) => format!("virtiofsd {exit}"),
                };
                return Err(ended(cause).await);
            }
            () = tokio::time::sleep(plan.boot_timeout) => {
                return Err(Error::Deadline { deadline: plan.boot_timeout, console: console.tail(CONSOLE_LINES) });
            }
        };
        reached.heard(&hello);
        // virtiofsd serves from a child that is the first process of its own namespace, and does not die with it. It has answered the guest by now,
        // so the child is there.
        let workers = share.process().children().map_err(io("list virtiofsd's children"))?;
        let step = |id: &ProcessId| Step::Process { id: *id, name: "virtiofsd's worker".into() };
        journal.record(&Owner::Sandbox, workers.iter().map(step))?;
        let heard = Arc::new(Heard::new(plan.heartbeat));
        let listening =
            Listening { level: plan.guest_level, file: words.init.clone(), recent: journal.recent().clone() };
        let guest = Arc::new(Guest::connect(link, &hello, plan.call_timeout).await?);
        reached.reached("guest connected");

        let (death, dead) = watch::channel(None);
        let (condemned, sentence) = watch::channel(None);
        kill_machine.succeeded();
        kill_share.succeeded();
        let vm = Arc::new(Self {
            guest,
            hello,
            debug: plan.debug,
            machine: machine.clone(),
            share: share.clone(),
            share_workers: workers,
            console,
            heard,
            shutdown_timeout: plan.call_timeout + if plan.supervisor { SUPERVISOR_GRACE } else { Duration::ZERO },
            stopping: AtomicBool::new(false),
            condemned,
            dead,
        });
        let heard = vm.heard.clone();
        let deaf = async move { report::listen(stream, listening, &heard).await };
        tokio::spawn(watch_death(machine, share, vm.console.clone(), deaf, sentence, death));
        Ok(vm)
    }

    /// Resolves when the VM is dead, with the cause. May be called any number of times.
    pub async fn died(&self) -> String {
        match self.dead.clone().wait_for(Option::is_some).await {
            Ok(cause) => cause.clone().unwrap_or_default(),
            Err(_) => "nobody watches it any more".to_owned(),
        }
    }

    /// What it has died of, if it has, for whoever has lost a call to it: that may be noticed a moment sooner.
    pub async fn died_under_call(&self) -> Option<String> {
        tokio::time::timeout(DEATH_BEHIND, self.died()).await.ok()
    }

    /// Has it killed, with this cause unless it is dying of another one.
    pub fn condemn(&self, cause: String) {
        self.condemned.send_replace(Some(cause));
    }

    /// Why it is dead, if it is.
    pub fn cause_of_death(&self) -> Option<String> {
        self.dead.borrow().clone()
    }

    /// Whether its end was asked for.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// What has been heard of the guest: its health, its supervisor.
    pub fn heard(&self) -> &Heard {
        &self.heard
    }

    /// The console's last lines.
    pub fn console_tail(&self) -> String {
        self.console.tail(CONSOLE_LINES)
    }

    /// Ends the VM: asks the guest, and kills it if it does not go. What its last processes wrote, and how they ended, may still be on its way
    /// when the guest has answered: `delivered` resolves when that has come, and is waited for a moment.
    ///
    /// # Errors
    ///
    /// When it cannot be killed.
    pub async fn stop(&self, delivered: impl Future<Output = ()>) -> Result<(), StillThere> {
        self.stopping.store(true, Ordering::Relaxed);
        if self.cause_of_death().is_none() {
            let request = ShutdownRequest { now: true, ..Default::default() };
            // With its answer the guest has stopped everything and written back what there was: what it would still do takes longer than
            // to end it.
            match self.guest.task.shutdown(with_duration(self.shutdown_timeout), &request).await {
                Ok(_) => tokio::select! {
                    _ = tokio::time::timeout(DELIVERED, delivered) => {}
                    _ = self.machine.exited() => {}
                },
                Err(error) => {
                    tracing::debug!(%error, "no answer to the guest's shutdown");
                    if tokio::time::timeout(EXIT, self.machine.exited()).await.is_err() {
                        tracing::warn!(
                            deadline_ms = EXIT.as_millis() as u64,
                            "the VM did not end by itself and is killed"
                        );
                    }
                }
            }
        }
        self.machine.kill();
        // virtiofsd would end by itself, some time after the machine has let go of it; ends with its worker at once.
        for worker in &self.share_workers {
            if let Err(error) = worker.send_kill() {
                tracing::warn!(pid = worker.pid, %error, "virtiofsd's worker cannot be killed");
            }
        }
        let gone = async { tokio::join!(self.machine.exited(), self.share.exited()) };
        if tokio::time::timeout(EXIT, gone).await.is_err() {
            self.share.kill();
            return Err(StillThere);
        }
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.machine.kill();
    }
}

/// Who the VM is that this journal is of.
fn identity(journal: &Journal, cid: u32) -> Result<Identity, StateError> {
    journal.with(|state| {
        Ok(Identity { namespace: state.namespace().to_owned(), sandbox: state.sandbox().to_owned(), cid })
    })
}

fn open_log(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// The files by which the VM's processes enter their cgroup, which is made if need be.
fn join_later(plan: &Plan, journal: &Journal) -> Result<Vec<File>, Error> {
    let Some(path) = &plan.cgroup else { return Ok(Vec::new()) };
    let cgroup = Hierarchies::of_host()?.create(&mut |steps| journal.record(&Owner::Sandbox, steps), path)?;
    let open = |path: &PathBuf| OpenOptions::new().write(true).open(path);
    let opened = cgroup.procs_files().iter().map(open).collect::<std::io::Result<_>>();
    opened.map_err(|source| Error::Io { what: "open cgroup.procs of the VM's cgroup", source })
}

/// When a part of the VM has ended, the end of the machine may be what explains it, and only be noticed a moment later.
async fn cause_of(machine: &dyn Machine, within: Duration, otherwise: String) -> String {
    tokio::time::timeout(within, machine.exited()).await.unwrap_or(otherwise)
}

async fn condemned(sentence: &mut watch::Receiver<Option<String>>) -> String {
    // None: the VM's handle is gone, and with that the machine is killed.
    let cause = sentence.wait_for(Option::is_some).await.map_or(None, |cause| cause.clone());
    match cause {
        Some(cause) => cause,
        None => std::future::pending().await,
    }
}

/// A part of the VM dies with the whole, and the whole with each part. `deaf` tells why the guest cannot be heard any more.
async fn watch_death(
    machine: Arc<dyn Machine>,
    share: Arc<Child>,
    console: Attached,
    deaf: impl Future<Output = String>,
    mut sentence: watch::Receiver<Option<String>>,
    death: watch::Sender<Option<String>>,
) {
    let cause = tokio::select! {
        cause = machine.exited() => cause,
        exit = share.exited() => cause_of(&*machine, MACHINE_BEHIND, format!("virtiofsd {exit}")).await,
        cause = deaf => cause_of(&*machine, MACHINE_FAR_BEHIND, cause).await,
        cause = condemned(&mut sentence) => cause_of(&*machine, MACHINE_BEHIND, cause).await,
    };
    let exited = tokio::time::timeout(Duration::ZERO, machine.exited()).await.is_ok();
    // virtiofsd follows by itself.
    machine.kill();
    // Of a machine that has ended by itself, the guest may say more.
    let cause = if exited { console.explain(cause, LAST_WORDS).await } else { cause };
    death.send_replace(Some(cause));
}

/// Something to be done unless the boot succeeds.
struct Otherwise<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Otherwise<F> {
    fn new(action: F) -> Self {
        Self(Some(action))
    }

    fn succeeded(mut self) {
        self.0 = None;
    }
}

impl<F: FnOnce()> Drop for Otherwise<F> {
    fn drop(&mut self) {
        if let Some(action) = self.0.take() {
            action();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::child::Launch;

    /// A process in the place of QEMU or virtiofsd.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            let launch = Launch {
                program: "/bin/sleep".into(),
                args: vec!["60".into()],
                env: Vec::new(),
                fds: Vec::new(),
                user: None,
                output: tempfile::tempfile().unwrap(),
                cgroups: Vec::new(),
                leads: true,
            };
            Self(launch.spawn().unwrap())
        }
    }

    #[async_trait::async_trait]
    impl Machine for Sleeper {
        fn process(&self) -> ProcessId {
            self.0.process()
        }

        async fn exited(&self) -> String {
            format!("the machine {}", self.0.exited().await)
        }

        fn kill(&self) {
            self.0.kill();
        }
    }

    #[tokio::test]
    async fn the_whole_dies_with_each_part_and_of_what_it_was_condemned_for() {
        let cases = ["machine", "share", "connection", "condemned"];
        for case in cases {
            let (machine, share) = (Arc::new(Sleeper::start()), Arc::new(Sleeper::start().0));
            let (lose, lost) = tokio::sync::oneshot::channel::<()>();
            let deaf = async {
                let _ = lost.await;
                "the guest's connection was lost".to_owned()
            };
            let ((condemned, sentence), (death, dead)) = (watch::channel(None), watch::channel(None));
            let folder = tempfile::tempdir().unwrap();
            let console = crate::console::Console::new(folder.path()).attach(UnixStream::pair().unwrap().0);
            let watching = tokio::spawn(watch_death(machine.clone(), share.clone(), console, deaf, sentence, death));
            let wanted = match case {
                "machine" => {
                    machine.kill();
                    "the machine was killed by signal 9"
                }
                "share" => {
                    share.kill();
                    "virtiofsd was killed by signal 9"
                }
                "connection" => {
                    lose.send(()).unwrap();
                    "the guest's connection was lost"
                }
                _ => {
                    condemned.send_replace(Some("its events are lost".to_owned()));
                    "its events are lost"
                }
            };
            watching.await.unwrap();
            assert_eq!(dead.borrow().as_deref(), Some(wanted), "{case}");
            assert_eq!(machine.exited().await, "the machine was killed by signal 9");
            share.kill();
        }
    }
}
