//! The configuration as values, with their defaults.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use super::ids::IdRange;
use super::names::{DENIED_BY_DEFAULT, NAMES};
use crate::host::digest::Sha256Digest;
use crate::vmm::Board;

/// A guest's memory unless the configuration, an annotation or a limit sets it, MiB.
pub(crate) const DEFAULT_MEMORY_MIB: u64 = 512;
/// A guest's memory on top of what its containers may use, MiB: kernel, init, page tables.
pub(crate) const GUEST_OVERHEAD_MIB: u64 = 128;
/// The host's key for tokens, unless `metadata_key` names another file.
const METADATA_KEY: &str = "/etc/husk/metadata.key";
/// Default lifetime of a token.
const TOKEN_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// A guest with less memory does not boot.
pub(crate) const MIN_MEMORY_MIB: u64 = 64;
/// The limit of the guest's kernel (CONFIG_NR_CPUS in kernel-config/base.config), which leaves further CPUs idle.
/// QEMU's microvm supports 288.
pub(crate) const MAX_VCPUS: u32 = 64;

/// Where files of scratch disks are unless `scratch_dir` names another folder: on a disk of every host (FHS 3.0, 5.15).
const SCRATCH_DIR: &str = "/var/tmp";

/// The size of a disk for a container's changes, MiB: it takes no more of the host's disk than is written.
const OVERLAY_MIB: u64 = 16 << 10;
/// How long the guest may copy a container's changes.
const COPY_BACK_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// Where images of layers are unless `layer_cache_dir` names another folder: they can be made again (FHS 3.0, 5.5).
const LAYER_CACHE_DIR: &str = "/var/cache/husk/layers";
/// Most space of all images of layers, MiB: a node's most used images without their compression.
const LAYER_CACHE_MIB: u64 = 8192;

/// How long a VM waits in the pool at most.
const POOL_IDLE: Duration = Duration::from_secs(60 * 60);

/// virtiofsd's limit of open files: about 200 MiB of the host's kernel memory if a guest fills it.
const OPEN_FILES: u64 = 131_072;

/// The key `accel`: how guest instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccelMode {
    /// KVM; an error without it. For a configuration that has not chosen.
    Auto,
    /// KVM; an error without it.
    Kvm,
    /// Emulation, even if the host supports KVM.
    Tcg,
}

/// The key `vsock`: the device that carries the connections between a guest and its shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VsockMode {
    /// The shim's own device, even if the kernel has one: VMs share nothing through it, and each shim serves its VM's
    /// metadata.
    Auto,
    /// The shim's own device.
    VhostUser,
    /// The kernel's device; an error without it.
    Vhost,
}

/// The key `streams`: what carries the standard streams of processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamMode {
    /// Connections that carry nothing else, if the guest offers them.
    Raw,
    /// The TTRPC service.
    Ttrpc,
}

/// The network of a sandbox whose spec names no network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkMode {
    /// Loopback only.
    None,
    /// User-mode networking.
    User,
}

impl NetworkMode {
    /// The values of the key and the annotation.
    pub(crate) const NAMES: [(&str, Self); 2] = [("none", Self::None), ("user", Self::User)];

    /// The name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::User => "user",
        }
    }
}

/// The key `host_pid`: what becomes of a pod that asks for its node's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostPid {
    /// It is rejected: a VM does not have them.
    Reject,
    /// Its containers share a PID namespace of the pod's own.
    Pod,
}

/// The key `rootfs`: how the guest gets the root filesystem of a container whose snapshot is a folder of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootfsMode {
    /// The guest reads and writes the host's files.
    Virtiofs,
    /// The guest writes to a disk of the container, whose contents the host gets when the container exits or is paused.
    Overlay,
    /// Like `Overlay`, but the guest reads images of the snapshot's layers once there are some.
    Erofs,
    /// The fastest one that no tool of the host notices.
    Auto,
}

impl RootfsMode {
    /// The values of the key and the annotation.
    pub(crate) const NAMES: [(&str, Self); 4] =
        [("virtiofs", Self::Virtiofs), ("overlay", Self::Overlay), ("erofs", Self::Erofs), ("auto", Self::Auto)];
}

