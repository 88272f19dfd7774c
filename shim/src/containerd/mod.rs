//! containerd's side of the shim: its command line, the start protocol, its events and its log.
//!
//! | file           | content                                                         |
//! |----------------|-----------------------------------------------------------------|
//! | `flags.rs`     | the command line                                                |
//! | `bootstrap.rs` | what containerd passes to `start`, and the reply                |
//! | `address.rs`   | the address of the shim's socket                                |
//! | `options.rs`   | the runtime's options in containerd's configuration             |
//! | `publisher.rs` | sends events to containerd                                      |
//! | `log.rs`       | writes the log in containerd's format                           |
//!
//! The messages come from the crate `containerd-shim-protos`. The crate `containerd-shim` is not used: husk needs only
//! its flags and the name of the socket, which take forty lines here. Its server, publisher, reaper and cgroup support,
//! which husk does not use, bring more than forty crates, most of them for a D-Bus client.

pub(crate) mod address;
pub(crate) mod bootstrap;
pub mod flags;
pub(crate) mod log;
pub(crate) mod options;
pub(crate) mod publisher;
