//! The configuration as values, with its defaults.

use std::path::PathBuf;
use std::time::Duration;

use super::names::{NAMES, NOT_BY_DEFAULT};
use crate::vmm::Board;

/// MiB of a guest whose size nothing else decides.
pub const DEFAULT_MEMORY_MIB: u64 = 512;
/// MiB that a guest needs beside what its containers may use: kernel, init, page tables.
pub const GUEST_OVERHEAD_MIB: u64 = 128;
/// Where the host's key for tokens is, unless `metadata_key` names another file.
const METADATA_KEY: &str = "/etc/husk/metadata.key";
/// How long a token is good for, by default.
const TOKEN_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// Less does not boot.
pub const LEAST_MEMORY_MIB: u64 = 64;
/// What the guest's kernel is built for (CONFIG_NR_CPUS in kernel-config/base.config); it would leave the others idle. QEMU's microvm takes 288.
pub const MOST_VCPUS: u32 = 64;

/// How guest instructions are to be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// KVM where it works, else TCG.
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Software, even where KVM works.
    Tcg,
}

/// What carries the connections between guests and their shims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vsock {
    /// The shim's own device: nothing of the machine is shared by it, and each shim is its VM's metadata service. The kernel's, where it is there,
    /// has to be asked for.
    Auto,
    /// The shim's own device.
    VhostUser,
    /// The kernel's, or an error.
    Vhost,
}

/// What a guest is to be good at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Up soon: one virtual CPU, so that the guest's kernel has no others to start and nothing to keep in step.
    Latency,
    /// Much at a time: four virtual CPUs.
    Throughput,
}

impl Profile {
    /// All, as they are written.
    pub(crate) const NAMES: [(&str, Self); 3] =
        [("latency", Self::Latency), ("low-latency", Self::Latency), ("throughput", Self::Throughput)];

    pub(crate) fn vcpus(self) -> u32 {
        match self {
            Self::Latency => 1,
            Self::Throughput => 4,
        }
    }
}

/// The configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Virtual CPUs of a guest; follows the profile, else the spec's limits, if none.
    pub vcpus: Option<u32>,
    /// What guests are to be good at.
    pub profile: Option<Profile>,
    /// Memory of a guest, MiB; follows the spec's limits if none.
    pub memory_mib: Option<u64>,
    /// Guests' memory comes out of the host's huge pages.
    pub hugepages: bool,
    /// The guest's kernel, if not one of the usual places.
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs, if not one of the usual places.
    pub initrd: Option<PathBuf>,
    /// A folder with `vmlinux` and `initrd.img`, and for debug mode `initrd-debug.img`.
    pub image_dir: Option<PathBuf>,
    /// How instructions are executed.
    pub accel: Accel,
    /// What carries guests' vsock.
    pub vsock: Vsock,
    /// The board, and with it the VMM.
    pub board: Board,
    /// QEMU's program; searched in PATH if it has no slash.
    pub qemu: PathBuf,
    /// Who QEMU runs as (uid, gid).
    pub qemu_user: (u32, u32),
    /// virtiofsd's program, if not one of the usual places.
    pub virtiofsd: Option<PathBuf>,
    /// Parameters of the guest's kernel beside husk's own, of those that may be given.
    pub kernel_params: Vec<String>,
    /// Guests are ones to look into: a shell on the console, processes in the VM itself, verbose logs.
    pub debug: bool,
    /// Least severe level of the guest's init that comes to the shim's log.
    pub log_level: tracing::Level,
    /// From QEMU's start to the guest's hello.
    pub boot_timeout: Duration,
    /// For one call to the guest.
    pub call_timeout: Duration,
    /// How often a guest tells that it turns. One that misses three is killed.
    pub heartbeat: Duration,
    /// MiB that a sandbox's extras may have together.
    pub extras_max_mib: u64,
    /// The `io.husk.` annotations that a sandbox may use.
    pub allowed_annotations: Vec<String>,
    /// How the metadata service signs.
    pub tokens: TokenSettings,
    /// The folder whose files may be workspaces; none may if none.
    pub workspace_dir: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vcpus: None,
            profile: None,
            memory_mib: None,
            hugepages: false,
            kernel: None,
            initrd: None,
            image_dir: None,
            accel: Accel::Auto,
            vsock: Vsock::Auto,
            board: Board::default(),
            qemu: "qemu-system-x86_64".into(),
            // nobody and nogroup, by their numbers on every Linux distribution.
            qemu_user: (65534, 65534),
            virtiofsd: None,
            kernel_params: Vec::new(),
            debug: false,
            log_level: tracing::Level::WARN,
            boot_timeout: Duration::from_secs(60),
            call_timeout: Duration::from_secs(60),
            heartbeat: Duration::from_secs(10),
            extras_max_mib: 64,
            allowed_annotations: NAMES
                .into_iter()
                .filter(|name| !NOT_BY_DEFAULT.contains(name))
                .map(str::to_owned)
                .collect(),
            tokens: TokenSettings { key: METADATA_KEY.into(), lifetime: TOKEN_LIFETIME },
            workspace_dir: None,
        }
    }
}

/// What an operator decides about tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSettings {
    /// The file of the host's key.
    pub key: PathBuf,
    /// How long a token is good for.
    pub lifetime: Duration,
}
