//! The protocol between husk's host and guest, without the behavior of either side.
//!
//! | file         | content                                                              |
//! |--------------|----------------------------------------------------------------------|
//! | `proto/`     | messages and services, from which `build.rs` generates code          |
//! | `lib.rs`     | ports, limits and names that both sides use                          |
//! | `frame.rs`   | length-prefixed messages on connections without TTRPC                |
//! | `metered.rs` | backpressure for TTRPC streams                                       |
//! | `unknown.rs` | answers calls of services that a TTRPC server does not have          |
//! | `relay.rs`   | byte streams between host and guest                                  |
//! | `streams.rs` | raw streams of processes                                             |
//! | `datagram.rs` | datagrams between host and guest                                    |
//! | `nftables/`  | redirects of connections, as messages for the kernel                 |
//! | `extras.rs`  | the format of the extras disk                                        |
//! | `connections.rs` | counts open connections                                          |
//! | `changes.rs` | changes of the host's files, for programs in the guest that watch    |
//! | `param.rs`   | names of kernel parameters                                           |
//! | `chain.rs`   | prints an error with its causes                                      |
//! | `lock.rs`    | locking without poison                                               |
//! | `mac.rs`     | formats MAC addresses                                                |

use std::net::{Ipv4Addr, SocketAddrV4};

pub mod chain;
pub mod changes;
pub mod connections;
pub mod datagram;
pub mod extras;
pub mod frame;
pub mod lock;
pub mod mac;
pub mod metered;
pub mod nftables;
pub mod param;
pub mod relay;
pub mod streams;
pub mod unknown;

#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::too_many_lines)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{
    bundle, bundle_ttrpc, cri, debug, debug_ttrpc, disks, disks_ttrpc, events, events_ttrpc, metadata, metadata_ttrpc,
    network, network_ttrpc, report, runc_options, runtime_options, sandbox_update, stdio, stdio_ttrpc, system,
    system_ttrpc,
};
pub use {protobuf, ttrpc};

/// Version of the protocol. The host rejects a guest whose `Hello` has another one.
pub const PROTOCOL: u32 = 11;

/// Length of [`Hello.secret`](system::Hello::secret), bytes.
pub const SECRET: usize = 32;

/// The NICs that the guest's kernel leaves alone until a link needs them: a list of MAC addresses with commas, as a
/// parameter of the kernel and as the file of the running kernel that shows and changes it
/// (kernel-config/patches/virtio-net-held.patch).
pub const HELD_NICS: (&str, &str) = ("virtio_net.held", "module/virtio_net/parameters/held");

/// The host's CID as seen from a guest (`VMADDR_CID_HOST`, vsock(7)).
pub const HOST_CID: u32 = 2;

/// Guest port: containerd's Task service, husk's Bundle, Network and System services, and Debug in debug mode.
pub const PORT_TASK: u32 = 1024;
/// Guest port: the Stdio service, one stream per connection.
pub const PORT_STDIO: u32 = 1025;
/// Host port: when a guest is ready, it connects here and sends one `Hello` frame, followed by `Report` frames.
pub const PORT_READY: u32 = 1026;
/// Guest port: the Events service.
pub const PORT_EVENTS: u32 = 1027;
/// Host port: the Metadata service.
pub const PORT_METADATA: u32 = 1027;
/// Guest port: connects to addresses of the VM, one per connection: see [`relay`]. Host port: connects to the host's
/// Unix sockets that are mounted into containers, unless [`PutBundleRequest.relay_port`](bundle::PutBundleRequest) names
/// another one.
pub const PORT_RELAY: u32 = 1028;
/// Host port: DNS queries, one per connection, unless
/// [`ConfigureNetworkRequest.name_server_port`](network::ConfigureNetworkRequest) names another one: see [`relay`].
pub const PORT_NAMES: u32 = 1029;
/// Guest port: raw streams of processes, one per connection: see [`streams`].
pub const PORT_STREAMS: u32 = 1030;

/// Where docker's DNS server is for the containers of its user-defined networks. docker redirects packets to it in the
/// network namespace on the host.
pub const NAME_SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);

/// Largest chunk of a stdio stream, bytes. The guest's allocator (musl's mallocng) maps each block of 26 KiB or more
/// and unmaps it when freed: with chunks of 32 KiB that took longer than everything else done with them.
pub const STDIO_CHUNK: usize = 24 * 1024;
/// Most bytes that may be read from a connection but not yet consumed: see [`metered`].
pub const RECEIVE_WINDOW: usize = 256 * 1024;

/// Type URL of containerd's resource metrics of a task.
pub const METRICS: &str = "io.containerd.cgroups.v2.Metrics";
/// Type URL of containerd's details of a task's process.
pub const PROCESS_DETAILS: &str = "containerd.runc.v1.ProcessDetails";

/// Tag of the virtio-fs share with the containers' root filesystems and bind mounts.
pub const SHARE_TAG: &str = "husk";
/// Where the guest mounts the share.
pub const SHARE_PATH: &str = "/run/husk/share";
/// Folder of the root filesystems that consist of folders of disks: `<container>`.
pub const ROOTS_PATH: &str = "/run/husk/roots";
/// Where the guest mounts the filesystems of disks: a folder for each disk, named after its serial.
pub const DISKS_PATH: &str = "/run/husk/disks";
/// Folder of the guest's relayed Unix sockets: `<container>/<number of the mount in the spec>`.
pub const SOCKETS_PATH: &str = "/run/husk/sockets";
/// The tmpfs in the guest that the containers of a sandbox without a pause container share at `/dev/shm`.
pub const SANDBOX_SHM: &str = "/run/husk/shm";

/// The sandbox annotation that allows containers to use AF_VSOCK: `true` or `false`.
pub const ANNOTATION_VSOCK: &str = "io.husk.vsock";
/// The guest cgroup that contains every container, in the form of `linux.cgroupsPath` in an OCI spec.
pub const CONTAINERS_CGROUP: &str = "/containers";
/// Prefix of the console line in which the init reports why it cannot continue.
pub const FATAL_PREFIX: &str = "husk: fatal: ";
