//! QEMU as the VMM.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::UnixStream;

use crate::host::child::{Child, FIRST_FD, Launch};
use crate::host::process::ProcessId;
use crate::vmm::{Disk, Error, Machine, Sockets, Spec, Vmm, hugepages};

pub mod args;
pub mod qmp;

/// For the greeting and each command.
const QMP_DEADLINE: Duration = Duration::from_secs(10);

/// Runs machines with one QEMU binary.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// `qemu-system-x86_64`.
    pub program: PathBuf,
}

#[async_trait]
impl Vmm for Qemu {
    async fn start(&self, spec: &Spec, sockets: Sockets) -> Result<Box<dyn Machine>, Error> {
        let system = |what| move |source| Error::System { what, source };
        let mut spec = spec.clone();
        if spec.hugepages {
            spec.memory_mib = hugepages::fit_host(spec.memory_mib)?;
        }
        let (qmp, qmp_theirs) = std::os::unix::net::UnixStream::pair().map_err(system("make a socket pair for QMP"))?;
        qmp.set_nonblocking(true).map_err(system("make the QMP socket non-blocking"))?;

        let mut inherited = Inherited::default();
        let fds = args::Fds {
            kernel: inherited.add(open("kernel", &spec.kernel)?),
            initrd: inherited.add(open("initrd", &spec.initrd)?),
            console: inherited.add(sockets.console),
            qmp: inherited.add(qmp_theirs.into()),
            vsock: inherited.add(sockets.vsock),
            share: sockets.share.map(|share| inherited.add(share)),
            disks: spec.disks.iter().map(|disk| Ok(inherited.add(read_only(disk)?))).collect::<Result<_, Error>>()?,
        };
        let launch = Launch {
            program: self.program.clone(),
            args: args::arguments(&spec, &fds).into_iter().map(Into::into).collect(),
            env: Vec::new(),
            fds: inherited.0,
            user: spec.user,
            output: sockets.log,
            cgroups: Vec::new(),
            leads: false,
        };
        let child =
            launch.spawn().map_err(|source| Error::Spawn { program: self.program.display().to_string(), source })?;
        let machine = QemuMachine { child: Arc::new(child), reason: Arc::default() };
        let qmp = UnixStream::from_std(qmp).map_err(system("register the QMP socket"))?;
        tokio::spawn(listen(qmp, machine.reason.clone()));
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
}

/// Opens a file that QEMU will open again, as whoever it runs as, through the descriptor's name.
fn open(what: &'static str, path: &Path) -> Result<OwnedFd, Error> {
    let error = |source| Error::Open { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(error)?;
    if file.metadata().map_err(error)?.permissions().mode() & 0o004 == 0 {
        let hint = "not readable by everyone, but QEMU runs as an unprivileged user: chmod a+r";
        return Err(error(std::io::Error::new(std::io::ErrorKind::PermissionDenied, hint)));
    }
    Ok(file.into())
}

/// A disk's image, as it may be opened for reading alone.
fn read_only(disk: &Disk) -> Result<OwnedFd, Error> {
    let path = format!("/proc/self/fd/{}", disk.image.as_raw_fd());
    File::open(&path).map(OwnedFd::from).map_err(|source| Error::Open { what: "disk", path: path.into(), source })
}

struct QemuMachine {
    child: Arc<Child>,
    /// Why the guest ended, in QEMU's words, once it has said so.
    reason: Arc<Mutex<Option<String>>>,
}

/// Keeps what QEMU says of the guest's end: its exit status alone is 0 for a shutdown and a panic alike.
async fn listen(socket: UnixStream, reason: Arc<Mutex<Option<String>>>) {
    // The connection is kept by the client, which lives as long as the events are listened to.
    let (_qmp, mut events) = match qmp::Qmp::handshake(socket, QMP_DEADLINE).await {
        Ok(connected) => connected,
        Err(error) => {
            tracing::warn!(%error, "no control of QEMU");
            return;
        }
    };
    while let Some(event) = events.recv().await {
        tracing::debug!(event = event.name, data = %event.data, "QMP event");
        if event.name == "SHUTDOWN" {
            let text = event.data.get("reason").and_then(|reason| reason.as_str()).map(str::to_owned);
            *reason.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = text;
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
        let reason = self.reason.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        match reason {
            Some(reason) => format!("QEMU {exit} after {reason}"),
            None => format!("QEMU {exit}"),
        }
    }

    fn kill(&self) {
        self.child.kill();
    }
}
