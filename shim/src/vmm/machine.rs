//! The interface to a VMM: what a machine consists of, how it is started, and how its end is noticed.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tracing::Level;

use crate::host::digest::Sha256Digest;
use crate::host::jail::User;
use crate::host::process::ProcessId;
use crate::network::user::UserNetwork;
use crate::vmm::error::VmmError;

/// How guest instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// Software emulation.
    Tcg,
    /// [`Accel::Tcg`] with one nanosecond of guest time for each guest instruction: a measure that is independent of
    /// the host's load. For benchmarks.
    TcgCounted,
}

/// A read-only block device. The guest finds it by its serial.
#[derive(Debug, Clone)]
pub struct Disk {
    /// At most 20 bytes (virtio's VIRTIO_BLK_ID_BYTES).
    pub serial: String,
    /// Whole sectors, in a file that the machine's user may open.
    pub image: Arc<File>,
}

/// How the machine's process reads and writes a disk's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Past the host's page cache, with asynchronous I/O of the host's kernel.
    Bypassed,
    /// Through the host's page cache, which all machines with this image share.
    Shared,
}

/// A disk for a running machine. A flush by the guest is one of the image on the host, and the guest can discard blocks.
#[derive(Debug)]
pub struct PluggedDisk {
    /// The guest finds the disk by it. At most 36 bytes (SCSI's page of the unit's serial number in QEMU).
    pub serial: String,
    /// The image, a regular file or a block device, opened for what the guest may do with it.
    pub image: OwnedFd,
    /// `image` is a block device.
    pub is_device: bool,
    /// The guest cannot write.
    pub read_only: bool,
    /// How it is read and written.
    pub cache: Cache,
}

/// A network card, connected to a tap.
#[derive(Debug)]
pub struct NicEnd {
    /// The card's address.
    pub mac: [u8; 6],
    /// The tap's descriptors, one for each pair of queues.
    pub taps: Vec<OwnedFd>,
}

/// What the shim passes to the guest's init, and to its kernel on behalf of the configuration.
#[derive(Debug, Clone)]
pub struct GuestParams {
    /// Least severe level that the init logs at.
    pub log_level: Level,
    /// Interval between two heartbeats.
    pub heartbeat: Duration,
    /// Debug mode.
    pub debug: bool,
    /// Programs may use io_uring.
    pub io_uring: bool,
    /// Programs may create user namespaces.
    pub user_namespaces: bool,
    /// Kernel parameters of the configuration.
    pub configured: Vec<String>,
    /// The guest has a disk with extras.
    pub extras: bool,
    /// The extras contain a supervisor agent that is to run.
    pub supervisor: bool,
    /// The running machine may be given disks. The guest's kernel looks for them only when its init asks it to.
    pub disks: bool,
    /// The guest holds the namespaces of a sandbox without a pause container.
    pub sandbox: bool,
    /// The virtual CPUs that the kernel starts, if it does not start all.
    pub vcpus: Option<u32>,
    /// How many inodes of the share the guest caches at most.
    pub max_inodes: Option<u64>,
    /// The host name of the guest, if the sandbox has one.
    pub hostname: Option<String>,
    /// MAC addresses of the network cards that the guest's kernel is to leave alone.
    pub held_nics: Vec<[u8; 6]>,
    /// The host's wall clock, since 1970.
    pub wall_clock: Option<Duration>,
    /// The host's vsock port that expects the guest's hello, if it is not the usual one.
    pub ready_port: Option<u32>,
}

/// What a virtual machine consists of. The board belongs to the VMM.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Appears in the process list.
    pub name: String,
    /// How guest instructions are executed.
    pub accel: Accel,
    /// Virtual CPUs that the guest starts with, at least 1.
    pub vcpus: u32,
    /// Virtual CPUs that the guest can have, at least as many. It starts those beyond `vcpus` on request.
    pub max_vcpus: u32,
    /// Frequency of the host's time stamp counter, kHz, if known.
    pub tsc_khz: Option<u64>,
    /// Memory that the guest starts with, MiB.
    pub memory_mib: u64,
    /// Memory that the guest can have, MiB, at least as much. The machine offers it more on request, in steps of whole
    /// blocks of its kernel.
    pub max_memory_mib: u64,
    /// How much translated code emulation keeps, MiB; the VMM decides if none. Without effect on hardware virtualization.
    pub code_cache_mib: Option<u64>,
    /// Back guest memory with the host's huge pages.
    pub hugepages: bool,
    /// ELF kernel with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The digest that the kernel must have: then the machine boots from a copy that nobody can change.
    pub kernel_sha256: Option<Sha256Digest>,
    /// The same for the initramfs.
    pub initrd_sha256: Option<Sha256Digest>,
    /// The guest's CID on the kernel's vsock device; none with the device in the shim.
    pub kernel_cid: Option<u32>,
    /// Block devices.
    pub disks: Vec<Disk>,
    /// The most network cards that the running machine may be given, at most [`Vmm::pluggable_nics`].
    pub pluggable_nics: usize,
    /// A network card that the VMM connects by itself, without privileges.
    pub user_network: Option<UserNetwork>,
    /// What the shim passes to the guest on the kernel command line.
    pub guest: GuestParams,
    /// The user of the machine's process; root if none.
    pub user: Option<User>,
}

