//! QEMU as the VMM: starts its process and keeps the reason why the guest ended.
//!
//! | file       | contents                                |
//! |------------|-----------------------------------------|
//! | `args.rs`  | the arguments (pure)                    |
//! | `board.rs` | the boards                              |
//! | `qmp.rs`   | QMP, QEMU's control protocol            |
//! | `syscalls.rs` | the system calls that QEMU may use   |
//! | `plug.rs`  | network cards of a running machine      |
//! | `disks.rs` | disks of a running machine              |
//! | `hotplug.rs` | what the two have in common           |
//! | `memory.rs` | more memory of a running machine       |
//! | `balloon.rs` | memory that the guest gives back      |

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use nix::sched::CloneFlags;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::host::child::{Child, FIRST_FD, LAST_FD, Launch};
use crate::host::jail::Jail;
use crate::host::jail::loader::Loader;
use crate::host::jail::root::{self, RootFile};
use crate::host::process::ProcessId;
use crate::host::text::clean;
use crate::network::user;
use crate::vmm::boot_file;
use crate::vmm::error::VmmError;
use crate::vmm::hugepages;
use crate::vmm::machine::{Accel, Disk, Machine, NicEnd, PluggedDisk, Sockets, Spec, Vmm};

pub(crate) mod args;
mod balloon;
pub(crate) mod board;
mod disks;
mod hotplug;
mod memory;
mod plug;
mod qmp;
mod syscalls;

/// The name in messages.
pub(super) const NAME: &str = "QEMU";
/// How to install the program.
pub(super) const INSTALL_HINT: &str = "Debian: apt-get install qemu-system-x86";
/// The kernel's device that moves packets between a tap and a guest without QEMU.
const VHOST_NET: &str = "/dev/vhost-net";
/// Kernel, initramfs, console, QMP, vsock and share.
const OTHER_FDS: usize = 6;
/// Deadline for the greeting and for each command.
const QMP_DEADLINE: Duration = Duration::from_secs(10);

/// Runs machines on one board with one QEMU binary.
#[derive(Debug, Clone)]
pub(super) struct Qemu {
    /// `qemu-system-x86_64`.
    pub(super) program: PathBuf,
    /// The board.
    pub(super) board: board::Board,
}

#[async_trait]
impl Vmm for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn id(&self) -> &'static str {
        "qemu"
    }

    fn board(&self) -> &'static str {
        self.board.name()
    }

    fn most_nics(&self, spec: &Spec, queues: u16) -> usize {
        // Each queue pair takes a descriptor of its tap, and with KVM one of vhost-net.
        let descriptors = usize::from(queues.max(1)) * if spec.accel == Accel::Kvm { 2 } else { 1 };
        let others = OTHER_FDS + usize::from(spec.guest.debug) + spec.disks.len();
        let inheritable = (LAST_FD - FIRST_FD + 1) as usize;
        let by_descriptors = inheritable.saturating_sub(others) / descriptors;
        self.board.slots().saturating_sub(args::slots_taken(spec)).min(by_descriptors)
    }

    fn pluggable_nics(&self) -> usize {
        self.board.pluggable_nics()
    }

    fn cache_mib(&self, spec: &Spec) -> u64 {
        args::code_cache_mib(spec)
    }

    async fn start(&self, spec: &Spec, sockets: Sockets) -> Result<Box<dyn Machine>, VmmError> {
        let system = |what| move |source| VmmError::System { what, source };
        let mut spec = spec.clone();
        if spec.hugepages {
            spec.memory_mib = hugepages::fit_host(spec.memory_mib)?;
            spec.max_memory_mib = spec.memory_mib;
        }
        let (qmp, qmp_theirs) =
            std::os::unix::net::UnixStream::pair().map_err(system("create a socket pair for QMP"))?;
        qmp.set_nonblocking(true).map_err(system("make the QMP socket non-blocking"))?;

        let (kernel, initrd) = boot_files(&spec).await?;
        let mut inherited = Inherited::default();
        let fds = args::Fds {
            kernel: inherited.add(kernel),
            initrd: inherited.add(initrd),
            console: inherited.add(sockets.console),
            shell: sockets.shell.map(|shell| inherited.add(shell)),
            qmp: inherited.add(qmp_theirs.into()),
            vsock: inherited.add(sockets.vsock),
            share: sockets.share.map(|share| inherited.add(share)),
            disks: spec
                .disks
                .iter()
                .map(|disk| Ok(inherited.add(read_only(disk)?)))
                .collect::<Result<_, VmmError>>()?,
            nics: sockets.nics.into_iter().map(|nic| inherited.add_nic(nic, spec.accel)).collect(),
        };
        let files = root_files(&spec)?;
        let launch = Launch {
            program: self.program.clone(),
            args: args::arguments(&spec, self.board, &fds).into_iter().map(Into::into).collect(),
            env: Vec::new(),
            fds: inherited.0,
            jail: Some(self.jail(&spec)?),
            output: sockets.log,
            cgroups: Vec::new(),
            leads: false,
        };
        let child = launch.spawn().map_err(|source| VmmError::Spawn { program: self.program.clone(), source })?;
        let (connected, connection) = watch::channel(None);
        let machine = QemuMachine {
            child: Arc::new(child),
            reason: Arc::default(),
            accel: spec.accel,
            files,
            slots: hotplug::Numbers::new(spec.pluggable_nics as u32),
            disks: spec.guest.disks.then(|| hotplug::Numbers::new(disks::MOST)),
            deleted: Arc::default(),
            boot_memory_mib: spec.memory_mib,
            grows: args::growth_mib(&spec) > 0,
            balloon: args::has_balloon(&spec, self.board, fds.nics.len()),
            qmp: connection,
        };
        let qmp = UnixStream::from_std(qmp).map_err(system("register the QMP socket"))?;
        tokio::spawn(listen(qmp, machine.reason.clone(), machine.deleted.clone(), connected));
        Ok(Box::new(machine))
    }
}

