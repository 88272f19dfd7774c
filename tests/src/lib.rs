//! The harness of husk's end-to-end tests: real containerd, real shims, real VMs, each in a private corner of the machine.
//!
//! The promises themselves are in `tests/tests/`, one file a subject, each test named after what a user would notice. They run
//! against husk, or with `HUSK_TEST_RUNTIME=runc` against runc: what holds for both is known to be a right expectation.

// The programs for bare test VMs (`src/bin/`) are built for musl, without the harness.
#![cfg(not(target_env = "musl"))]

pub mod agent;
pub mod artifacts;
pub mod bundle;
pub mod command;
pub mod containerd;
pub mod debug;
pub mod events;
pub mod fifo;
pub mod guest;
pub mod leftovers;
pub mod operator;
pub mod pattern;
pub mod process;
pub mod pty;
pub mod shim;
pub mod vm;
