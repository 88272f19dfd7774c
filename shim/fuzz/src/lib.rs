//! The fuzz targets of husk's host side. A target is a function of bytes that must not panic, hang or leak.
//!
//! `./task fuzz -- SECONDS [TARGET]...` or `./task fuzz -- --inputs COUNT [TARGET]...` runs them under libFuzzer.
//! `tests/corpora.rs` replays their corpora, which hold an example of each kind of input and every input that has ever
//! found a fault.

#![allow(clippy::expect_used, reason = "a failed expectation is a fault of the target")]

mod rings;

pub use rings::run as rings;

/// A target.
type Target = fn(&[u8]);

/// The targets, by name: a program in `fuzz_targets/`, and a folder of inputs in `corpus/`. A program names its function
/// itself: so the linker leaves out the other targets, whose counters libFuzzer would read after each input.
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
    ("rings", rings),
    ("spec", husk_shim::fuzz::spec),
    ("state", husk_shim::fuzz::state),
    ("streams", husk_shim::fuzz::streams),
    ("uri", husk_shim::fuzz::uri),
];
