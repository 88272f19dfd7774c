//! Names of the kernel parameters that the shim passes to the init (`name=value` on the guest's kernel command line).

/// Prefix of every parameter for the init.
pub const PREFIX: &str = "husk.";
/// Least severe level of the log lines that the init sends to the host: `off`, `error`, `warn`, `info`, `debug` or
/// `trace`.
pub const LOG: &str = "husk.log";
/// The guest's host name.
pub const HOSTNAME: &str = "husk.hostname";
/// The host's wall clock at the guest's start, nanoseconds since 1970.
pub const EPOCH_NS: &str = "husk.epoch_ns";
/// The host's vsock port for this guest's `Hello`.
pub const READY_PORT: &str = "husk.ready_port";
/// Interval between two heartbeats, milliseconds.
pub const HEARTBEAT_MS: &str = "husk.heartbeat_ms";
/// `1` boots the guest in debug mode.
pub const DEBUG: &str = "husk.debug";
/// virtio serial of the extras disk.
pub const EXTRAS: &str = "husk.extras";
/// `1` makes the init run the supervisor agent.
pub const SUPERVISOR: &str = "husk.supervisor";

/// Longest host name, bytes (`HOST_NAME_MAX`, sethostname(2)).
const HOSTNAME_MAX: usize = 64;

/// Whether a text can be the value of [`HOSTNAME`]: it must be one word of the kernel command line.
pub fn is_hostname(name: &str) -> bool {
    (1..=HOSTNAME_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}
