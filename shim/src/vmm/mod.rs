//! One virtual machine, whatever runs it: the [`Vmm`] trait and what it is told and answers.
//!
//! What runs inside (the guest's calls) is in `guest`; what containerd sees of it is in `sandbox`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

pub mod hugepages;
pub mod qemu;
pub mod tsc;

/// How guest instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The processor's own virtualisation.
    Kvm,
    /// Translation in software.
    Tcg,
    /// [`Accel::Tcg`] with one nanosecond of guest time for each guest instruction: a measure that does not depend on
    /// the machine's load. For benchmarks.
    TcgCounted,
}

/// The board that the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// QEMU's microvm: virtio-mmio, no ACPI, no PCI.
    Microvm,
    /// QEMU's q35, for what microvm has not.
    Q35,
}

/// A block device, which the guest finds by its serial.
#[derive(Debug, Clone)]
pub struct Disk {
    /// At most 20 bytes (virtio's VIRTIO_BLK_ID_BYTES).
    pub serial: String,
    /// What is on it: whole sectors, in a file that the machine's user may open.
    pub image: Arc<File>,
}

/// What a virtual machine is made of.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Shows in the process list.
    pub name: String,
    /// How instructions are executed.
    pub accel: Accel,
    /// Which board.
    pub board: Board,
    /// Virtual CPUs, at least 1.
    pub vcpus: u32,
    /// Frequency of the host's time stamp counter, kHz, if it is known.
    pub tsc_khz: Option<u64>,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// The guest's memory comes out of the host's huge pages.
    pub hugepages: bool,
    /// ELF kernel with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The guest's CID on the kernel's vsock device; none with the device in the shim.
    pub kernel_cid: Option<u32>,
    /// Block devices, which it can only read.
    pub disks: Vec<Disk>,
    /// Kernel parameters beside those that the board needs.
    pub kernel_params: Vec<String>,
    /// Who the machine's process runs as (uid, gid); root if none.
    pub user: Option<(u32, u32)>,
}

/// The open files that join a machine to the shim; each socket is one end of a connected pair.
#[derive(Debug)]
pub struct Sockets {
    /// The vsock device: its vhost-user front end, or the kernel's with the CID.
    pub vsock: OwnedFd,
    /// vhost-user front end of the share; none for a machine without one.
    pub share: Option<OwnedFd>,
    /// The serial console.
    pub console: OwnedFd,
    /// Where the machine's process writes its complaints.
    pub log: File,
}

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that the machine needs cannot be opened.
    #[error("open {what} {}: {source}", path.display())]
    Open {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The host has no huge pages for it.
    #[error("{0}")]
    HugePages(#[from] hugepages::HugePagesError),
    /// The process could not be started.
    #[error("start {program}: {source}")]
    Spawn {
        /// What was started.
        program: String,
        /// Why not.
        source: crate::host::child::LaunchError,
    },
    /// The machine's control connection failed.
    #[error("QMP: {0}")]
    Qmp(#[from] qemu::qmp::Error),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Something that runs virtual machines.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Starts a machine. Returns when its process runs; the guest says itself when it is ready.
    async fn start(&self, spec: &Spec, sockets: Sockets) -> Result<Box<dyn Machine>, Error>;
}

/// A machine that was started.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Its process, for the journal.
    fn process(&self) -> crate::host::process::ProcessId;
    /// Resolves when the process has ended, with how it ended. May be called any number of times.
    async fn exited(&self) -> String;
    /// Ends the process at once.
    fn kill(&self);
}
