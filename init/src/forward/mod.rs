//! Relays connections between the VM and the host.
//!
//! | file         | contents                                                          |
//! |--------------|-------------------------------------------------------------------|
//! | `address.rs` | TCP connections from the host to an address of the VM             |
//! | `socket.rs`  | Unix sockets of the host that containers mount                    |

pub(crate) mod address;
pub(crate) mod socket;

/// Most connections that are relayed at a time, for each of the two kinds. Further ones wait to be accepted. PID 1
/// needs some 40 KiB for each.
pub(crate) const CONNECTIONS_MAX: usize = 128;
