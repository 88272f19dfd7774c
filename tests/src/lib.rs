//! Harness of husk's end-to-end tests: real containerd, real shims and real VMs, each isolated from the rest of the
//! machine.
//!
//! The tests are in `tests/tests/`, one file per subject, each named after what a user would notice. They run against
//! husk, or with `HUSK_TEST_RUNTIME=runc` against runc: an expectation that holds for both is the usual one.

// The guest programs of bare test VMs (`src/bin/`) are built for musl, without the harness.
#![cfg(not(target_env = "musl"))]

pub mod agent;
pub mod artifacts;
pub mod bundle;
pub mod cgroup;
pub mod cni;
pub mod command;
pub mod compare;
pub mod containerd;
pub mod cri;
pub mod debian;
pub mod debug;
pub mod docker;
pub mod events;
pub mod expected;
pub mod fifo;
pub mod guest;
pub mod leftovers;
pub mod machine;
pub mod nerdctl;
pub mod netns;
pub mod operator;
pub mod pattern;
pub mod pods;
pub mod process;
pub mod programs;
pub mod pty;
pub mod registry;
pub mod root;
pub mod sandbox_api;
pub mod share;
pub mod shim;
pub mod table;
pub mod verity;
pub mod vm;
mod walk;
