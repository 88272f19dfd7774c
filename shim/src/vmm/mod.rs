//! What runs virtual machines: the interface to a VMM, the factory that chooses one, and what every VMM needs of the
//! host and of the guest's kernel.
//!
//! | file                | contents                                                                             |
//! |---------------------|--------------------------------------------------------------------------------------|
//! | `machine.rs`        | the [`Vmm`] and [`Machine`] traits, and the [`Spec`] of a machine                    |
//! | `error.rs`          | why a machine does not start                                                         |
//! | `factory.rs`        | the boards, the programs and the constructors of the VMMs; declares each VMM's folder |
//! | `kernel_cmdline.rs` | the guest kernel's command line (pure)                                               |
//! | `boot_file.rs`      | opens and verifies the kernel and the initramfs                                      |
//! | `hugepages.rs`      | the host's free huge pages                                                           |
//! | `tsc.rs`            | the frequency of the host's time stamp counter                                       |
//!
//! A new VMM is one folder here, its boards and one arm of each `match` in the factory, and its configuration keys.
//! Nothing here imports the other folders except `host` and `network`. Calls to the guest are in `guest`; the life of a VM is in
//! `vm`.

mod boot_file;
mod error;
pub(crate) mod factory;
pub mod hugepages;
pub mod kernel_cmdline;
mod machine;
pub mod tsc;

pub use error::VmmError;
pub use factory::Board;
pub use machine::{Accel, Cache, Disk, GuestParams, Machine, NicEnd, PluggedDisk, Sockets, Spec, Vmm};