impl Qemu {
    /// What separates the process from the host and from other machines.
    fn jail(&self, spec: &Spec) -> Result<Jail, VmmError> {
        let mut namespaces = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWNET;
        let user_network = spec.user_network.is_some();
        // Without user mode, QEMU connects to nothing: taps arrive as descriptors.
        namespaces.set(CloneFlags::CLONE_NEWNET, !user_network);
        let loader = Loader::unreadable(&self.program).map_err(|source| VmmError::Open {
            what: "the loader of",
            path: self.program.clone(),
            source,
        })?;
        Ok(Jail {
            namespaces,
            user: spec.user.clone(),
            loader,
            filter: Some(syscalls::filter(user_network)),
            capabilities: None,
            read_only: false,
        })
    }
}

/// The files that QEMU opens while it runs.
fn root_files(spec: &Spec) -> Result<Vec<RootFile>, VmmError> {
    let read =
        || user::host_resolv_conf().map_err(|source| VmmError::System { what: "read the host's resolv.conf", source });
    let resolver = |contents| RootFile { folder: "etc", name: "resolv.conf", contents };
    // In user mode, QEMU looks for the host's resolver when the guest asks for a name.
    Ok(spec.user_network.iter().map(|_| read()).collect::<Result<Vec<_>, _>>()?.into_iter().map(resolver).collect())
}

#[derive(Default)]
struct Inherited(Vec<(OwnedFd, i32)>);

impl Inherited {
    fn add(&mut self, fd: OwnedFd) -> i32 {
        let number = FIRST_FD + self.0.len() as i32;
        self.0.push((fd, number));
        number
    }

    fn add_nic(&mut self, nic: NicEnd, accel: Accel) -> args::NicFds {
        let vhost = vhost(nic.taps.len(), accel);
        let mut add = |fds: Vec<OwnedFd>| fds.into_iter().map(|fd| self.add(fd)).collect();
        args::NicFds { mac: nic.mac, taps: add(nic.taps), vhost: add(vhost) }
    }
}

/// With hardware virtualization, the kernel's vhost-net moves the packets if it is available.
fn vhost(queues: usize, accel: Accel) -> Vec<OwnedFd> {
    let open = |_| File::options().read(true).write(true).open(VHOST_NET).map(OwnedFd::from);
    let opened: std::io::Result<Vec<OwnedFd>> = match accel {
        Accel::Kvm => (0..queues).map(open).collect(),
        Accel::Tcg | Accel::TcgCounted => Ok(Vec::new()),
    };
    opened.unwrap_or_else(|error| {
        tracing::debug!(%error, "QEMU moves the packets, because {VHOST_NET} cannot be opened");
        Vec::new()
    })
}

/// Opens the kernel and the initramfs at once: verifying them takes a few milliseconds each.
async fn boot_files(spec: &Spec) -> Result<(OwnedFd, OwnedFd), VmmError> {
    let open = |what, path: &Path, digest| {
        let path = path.to_owned();
        async move {
            let opened = tokio::task::spawn_blocking(move || boot_file::open(what, &path, digest)).await;
            opened.map_err(|error| VmmError::System { what: "open a file", source: std::io::Error::other(error) })?
        }
    };
    let initrd = open("initrd", &spec.initrd, spec.initrd_sha256);
    tokio::try_join!(open("kernel", &spec.kernel, spec.kernel_sha256), initrd)
}

