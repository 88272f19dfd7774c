//! What the fuzz targets in `shim/fuzz/` run: each function reads bytes as the named part of husk does, and checks what
//! must hold of the result. None of them touches the system.
//!
//! | file         | whose bytes                                                                          |
//! |--------------|--------------------------------------------------------------------------------------|
//! | `mod.rs`     | those of containerd, its clients and operators                                       |
//! | `reports.rs` | the guest's: the hello, heartbeats, log lines and supervisor status; console; logs   |
//! | `calls.rs`   | the guest's: answers to calls, and streams                                           |
//! | `events.rs`  | the guest's: events                                                                  |
//! | `relays.rs`  | the guest's: relayed connections, and requests to the metadata service               |
//! | `wire.rs`    | the connections, in memory, and the runtime                                          |
//! | `checks.rs`  | what must hold of texts and log lines                                                |

#![allow(clippy::expect_used, reason = "a failed expectation is a fault of the target")]

mod calls;
mod checks;
mod events;
mod relays;
mod reports;
mod wire;

use std::collections::HashMap;
use std::path::Path;

use crate::config::{annotations, extras, load, settings::Config};
use crate::containerd::options;
use crate::rootfs::spec::{parse, resources};
use crate::state::store;
use crate::stdio;

pub use calls::{answers, streams};
pub use events::events;
pub use relays::{metadata, relays};
pub use reports::{console, hello, helper, machine, reports};

/// A bundle's `config.json`. The spec that is understood is understood again.
pub fn spec(bytes: &[u8]) {
    if let Ok(parsed) = parse::parse(bytes) {
        let again = serde_json::to_vec(&parsed.spec).map(|json| parse::parse(&json).is_ok());
        assert!(matches!(again, Ok(true)), "a spec that husk has written is not one: {again:?}");
    }
}

/// The process of an exec.
pub fn exec(bytes: &[u8]) {
    if let Ok(Some((json, _))) = parse::parse_exec(bytes) {
        assert!(matches!(parse::parse_exec(&json), Ok(None)), "an exec that husk has written has more to remove");
    }
}

/// The limits of an Update call.
pub fn limits(bytes: &[u8]) {
    let _ = resources::update(bytes);
}

/// Annotations: lines of a name, a space and a value.
pub fn annotations(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let given: HashMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    if let Err(problems) = annotations::read(&given, &Config::default(), "ns") {
        assert!(!problems.is_empty(), "annotations are rejected without a reason");
    }
}

/// The annotation that lists files for the guest.
pub fn extras(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = extras::parse(text);
    }
}

/// The address of a stream.
pub fn uri(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        stdio::parse_address(text);
    }
}

/// Runtime options: the type's name, a zero byte, and the message.
pub fn options(bytes: &[u8]) {
    let (name, value) = bytes.split_at(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
    let any = protobuf::well_known_types::any::Any {
        type_url: String::from_utf8_lossy(name).into_owned(),
        value: value.get(1..).unwrap_or_default().to_vec(),
        ..Default::default()
    };
    let _ = options::read(Some(&any));
}

/// The configuration file.
pub fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = load::parse_valid(text, Path::new("/config.toml"));
    }
}

/// A sandbox's `state.json`. What is understood is understood again.
pub fn state(bytes: &[u8]) {
    store::reread(bytes);
}
