//! tests
// The programs for bare test VMs (`src/bin/`) are built for musl, without the harness.
#![cfg(not(target_env = "musl"))]

pub mod pattern;
pub mod vm;
