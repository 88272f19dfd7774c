//! The host's operating system. Nothing here depends on VMs.
//!
//! | file         | content                                                     |
//! |--------------|-------------------------------------------------------------|
//! | `process.rs` | identifies processes reliably, and kills them               |
//! | `cgroup/`    | cgroups: their users, limits and removal                    |
//! | `child.rs`   | starts programs that must not outlive the shim              |
//! | `clients.rs` | the connections of a server                                 |
//! | `digest.rs`  | digests of files, and copies that nobody can change         |
//! | `jail/`      | separates a program from the host                           |
//! | `thread.rs`  | work that changes what threads share                        |
//! | `holder.rs`  | the process that represents a container on the host         |
//! | `id_map.rs`  | mappings of users and groups                                |
//! | `hooks.rs`   | runs OCI hooks                                              |
//! | `socket.rs`  | unix sockets in the sandbox's directory                     |
//! | `unix.rs`    | unix sockets of other programs                              |
//! | `usage.rs`   | CPU time and memory of processes                            |
//! | `xattr.rs`   | extended attributes of files                                |
//! | `blocked.rs` | whether a process serves its requests                       |
//! | `run_delay.rs` | how long threads wait for a CPU                           |
//! | `lock.rs`    | locks of files that their last user removes                 |
//! | `open_files.rs` | limits and numbers of open files                         |
//! | `inotify.rs` | changes of folders and files                                |
//! | `text.rs`    | text that others have written                               |
//! | `rate.rs`    | limits how often something happens                          |

pub(crate) mod background;
pub(crate) mod blocked;
pub(crate) mod cgroup;
pub(crate) mod child;
pub(crate) mod clients;
pub mod digest;
pub(crate) mod holder;
pub(crate) mod hooks;
pub(crate) mod id_map;
pub(crate) mod inotify;
pub mod jail;
#[cfg(test)]
mod jail_tests;
pub(crate) mod lock;
pub mod open_files;
pub mod process;
pub(crate) mod rate;
pub(crate) mod run_delay;
pub mod socket;
pub mod text;
pub(crate) mod thread;
pub(crate) mod unix;
pub(crate) mod usage;
pub(crate) mod xattr;
