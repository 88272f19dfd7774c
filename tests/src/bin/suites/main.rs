//! Public test suites under runc's shim and under husk: containerd's client tests and the OCI runtime-tools.
//!
//! `suites [--only SUITE] [--match TEXT] [--except TEXT] [--jobs N] [--update]` runs every test under both, prints a table of the
//! differences and compares all results with `tests/suites/expected.tsv`. It fails if anything differs from that file.
//!
//! With `create`, `start`, `state`, `kill` or `delete` as its first argument it is the runtime that the OCI
//! runtime-tools call: see `adapter`.

#[cfg(not(target_env = "musl"))]
mod adapter;
#[cfg(not(target_env = "musl"))]
mod client;
#[cfg(not(target_env = "musl"))]
mod place;
#[cfg(not(target_env = "musl"))]
mod run;
#[cfg(not(target_env = "musl"))]
mod validation;

#[cfg(not(target_env = "musl"))]
fn main() -> std::process::ExitCode {
    use std::io::Write;
    use std::process::ExitCode;

    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.split_first() {
        Some((action, rest)) if adapter::ACTIONS.contains(&action.as_str()) => {
            adapter::main(action, rest).map(|()| ExitCode::SUCCESS)
        }
        _ => run::main(&words),
    };
    done.unwrap_or_else(|error| {
        // Nobody is left to tell if stderr is closed.
        let _ = writeln!(std::io::stderr(), "{error:#}");
        ExitCode::FAILURE
    })
}

/// Cargo builds all programs of the crate when it builds one for the guest. This program does not run there.
#[cfg(target_env = "musl")]
fn main() {}