/// The open files that connect a machine to the shim. Each socket is one end of a connected pair.
#[derive(Debug)]
pub struct Sockets {
    /// The vsock device: its vhost-user front end, or the kernel's device with the CID set.
    pub vsock: OwnedFd,
    /// vhost-user front end of the share; none for a machine without one.
    pub share: Option<OwnedFd>,
    /// Network cards.
    pub nics: Vec<NicEnd>,
    /// The serial console.
    pub console: OwnedFd,
    /// The console of a debug shell, if the guest has one: containers can open the serial console as /dev/console.
    pub shell: Option<OwnedFd>,
    /// Standard output and error of the machine's process.
    pub log: File,
}

/// A program that runs virtual machines.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// The name in messages.
    fn name(&self) -> &'static str;

    /// The name of the machine's process in the state, and of its log file without the extension.
    fn id(&self) -> &'static str;

    /// The board's name in the state.
    fn board(&self) -> &'static str;

    /// The most network cards that a machine with this spec can have, each with `queues` pairs of queues.
    fn most_nics(&self, spec: &Spec, queues: u16) -> usize;

    /// The most network cards that a running machine can be given, in addition to those that it starts with.
    fn pluggable_nics(&self) -> usize;

    /// The VMM's own cache for a machine with this spec, on top of the guest's memory, MiB.
    fn cache_mib(&self, spec: &Spec) -> u64;

    /// Starts a machine. Returns when its process runs; the guest reports its own readiness.
    ///
    /// # Errors
    ///
    /// When the machine's process cannot be started; then there is none.
    async fn start(&self, spec: &Spec, sockets: Sockets) -> Result<Box<dyn Machine>, VmmError>;
}

/// A started machine.
#[async_trait]
pub trait Machine: Send + Sync {
    /// The machine's process.
    fn process(&self) -> ProcessId;

    /// Resolves when the process has exited, with a description of its end. May be called any number of times.
    async fn exited(&self) -> String;

    /// Takes the host's files away from the machine's process, which needs them only to start. Waits until it has
    /// started. Call it once, before anything runs in the guest that is not husk's.
    ///
    /// # Errors
    ///
    /// The process has exited or does not start, or the host's kernel rejects a step.
    async fn confine(&self) -> Result<(), VmmError>;

    /// Gives the running machine another network card. The guest has to search its buses for it.
    ///
    /// # Errors
    ///
    /// The machine has no room left, or the VMM rejects the card or does not answer: the machine does not have it.
    async fn plug(&self, nic: NicEnd) -> Result<(), VmmError>;

    /// Gives the running machine another disk, and returns its number among those of the machine. The guest has to look
    /// for it.
    ///
    /// # Errors
    ///
    /// The machine cannot have disks or has no room left, or the VMM rejects the disk or does not answer: the machine
    /// does not have it.
    async fn plug_disk(&self, disk: PluggedDisk) -> Result<u32, VmmError>;

    /// Takes a disk away from the running machine, which closes the image. The guest should have stopped to use it.
    ///
    /// # Errors
    ///
    /// The VMM rejects a step or does not answer.
    async fn unplug_disk(&self, number: u32) -> Result<(), VmmError>;

    /// Offers the guest so much memory in all, MiB, at most [`Spec::max_memory_mib`]. A driver of the guest takes it. With
    /// less than before, the driver may keep what it has.
    ///
    /// # Errors
    ///
    /// The machine cannot have more memory, or the VMM rejects the size or does not answer.
    async fn offer_memory(&self, memory_mib: u64) -> Result<(), VmmError>;

    /// The memory that the guest has, MiB in all, as the VMM counts it: what it has taken of an offer, rounded up.
    ///
    /// # Errors
    ///
    /// The machine cannot have more memory than at its start, or the VMM does not answer.
    async fn memory_mib(&self) -> Result<u64, VmmError>;

    /// Has the guest get by with so much of the memory that it started with, MiB, and give the rest back to the host. The
    /// guest may take it again when it runs short.
    ///
    /// # Errors
    ///
    /// The machine has no balloon, or the VMM does not answer.
    async fn set_memory_target(&self, target_mib: u64) -> Result<(), VmmError>;

    /// What the guest has given back, MiB; none for a machine without a balloon.
    ///
    /// # Errors
    ///
    /// The VMM does not answer.
    async fn balloon_mib(&self) -> Result<Option<u64>, VmmError>;

    /// The threads (TIDs) that execute the virtual CPUs, in the order in which the guest numbers them. Several virtual
    /// CPUs may have the same. The VMM reports them: they may be no threads of the machine's process.
    ///
    /// # Errors
    ///
    /// The VMM rejects the query or does not answer.
    async fn vcpu_threads(&self) -> Result<Vec<i32>, VmmError>;

    /// Kills the process.
    fn kill(&self);
}
