//! The fuzz targets of husk's host side. A target is a function of bytes that must not panic, hang or leak.
//!
//! `./task fuzz -- SECONDS [TARGET]...` or `./task fuzz -- --inputs COUNT [TARGET]...` runs them under libFuzzer.
//! `tests/corpora.rs` replays their corpora, which hold an example of each kind of input and every input that has ever
//! found a fault.

#![allow(clippy::expect_used, reason = "a failed expectation is a fault of the target")]

mod rings;

/// A target.
type Target = fn(&[u8]);

/// The targets, by name: a program in `fuzz_targets/`, and a folder of inputs in `corpus/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("annotations", husk_shim::fuzz::annotations),
    ("answers", husk_shim::fuzz::answers),
    ("config", husk_shim::fuzz::config),
    ("console", husk_shim::fuzz::console),
    ("events", husk_shim::fuzz::events),
    ("exec", husk_shim::fuzz::exec),
    ("extras", husk_shim::fuzz::extras),
    ("hello", husk_shim::fuzz::hello),
    ("helper", husk_shim::fuzz::helper),
    ("limits", husk_shim::fuzz::limits),
    ("machine", husk_shim::fuzz::machine),
    ("metadata", husk_shim::fuzz::metadata),
    ("options", husk_shim::fuzz::options),
    ("relays", husk_shim::fuzz::relays),
    ("reports", husk_shim::fuzz::reports),
    ("rings", rings::run),
    ("spec", husk_shim::fuzz::spec),
    ("state", husk_shim::fuzz::state),
    ("streams", husk_shim::fuzz::streams),
    ("uri", husk_shim::fuzz::uri),
];

/// Runs a target.
///
/// # Panics
///
/// When the target finds a fault, or does not exist.
pub fn run(target: &str, bytes: &[u8]) {
    let (_, run) = TARGETS.iter().find(|(name, _)| *name == target).expect("a target of the table");
    run(bytes);
}