/// Settings of root filesystems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootfsSettings {
    /// How the guest gets them.
    pub mode: RootfsMode,
    /// The size of the disk for a container's changes, MiB.
    pub overlay_mib: u64,
    /// How long the guest may take to copy a container's changes to the host.
    pub copy_back_timeout: Duration,
}

/// A number of virtual CPUs by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Fast boot: one virtual CPU, so the guest's kernel starts no others and synchronizes with none.
    Latency,
    /// Parallel work: four virtual CPUs.
    Throughput,
}

impl Profile {
    /// The values of the key and the annotation.
    pub(crate) const NAMES: [(&str, Self); 3] =
        [("latency", Self::Latency), ("low-latency", Self::Latency), ("throughput", Self::Throughput)];

    pub(crate) fn vcpus(self) -> u32 {
        match self {
            Self::Latency => 1,
            Self::Throughput => 4,
        }
    }
}

/// The validated configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Virtual CPUs of a guest; without it, the profile or else the spec's limits decide.
    pub vcpus: Option<u32>,
    /// Virtual CPUs that a running guest can have, and the most that an annotation or a limit may ask for; without it, the
    /// board decides.
    pub max_vcpus: Option<u32>,
    /// Virtual CPUs by purpose.
    pub profile: Option<Profile>,
    /// Memory of a guest, MiB; without it, the spec's limits decide.
    pub memory_mib: Option<u64>,
    /// Most memory of a guest that an annotation or a limit may ask for, MiB.
    pub max_memory_mib: Option<u64>,
    /// Memory that a guest is to get by with unless it runs short, MiB; without it, all.
    pub balloon_target_mib: Option<u64>,
    /// Guest memory consists of the host's huge pages.
    pub hugepages: bool,
    /// The guest's kernel, if not in a default place.
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs, if not in a default place.
    pub initrd: Option<PathBuf>,
    /// The digest that the guest's kernel must have.
    pub kernel_sha256: Option<Sha256Digest>,
    /// The digest that the guest's initramfs must have.
    pub initrd_sha256: Option<Sha256Digest>,
    /// A folder with `vmlinux`, `initrd.img` and, for debug mode, `initrd-debug.img`.
    pub image_dir: Option<PathBuf>,
    /// How guest instructions are executed.
    pub accel: AccelMode,
    /// How much translated code emulation keeps for a VM, MiB; without it, the VM's memory decides.
    pub tcg_cache_mib: Option<u64>,
    /// The guests' vsock device.
    pub vsock: VsockMode,
    /// What carries the standard streams of processes.
    pub streams: StreamMode,
    /// The board, and with it the VMM.
    pub board: Board,
    /// QEMU's program; a name without a slash is searched in PATH.
    pub qemu: PathBuf,
    /// User and group IDs of the VMs' machines.
    pub vm_ids: IdRange,
    /// virtiofsd's program, if not in a default place.
    pub virtiofsd: Option<PathBuf>,
    /// How many files virtiofsd may have open.
    pub open_files: u64,
    /// VMs that boot before anybody asks for them.
    pub pool: PoolSettings,
    /// Network cards for links that appear in a VM's network namespace after its boot.
    pub spare_nics: u32,
    /// The network of sandboxes that nothing else connects.
    pub network: NetworkMode,
    /// The host's addresses whose ports may be mapped to a guest, in addition to loopback addresses.
    pub port_addresses: Vec<Ipv4Addr>,
    /// A mapping may name a range of ports.
    pub port_ranges: bool,
    /// What becomes of a pod that asks for its node's processes.
    pub host_pid: HostPid,
    /// Containers may use io_uring, as far as their seccomp profiles allow it.
    pub io_uring: bool,
    /// There may be user namespaces in a guest besides its first.
    pub user_namespaces: bool,
    /// Parameters of the guest's kernel in addition to husk's own.
    pub kernel_params: Vec<String>,
    /// Guests boot in debug mode: a shell on the console, processes in the VM itself, verbose logs.
    pub debug: bool,
    /// Least severe level that the guest's init logs to the shim.
    pub log_level: tracing::Level,
    /// Time from QEMU's start to the guest's hello.
    pub boot_timeout: Duration,
    /// Deadline of a call to the guest.
    pub call_timeout: Duration,
    /// How long the guest may take to end a container, or everything, before the host ends the VM.
    pub kill_timeout: Duration,
    /// Interval of a guest's heartbeats. husk kills a guest that misses three.
    pub heartbeat: Duration,
    /// Total size limit of a sandbox's extras, MiB.
    pub extras_max_mib: u64,
    /// The `io.husk.` annotations that a sandbox may use.
    pub allowed_annotations: Vec<String>,
    /// Tokens of the metadata service.
    pub tokens: TokenSettings,
    /// The folder whose subfolders may contain workspace files, one for each namespace of containerd; without it, files
    /// are not allowed.
    pub workspace_dir: Option<PathBuf>,
    /// The folders of the host that may contain volumes.
    pub volume_dirs: Vec<PathBuf>,
    /// The folder that describes direct-assigned volumes; without it, there are none.
    pub direct_volume_dir: Option<PathBuf>,
    /// Root filesystems.
    pub rootfs: RootfsSettings,
    /// The folder for the files of scratch disks.
    pub scratch_dir: PathBuf,
    /// The folder for images of layers.
    pub layer_cache_dir: PathBuf,
    /// Most space of all these images, MiB.
    pub layer_cache_mib: u64,
    /// The Unix sockets of the host that containers may mount.
    pub sockets: Vec<AllowedSocket>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vcpus: None,
            max_vcpus: None,
            profile: None,
            memory_mib: None,
            max_memory_mib: None,
            balloon_target_mib: None,
            hugepages: false,
            kernel: None,
            initrd: None,
            kernel_sha256: None,
            initrd_sha256: None,
            image_dir: None,
            accel: AccelMode::Auto,
            tcg_cache_mib: None,
            vsock: VsockMode::Auto,
            streams: StreamMode::Raw,
            board: Board::default(),
            qemu: "qemu-system-x86_64".into(),
            vm_ids: IdRange::default(),
            virtiofsd: None,
            open_files: OPEN_FILES,
            pool: PoolSettings { size: 0, idle: POOL_IDLE, max_memory_mib: None },
            spare_nics: 1,
            network: NetworkMode::None,
            port_addresses: Vec::new(),
            port_ranges: false,
            host_pid: HostPid::Reject,
            io_uring: false,
            user_namespaces: true,
            kernel_params: Vec::new(),
            debug: false,
            log_level: tracing::Level::WARN,
            boot_timeout: Duration::from_secs(60),
            call_timeout: Duration::from_secs(60),
            kill_timeout: Duration::from_secs(10),
            heartbeat: Duration::from_secs(10),
            extras_max_mib: 64,
            allowed_annotations: NAMES
                .into_iter()
                .filter(|name| !DENIED_BY_DEFAULT.contains(name))
                .map(str::to_owned)
                .collect(),
            tokens: TokenSettings { key: METADATA_KEY.into(), lifetime: TOKEN_LIFETIME, host: None },
            workspace_dir: None,
            volume_dirs: Vec::new(),
            direct_volume_dir: None,
            rootfs: RootfsSettings {
                mode: RootfsMode::Virtiofs,
                overlay_mib: OVERLAY_MIB,
                copy_back_timeout: COPY_BACK_TIMEOUT,
            },
            scratch_dir: SCRATCH_DIR.into(),
            layer_cache_dir: LAYER_CACHE_DIR.into(),
            layer_cache_mib: LAYER_CACHE_MIB,
            sockets: Vec::new(),
        }
    }
}

/// An entry of the key `sockets`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedSocket {
    /// This socket.
    File(PathBuf),
    /// Every socket below this folder.
    Below(PathBuf),
}

/// Settings of the pool of waiting VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSettings {
    /// How many VMs wait at most.
    pub size: u32,
    /// How long one waits at most.
    pub idle: Duration,
    /// The most guest memory that they have together, MiB.
    pub max_memory_mib: Option<u64>,
}

/// Settings of the metadata service's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSettings {
    /// The file with the host's key.
    pub key: PathBuf,
    /// Lifetime of a token.
    pub lifetime: Duration,
    /// The name of the host that issues the tokens; its host name by default.
    pub host: Option<String>,
}