/// Opens a disk's image again, read-only.
fn read_only(disk: &Disk) -> Result<OwnedFd, VmmError> {
    let path = format!("/proc/self/fd/{}", disk.image.as_raw_fd());
    File::open(&path).map(OwnedFd::from).map_err(|source| VmmError::Open { what: "disk", path: path.into(), source })
}

struct QemuMachine {
    child: Arc<Child>,
    /// Why the guest ended, as QEMU reports it.
    reason: Arc<Mutex<Option<String>>>,
    accel: Accel,
    /// What stays of the host's files once QEMU runs.
    files: Vec<RootFile>,
    /// The free slots for network cards.
    slots: hotplug::Numbers,
    /// The free numbers of disks; none if it cannot have any.
    disks: Option<hotplug::Numbers>,
    deleted: Arc<disks::Deleted>,
    /// The memory that the guest started with.
    boot_memory_mib: u64,
    /// It can have more.
    grows: bool,
    /// It has a balloon.
    balloon: bool,
    /// QMP, once it is connected.
    qmp: watch::Receiver<Option<Arc<qmp::Qmp>>>,
}

/// Keeps the reason that QEMU reports for the guest's end. The exit status does not tell: it is 0 for a shutdown and
/// for a panic.
async fn listen(
    socket: UnixStream,
    reason: Arc<Mutex<Option<String>>>,
    deleted: Arc<disks::Deleted>,
    connected: watch::Sender<Option<Arc<qmp::Qmp>>>,
) {
    let (qmp, mut events) = match qmp::Qmp::handshake(socket, QMP_DEADLINE).await {
        Ok(connection) => connection,
        Err(error) => {
            // The machine runs, but the reason for the guest's end stays unknown.
            tracing::warn!(error = %Chain(&error), "failed to connect to QMP");
            return;
        }
    };
    // The channel keeps the client: dropping it would close the connection.
    connected.send_replace(Some(Arc::new(qmp)));
    while let Some(event) = events.recv().await {
        tracing::debug!(event = clean(&event.name), data = clean(&event.data.to_string()), "QMP event");
        if event.name == "SHUTDOWN" {
            let text = event.data.get("reason").and_then(|reason| reason.as_str()).map(clean);
            *lock(&reason) = text;
        }
        if event.name == "DEVICE_DELETED"
            && let Some(device) = event.data.get("device").and_then(Value::as_str)
        {
            deleted.report(device);
        }
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn process(&self) -> ProcessId {
        self.child.process()
    }

    async fn exited(&self) -> String {
        let exit = self.child.exited().await;
        let reason = lock(&self.reason).clone();
        match reason {
            Some(reason) => format!("QEMU {exit} after {reason}"),
            None => format!("QEMU {exit}"),
        }
    }

    async fn confine(&self) -> Result<(), VmmError> {
        let failed = |source| VmmError::Confine { machine: NAME, source };
        // QEMU replies to QMP's first command when everything is set up: it opens no more files.
        self.connection().await.map_err(|error| failed(error.into()))?;
        let (process, files) = (self.child.process(), self.files.clone());
        let confined = tokio::task::spawn_blocking(move || root::empty(process, &files)).await;
        confined.map_err(std::io::Error::other).flatten().map_err(|error| failed(error.into()))
    }

    async fn plug(&self, nic: NicEnd) -> Result<(), VmmError> {
        let failed = |source: qmp::QmpError| VmmError::Plug { machine: NAME, source: source.into() };
        let qmp = self.connection().await.map_err(failed)?;
        let slot = self.slots.take().ok_or(VmmError::NoSlot)?;
        let vhost = vhost(nic.taps.len(), self.accel);
        let card = plug::Card { mac: nic.mac, taps: nic.taps, vhost };
        plug::plug(&qmp, slot, &card).await.map_err(|failure| failed(failure.give_back(&self.slots, slot)))
    }

    async fn plug_disk(&self, disk: PluggedDisk) -> Result<u32, VmmError> {
        let failed =
            |source: qmp::QmpError| VmmError::Disk { what: "give a disk to", machine: NAME, source: source.into() };
        let disks = self.disks.as_ref().ok_or(VmmError::NoController)?;
        let qmp = self.connection().await.map_err(failed)?;
        let number = disks.take().ok_or(VmmError::NoNumber)?;
        let plugged = disks::plug(&qmp, number, &disk).await;
        plugged.map(|()| number).map_err(|failure| failed(failure.give_back(disks, number)))
    }

    async fn unplug_disk(&self, number: u32) -> Result<(), VmmError> {
        let failed = |source: qmp::QmpError| VmmError::Disk {
            what: "take a disk away from",
            machine: NAME,
            source: source.into(),
        };
        let disks = self.disks.as_ref().ok_or(VmmError::NoController)?;
        let qmp = self.connection().await.map_err(failed)?;
        disks::unplug(&qmp, &self.deleted, number).await.map_err(failed)?;
        disks.give_back(number);
        Ok(())
    }

    async fn offer_memory(&self, memory_mib: u64) -> Result<(), VmmError> {
        let failed = |source: qmp::QmpError| VmmError::Memory {
            what: "change the memory",
            machine: NAME,
            source: source.into(),
        };
        let qmp = self.growing().await?.map_err(failed)?;
        memory::offer(&qmp, memory_mib.saturating_sub(self.boot_memory_mib)).await.map_err(failed)
    }

    async fn memory_mib(&self) -> Result<u64, VmmError> {
        let failed =
            |source: qmp::QmpError| VmmError::Memory { what: "query the memory", machine: NAME, source: source.into() };
        let qmp = self.growing().await?.map_err(failed)?;
        let taken = memory::taken_mib(&qmp).await.map_err(failed)?;
        Ok(self.boot_memory_mib.saturating_add(taken))
    }

    async fn set_memory_target(&self, target_mib: u64) -> Result<(), VmmError> {
        let failed = |source: qmp::QmpError| VmmError::Memory {
            what: "set the balloon's target",
            machine: NAME,
            source: source.into(),
        };
        if !self.balloon {
            return Err(VmmError::NoBalloon);
        }
        balloon::set_target(&*self.connection().await.map_err(failed)?, target_mib).await.map_err(failed)
    }

    async fn balloon_mib(&self) -> Result<Option<u64>, VmmError> {
        let failed = |source: qmp::QmpError| VmmError::Memory {
            what: "query the balloon",
            machine: NAME,
            source: source.into(),
        };
        if !self.balloon {
            return Ok(None);
        }
        balloon::query(&*self.connection().await.map_err(failed)?, self.boot_memory_mib).await.map(Some).map_err(failed)
    }

    async fn vcpu_threads(&self) -> Result<Vec<i32>, VmmError> {
        let threads = async {
            let qmp = self.connection().await?;
            let reply = qmp.execute("query-cpus-fast", json!({}), QMP_DEADLINE).await?;
            let inside = threads(reply)?;
            // QEMU reports the numbers that its threads have in its own PID namespace.
            let outside = self.child.process().threads_by_inner_number()?;
            let thread = |number| outside.get(&number).copied().ok_or_else(|| thread_has_ended(number));
            inside.into_iter().map(thread).collect::<Result<_, _>>()
        };
        threads.await.map_err(|source| VmmError::Vcpus { machine: NAME, source: source.into() })
    }

    fn kill(&self) {
        self.child.kill();
    }
}

impl QemuMachine {
    /// QMP of a machine whose memory can grow.
    async fn growing(&self) -> Result<Result<Arc<qmp::Qmp>, qmp::QmpError>, VmmError> {
        if self.grows { Ok(self.connection().await) } else { Err(VmmError::FixedMemory { machine: NAME }) }
    }

    /// QMP, once it is connected.
    async fn connection(&self) -> Result<Arc<qmp::Qmp>, qmp::QmpError> {
        let mut connection = self.qmp.clone();
        // The handshake has a deadline. If it fails, the sender is dropped.
        let qmp = match connection.wait_for(Option::is_some).await {
            Ok(qmp) => qmp.clone(),
            Err(_) => None,
        };
        qmp.ok_or(qmp::QmpError::Closed)
    }
}

/// A virtual CPU in the reply to `query-cpus-fast` (CpuInfoFast in QEMU's qapi/machine.json).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct CpuInfo {
    cpu_index: u32,
    thread_id: i32,
}

fn thread_has_ended(number: i32) -> qmp::QmpError {
    std::io::Error::other(format!("thread {number} does not exist")).into()
}

fn threads(reply: Value) -> Result<Vec<i32>, qmp::QmpError> {
    let mut cpus: Vec<CpuInfo> = serde_json::from_value(reply).map_err(std::io::Error::from)?;
    cpus.sort_by_key(|cpu| cpu.cpu_index);
    Ok(cpus.iter().map(|cpu| cpu.thread_id).collect())
}

/// Reads what a hostile QEMU sends on its control connection. Returns the errors. For the fuzz target.
pub(super) async fn read_control(bytes: &[u8]) -> Vec<String> {
    let replies = qmp::replies(bytes, 4).await;
    let errors = replies.into_iter().filter_map(|reply| reply.and_then(threads).err());
    errors.map(|error| Chain(&error).to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_in_the_order_of_the_virtual_cpus() {
        let cpu =
            |index, thread| json!({"cpu-index": index, "thread-id": thread, "qom-path": "/x", "target": "x86_64"});
        assert_eq!(threads(json!([cpu(1, 70), cpu(0, 71)])).unwrap(), [71, 70]);
        assert!(threads(json!([{"cpu-index": 0}])).is_err());
    }
}
