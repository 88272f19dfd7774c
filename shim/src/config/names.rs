//! The names that operators and users write: the configuration file and the annotations.

/// The configuration file, unless `HUSK_CONFIG` names another one.
pub(crate) const PATH: &str = "/etc/husk/config.toml";
/// The environment variable that names another configuration file.
pub(crate) const PATH_ENV: &str = "HUSK_CONFIG";

/// Prefix of every annotation of husk.
pub(crate) const PREFIX: &str = "io.husk.";
/// Number of virtual CPUs.
pub(crate) const VCPUS: &str = "io.husk.vcpus";
/// `latency` or `throughput`.
pub(crate) const PROFILE: &str = "io.husk.profile";
/// The guest's memory, MiB.
pub(crate) const MEMORY_MIB: &str = "io.husk.memory_mib";
/// Memory that the guest is to get by with unless it runs short, MiB.
pub(crate) const BALLOON_TARGET_MIB: &str = "io.husk.balloon_target_mib";
/// Number of network cards for links that appear after the boot.
pub(crate) const SPARE_NICS: &str = "io.husk.network_spare_nics";
/// Debug mode: a shell on the console, and processes in the VM itself. Allowed by default: only the host's root can
/// connect to either, so the annotation gives its author no access, and the guest that it exposes is the sandbox's own.
pub(crate) const DEBUG: &str = "io.husk.debug";
/// Allows containers to use AF_VSOCK. The guest reads it.
pub(crate) const VSOCK: &str = husk_protos::ANNOTATION_VSOCK;
/// Files of the host for the guest itself.
pub(crate) const EXTRAS_FILES: &str = "io.husk.extras.files";
/// Whether the supervisor agent of the extras runs.
pub(crate) const SUPERVISOR: &str = "io.husk.supervisor";
/// The workspace configuration, or a file that contains it. It may hold secrets, so only the metadata service gets it.
pub(crate) const WORKSPACE: &str = "io.husk.workspace";

/// `none` or `user`: the network of a sandbox whose spec names no network namespace.
pub(crate) const NETWORK: &str = "io.husk.network";
/// Ports of the host that lead to the guest, with user-mode networking.
pub(crate) const PORTS: &str = "io.husk.ports";

/// Destinations of bind mounts whose changes by the host programs in the guest notice.
pub(crate) const WATCH: &str = "io.husk.watch";

/// Files of the host that become disks with a filesystem, which the container mounts.
pub(crate) const VOLUMES: &str = "io.husk.volumes";
/// The size of a disk for data that ends with the VM, MiB.
pub(crate) const SCRATCH_MIB: &str = "io.husk.scratch_mib";

/// The guest encrypts that disk with a key of its own.
pub(crate) const SCRATCH_ENCRYPTED: &str = "io.husk.scratch_encrypted";

/// The root hashes that the verified layers of a container's root filesystem may have.
pub(crate) const ROOT_HASHES: &str = "io.husk.root_hashes";

/// `virtiofs`, `overlay`, `erofs` or `auto`: how the guest gets the root filesystem.
pub(crate) const ROOTFS: &str = "io.husk.rootfs";

/// All annotations.
pub(crate) const NAMES: [&str; 18] = [
    VCPUS,
    PROFILE,
    MEMORY_MIB,
    BALLOON_TARGET_MIB,
    SPARE_NICS,
    DEBUG,
    VSOCK,
    NETWORK,
    PORTS,
    WATCH,
    VOLUMES,
    SCRATCH_MIB,
    SCRATCH_ENCRYPTED,
    ROOT_HASHES,
    ROOTFS,
    WORKSPACE,
    EXTRAS_FILES,
    SUPERVISOR,
];
/// The annotations that an operator must allow by name. With this one, everyone who may start a container can read any
/// file of the host as root.
pub(crate) const DENIED_BY_DEFAULT: [&str; 1] = [EXTRAS_FILES];

/// The environment variable of a shim whose cgroup the runtime's options name.
pub(crate) const PLACED_ENV: &str = "HUSK_SHIM_PLACED";
