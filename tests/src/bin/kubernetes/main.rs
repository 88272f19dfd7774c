//! Kubernetes under runc and under husk: critest, the test suite of the Container Runtime Interface, on a node, pods
//! on a cluster of one node, and husk's installation on one.
//!
//! `kubernetes [--kubernetes VERSION] [--only SUITE]... [--match TEXT] [--jobs N] [--update]` runs every test under both,
//! prints a table of the differences and compares all results with `tests/kubernetes/expected.tsv`. It fails if anything
//! differs from that file. The suites `stress` and `stress-shim`, which take long, run only if `--only` names them.

#[cfg(not(target_env = "musl"))]
mod cluster;
#[cfg(not(target_env = "musl"))]
mod critest;
#[cfg(not(target_env = "musl"))]
mod daemon;
#[cfg(not(target_env = "musl"))]
mod install;
#[cfg(not(target_env = "musl"))]
mod node;
#[cfg(not(target_env = "musl"))]
mod outcome;
#[cfg(not(target_env = "musl"))]
mod pods;
#[cfg(not(target_env = "musl"))]
mod run;
#[cfg(not(target_env = "musl"))]
mod stress;
#[cfg(not(target_env = "musl"))]
mod traces;

#[cfg(not(target_env = "musl"))]
fn main() -> std::process::ExitCode {
    use std::io::Write;

    let words: Vec<String> = std::env::args().skip(1).collect();
    run::main(&words).unwrap_or_else(|error| {
        // Nobody is left to tell if stderr is closed.
        let _ = writeln!(std::io::stderr(), "{error:#}");
        std::process::ExitCode::FAILURE
    })
}

/// Cargo builds all programs of the crate when it builds one for the guest. This program does not run there.
#[cfg(target_env = "musl")]
fn main() {}
