//! The pool: VMs that have booted and wait for a sandbox, each with a shim of its own.
//!
//! `start` claims a waiting shim and gives it the sandbox's name and the socket that containerd will connect to. No
//! process, VM or device changes hands, and containerd sees the address only.
//!
//! | file          | content                                                                       |
//! |---------------|-------------------------------------------------------------------------------|
//! | `request.rs`  | what kind of VM is to wait                                                    |
//! | `members.rs`  | who waits: joining within the limits, claiming one, ending and sweeping       |
//! | `handover.rs` | the message from `start` to the shim that it has claimed                      |
//! | `launch.rs`   | starts shims that wait                                                        |
//!
//! `prepare::pooled` has the key that decides whom a VM may serve, `waiting.rs` is the shim that waits.

pub(crate) mod handover;
pub mod launch;
pub mod members;
pub mod request;
