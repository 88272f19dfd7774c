//! Names that an operator or a user writes: the configuration file and the annotations.

/// The configuration file, unless `HUSK_CONFIG` names another one.
pub const PATH: &str = "/etc/husk/config.toml";
/// The environment variable that names another configuration file.
pub const PATH_ENV: &str = "HUSK_CONFIG";

/// Prefix of every annotation of husk.
pub const PREFIX: &str = "io.husk.";
/// Number of virtual CPUs.
pub const VCPUS: &str = "io.husk.vcpus";
/// `latency` or `throughput`.
pub const PROFILE: &str = "io.husk.profile";
/// The guest's memory, MiB.
pub const MEMORY_MIB: &str = "io.husk.memory_mib";
/// A shell on the console, and processes in the VM itself. Allowed by default as the others are: whoever writes it gets at neither, both are
/// behind sockets of the host's root; and the guest that it opens to them is the sandbox's own.
pub const DEBUG: &str = "io.husk.debug";
/// Read by the guest: lets a container use AF_VSOCK.
pub const VSOCK: &str = husk_protos::ANNOTATION_VSOCK;
/// Files of the host for the guest itself.
pub const EXTRAS_FILES: &str = "io.husk.extras.files";
/// Whether the supervisor agent runs, which extras bring.
pub const SUPERVISOR: &str = "io.husk.supervisor";
/// May hold secrets, or name a file that does: it is for the metadata service alone.
pub const WORKSPACE: &str = "io.husk.workspace";

/// All that there are.
pub const NAMES: [&str; 8] = [VCPUS, PROFILE, MEMORY_MIB, DEBUG, VSOCK, WORKSPACE, EXTRAS_FILES, SUPERVISOR];
/// Those that an operator has to allow by name: with this one, whoever may start a container reads any file of the host, as root.
pub const NOT_BY_DEFAULT: [&str; 1] = [EXTRAS_FILES];
