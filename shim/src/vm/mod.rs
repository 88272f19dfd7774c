//! A running VM: its boot, its processes, its death and its end.
//!
//! | file            | contents                                                                   |
//! |-----------------|----------------------------------------------------------------------------|
//! | `plan.rs`       | everything that a boot needs                                               |
//! | `boot.rs`       | the boot, step by step                                                     |
//! | `adopt.rs`      | what a VM becomes part of: its sandbox's identity, cgroup and network       |
//! | `identity.rs`   | whose VM it is, for the metadata service                                   |
//! | `place.rs`      | the cgroup and the OOM score of its processes                              |
//! | `hello.rs`      | the wait for the guest's hello, or for the end of one of the VM's processes |
//! | `ready.rs`      | from the hello to a guest that is ready for containers                     |
//! | `running.rs`    | a VM whose guest is ready: stopping it                                     |
//! | `enforce.rs`    | what happens if the guest does not do in time what it has to               |
//! | `processes.rs`  | its processes on the host                                                  |
//! | `death.rs`      | when and why a VM is dead                                                  |
//! | `virtiofsd.rs`  | the process that serves the share                                          |
//! | `share_health.rs` | whether it serves the share                                              |
//! | `open_files.rs` | its limit of open files                                                    |
//! | `user.rs`       | the user of the machine's process                                          |
//! | `network.rs`    | connects the VM to its sandbox's network namespace                         |
//! | `follow.rs`     | passes the namespace's changes on to the guest                             |
//! | `connections.rs` | the status of its network                                                  |
//! | `memory.rs`     | more memory than it has booted with, and less of the host's                |
//! | `memory_target.rs` | what a balloon leaves the guest                                          |
//! | `cgroup.rs`     | the host cgroup of the VM's processes                                      |
//! | `affinity.rs`   | on which of the host's CPUs its virtual CPUs run                           |
//! | `error.rs`      | why a VM did not boot                                                      |
//! | `on_failure.rs` | undoing a step unless the boot succeeds                                    |

mod adopt;
pub(crate) mod affinity;
mod boot;
pub(crate) mod cgroup;
mod connections;
mod death;
mod enforce;
mod error;
mod follow;
mod hello;
mod identity;
mod memory;
mod memory_target;
mod network;
mod on_failure;
mod open_files;
mod place;
mod plan;
mod processes;
mod ready;
mod running;
mod share_health;
mod user;
pub(crate) mod virtiofsd;

pub use affinity::AffinityError;
pub use error::BootError;
pub use follow::FollowError;
pub use memory::GrowthError;
pub(crate) use open_files::OpenFiles;
pub use plan::BootPlan;
pub(crate) use running::DELIVERY;
pub use running::{StillRunning, Vm};
