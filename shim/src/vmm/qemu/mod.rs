//! QEMU as the VMM: starts its process and keeps the reason why the guest ended.
//!
//! | file       | contents                                |
//! |------------|-----------------------------------------|
//! | `args.rs`  | the arguments (pure)                    |
//! | `board.rs` | the boards                              |
//! | `qmp.rs`   | QMP, QEMU's control protocol            |
//! | `plug.rs`  | network cards of a running machine      |

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::host::child::{Child, FIRST_FD, LAST_FD, Launch};
use crate::host::process::ProcessId;
use crate::host::text::clean;
use crate::vmm::error::VmmError;
use crate::vmm::hugepages;
use crate::vmm::machine::{Accel, Disk, Machine, NicEnd, Sockets, Spec, Vmm};

pub(crate) mod args;
pub(crate) mod board;
mod plug;
mod qmp;

/// The name in messages.
pub(super) const NAME: &str = "QEMU";
/// How to install the program.
pub(super) const INSTALL_HINT: &str = "Debian: apt-get install qemu-system-x86";
/// The kernel's device that moves packets between a tap and a guest without QEMU.
const VHOST_NET: &str = "/dev/vhost-net";
/// The vsock device and the share.
const OTHER_DEVICES: usize = 2;
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
        let shell = usize::from(spec.guest.debug);
        let others = OTHER_FDS + shell + spec.disks.len();
        let inheritable = (LAST_FD - FIRST_FD + 1) as usize;
        let by_descriptors = inheritable.saturating_sub(others) / descriptors;
        let bridge = usize::from(spec.pluggable_nics > 0);
        self.board.slots().saturating_sub(OTHER_DEVICES + shell + bridge + spec.disks.len()).min(by_descriptors)
    }

    fn pluggable_nics(&self) -> usize {
        self.board.pluggable_nics()
    }

    async fn start(&self, spec: &Spec, sockets: Sockets) -> Result<Box<dyn Machine>, VmmError> {
        let system = |what| move |source| VmmError::System { what, source };
        let mut spec = spec.clone();
        if spec.hugepages {
            spec.memory_mib = hugepages::fit_host(spec.memory_mib)?;
        }
        let (qmp, qmp_theirs) =
            std::os::unix::net::UnixStream::pair().map_err(system("create a socket pair for QMP"))?;
        qmp.set_nonblocking(true).map_err(system("make the QMP socket non-blocking"))?;

        let mut inherited = Inherited::default();
        let fds = args::Fds {
            kernel: inherited.add(open("kernel", &spec.kernel)?),
            initrd: inherited.add(open("initrd", &spec.initrd)?),
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
        let launch = Launch {
            program: self.program.clone(),
            args: args::arguments(&spec, self.board, &fds).into_iter().map(Into::into).collect(),
            env: Vec::new(),
            fds: inherited.0,
            user: spec.user,
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
            slots: plug::Slots::new(spec.pluggable_nics),
            qmp: connection,
        };
        let qmp = UnixStream::from_std(qmp).map_err(system("register the QMP socket"))?;
        tokio::spawn(listen(qmp, machine.reason.clone(), connected));
        Ok(Box::new(machine))
    }
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

/// Opens a file that QEMU opens again, as its own user, through the descriptor's name in `/dev/fd`.
fn open(what: &'static str, path: &Path) -> Result<OwnedFd, VmmError> {
    let error = |source| VmmError::Open { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(error)?;
    if file.metadata().map_err(error)?.permissions().mode() & 0o004 == 0 {
        let hint = "not readable by everyone, but QEMU runs as an unprivileged user: chmod a+r";
        return Err(error(std::io::Error::new(std::io::ErrorKind::PermissionDenied, hint)));
    }
    Ok(file.into())
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
    slots: plug::Slots,
    /// QMP, once it is connected.
    qmp: watch::Receiver<Option<Arc<qmp::Qmp>>>,
}

/// Keeps the reason that QEMU reports for the guest's end. The exit status does not tell: it is 0 for a shutdown and
/// for a panic.
async fn listen(
    socket: UnixStream,
    reason: Arc<Mutex<Option<String>>>,
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
        tracing::debug!(event = event.name, data = %event.data, "QMP event");
        if event.name == "SHUTDOWN" {
            let text = event.data.get("reason").and_then(|reason| reason.as_str()).map(clean);
            *lock(&reason) = text;
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

    async fn plug(&self, nic: NicEnd) -> Result<(), VmmError> {
        let failed = |source: qmp::QmpError| VmmError::Plug { machine: NAME, source: source.into() };
        let qmp = self.connection().await.map_err(failed)?;
        let slot = self.slots.take().ok_or(VmmError::NoSlot)?;
        let vhost = vhost(nic.taps.len(), self.accel);
        let card = plug::Card { mac: nic.mac, taps: nic.taps, vhost };
        plug::plug(&qmp, slot, &card).await.map_err(|failure| match failure {
            plug::Failure::Undone(error) => {
                self.slots.give_back(slot);
                failed(error)
            }
            plug::Failure::Unknown(error) => failed(error),
        })
    }

    async fn vcpu_threads(&self) -> Result<Vec<i32>, VmmError> {
        let threads = async {
            let qmp = self.connection().await?;
            let reply = qmp.execute("query-cpus-fast", json!({}), QMP_DEADLINE).await?;
            threads(reply)
        };
        threads.await.map_err(|source| VmmError::Vcpus { machine: NAME, source: source.into() })
    }

    fn kill(&self) {
        self.child.kill();
    }
}

impl QemuMachine {
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

fn threads(reply: Value) -> Result<Vec<i32>, qmp::QmpError> {
    let mut cpus: Vec<CpuInfo> = serde_json::from_value(reply).map_err(std::io::Error::from)?;
    cpus.sort_by_key(|cpu| cpu.cpu_index);
    Ok(cpus.iter().map(|cpu| cpu.thread_id).collect())
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
