//! What travels between husk's host and guest: generated messages and stubs, ports, limits and frames.
//!
//! No behaviour of either side lives here.

pub mod chain;
pub mod extras;
pub mod frame;
pub mod lock;
pub mod metered;
pub mod param;

#[allow(missing_docs, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{
    bundle, bundle_ttrpc, debug, debug_ttrpc, events, events_ttrpc, metadata, metadata_ttrpc, report, runc_options,
    stdio, stdio_ttrpc, system, system_ttrpc,
};
pub use {protobuf, ttrpc};

/// Version of the wire between host and guest. A host refuses a guest that says another one in its `Hello`.
pub const PROTOCOL: u32 = 3;

/// CID by which a guest reaches its host (`VMADDR_CID_HOST`, vsock(7)).
pub const HOST_CID: u32 = 2;

/// Guest port: containerd's Task service, husk's System and Bundle, and in debug mode its Debug.
pub const PORT_TASK: u32 = 1024;
/// Guest port: the Stdio service, one stream a connection.
pub const PORT_STDIO: u32 = 1025;
/// Host port: a guest that is ready connects here, sends one `Hello` frame, and then `Report` frames as long as it lives.
pub const PORT_READY: u32 = 1026;
/// Guest port: the Events service.
pub const PORT_EVENTS: u32 = 1027;
/// Host port: the Metadata service.
pub const PORT_METADATA: u32 = 1027;

/// Most bytes in one chunk of a stdio stream. Not more, because the guest's allocator (musl's mallocng) asks the kernel for memory for each
/// block of 26 KiB or more, and gives it back at once: with chunks of 32 KiB that took more time than all else about them.
pub const STDIO_CHUNK: usize = 24 * 1024;
/// Bytes of one connection that may be read from its socket but not yet be consumed: see [`metered`].
pub const RECEIVE_WINDOW: usize = 256 * 1024;

/// containerd's type of what a task uses.
pub const METRICS: &str = "io.containerd.cgroups.v2.Metrics";
/// containerd's type of what is known of one of a task's processes.
pub const PROCESS_DETAILS: &str = "containerd.runc.v1.ProcessDetails";

/// Tag of the virtio-fs share that holds the containers' root filesystems and bind mounts.
pub const SHARE_TAG: &str = "husk";
/// Where the guest mounts the share.
pub const SHARE_PATH: &str = "/run/husk/share";

/// The sandbox annotation that lets containers use AF_VSOCK; its value is `true` or `false`.
pub const ANNOTATION_VSOCK: &str = "io.husk.vsock";
/// The guest cgroup that holds every container, as `linux.cgroupsPath` of an OCI spec writes it.
pub const CONTAINERS_CGROUP: &str = "/containers";
/// Prefix of the console line with which the init reports why it gives up.
pub const FATAL_PREFIX: &str = "husk: fatal: ";
