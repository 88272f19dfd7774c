//! husk's host side: boots a virtual machine for each sandbox and forwards containerd's calls to the guest.
//!
//! | module            | content                                                                     |
//! |-------------------|-----------------------------------------------------------------------------|
//! | `serve`           | the shim's three modes: `start`, server, `delete`                           |
//! | `waiting`         | the shim that boots a VM for the pool and waits with it                     |
//! | `claim`           | how `start` gets a VM from the pool                                         |
//! | `task_service`    | containerd's Task service                                                   |
//! | `ctl`             | the operator's JSON-RPC                                                     |
//! | `sandbox`         | the containers and processes of one VM                                      |
//! | `prepare`         | turns a bundle and the configuration into a plan of the VM                  |
//! | `vm`              | the running VM: its boot, virtiofsd, host cgroup                            |
//! | `vmm`             | the programs that run virtual machines                                      |
//! | `guest`           | connections to the guest, and its reports                                   |
//! | `forward`         | connections between the host's programs and the VM                          |
//! | `metadata`        | the metadata service for guests                                             |
//! | `extras`          | the disk with the operator's files and the supervisor agent                 |
//! | `disks`           | images on the host that become disks of a VM                                |
//! | `rootfs`          | the share with the containers' root filesystems, and the guest's spec       |
//! | `stdio`           | the standard streams of processes                                           |
//! | `console`         | the guest's console and logs                                                |
//! | `pool`            | who waits in the pool, and how one is claimed                               |
//! | `config`          | the configuration file and the annotations                                  |
//! | `containerd`      | command line, start protocol, events and log                                |
//! | `state`           | the state on disk, and the steps that undo it                               |
//! | `fuzz`            | what the fuzz targets run                                                   |
//! | `host`            | the host's processes, children, hooks and sockets                           |
//!
//! Imports run downwards: `waiting` → `serve` → `claim`, `task_service` → `ctl` → `sandbox` → `prepare` → `vm` →
//! `metadata`, `extras`, `guest`, `rootfs`, `stdio`, `console` → `config`, `containerd`, `state` → `vmm`, `host`. The
//! VM's device for vsock is a crate of its own, `husk-vsock`.

mod claim;
pub mod config;
pub mod console;
pub mod containerd;
pub mod ctl;
pub mod disks;
pub mod extras;
mod forward;
#[doc(hidden)]
pub mod fuzz;
mod guest;
pub mod host;
pub mod metadata;
mod network;
pub mod pool;
pub mod prepare;
mod rootfs;
mod sandbox;
mod sandbox_service;
pub mod serve;
pub mod state;
mod stdio;
mod task_service;
pub mod vm;
pub mod vmm;
pub mod waiting;

pub use network::copied_sysctls;
