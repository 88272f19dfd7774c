//! `regex-lite` under the name of `regex`, which `[patch.crates-io]` in the workspace's Cargo.toml puts in its place.
//!
//! The runtime spec's types and libcontainer each check one or two short ASCII fields with an expression. The engines,
//! the literal searchers and the Unicode tables of `regex` would take a tenth of the guest's init, and every VM keeps
//! the init in memory. `regex-lite` comes from the same authors, has the same interface, and matches only ASCII with
//! `\d`, `\s` and `\w`.

pub use regex_lite::*;
