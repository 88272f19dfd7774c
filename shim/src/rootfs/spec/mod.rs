//! Rewrites a container's OCI runtime spec from the host's terms to the guest's. Pure: host paths are looked up through
//! [`Context::inspect`].
//!
//! Fields that a guest cannot honour are rejected, all of them at once. Fields that only protect a host are removed,
//! with a note for the log.
//!
//! | file               | content                                            |
//! |--------------------|----------------------------------------------------|
//! | `parse.rs`         | reads `config.json` and leaves out what is unknown |
//! | `rewrite.rs`       | rewrites the spec, field by field                  |
//! | `mounts.rs`        | mounts: bind mounts move to the share              |
//! | `mount_options.rs` | what becomes of each option of a mount             |
//! | `devices.rs`       | devices: those that every guest has                |
//! | `disks.rs`         | the places of disks in the container               |
//! | `namespaces.rs`    | which namespaces can be joined by path             |
//! | `host_hooks.rs`    | which hooks the host runs                          |
//! | `limits.rs`        | the limits that size a VM                          |
//! | `size.rs`          | the size of the spec itself                        |
//! | `resources.rs`     | what becomes of each field of `linux.resources`    |
//! | `features.rs`      | what of the runtime spec a container can use       |
//! | `context.rs`       | what the rewriting needs to know                   |
//! | `findings.rs`      | problems and notes                                 |

mod context;
mod devices;
mod disks;
pub(crate) mod features;
mod findings;
mod host_hooks;
mod limits;
mod mount_options;
mod mounts;
mod namespaces;
pub(crate) mod parse;
pub(crate) mod resources;
mod rewrite;
mod size;

pub use context::Sibling;
pub(crate) use context::{Context, FileKind, HostFile};
pub(crate) use limits::{Demand, SpecLimits, whole_cpus};
pub(crate) use mounts::{Bind, DirectMount, MountIdMap, SocketMount, propagation};
pub(crate) use rewrite::{HostNetwork, NetworkRequest, Places, Rewritten, rewrite};

#[cfg(test)]
mod tests;
