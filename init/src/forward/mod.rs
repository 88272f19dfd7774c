//! Relays connections between the VM and the host.
//!
//! | file         | contents                                                          |
//! |--------------|-------------------------------------------------------------------|
//! | `address.rs` | TCP connections and DNS queries from the host to an address of the VM |
//! | `host.rs`    | connections of containers to destinations on the host             |
//! | `names.rs`   | DNS queries to a server on the host                               |
//! | `redirect.rs` | brings these queries here                                        |
//! | `socket.rs`  | Unix sockets of the host that containers mount                    |

pub(crate) mod address;
mod host;
pub(crate) mod names;
mod redirect;
pub(crate) mod socket;

use tokio::task::AbortHandle;

/// Most connections that are relayed at a time, for each of the two kinds. Further ones wait to be accepted. PID 1
/// needs some 40 KiB for each.
pub(crate) const CONNECTIONS_MAX: usize = 128;
/// Most DNS queries to the host that are relayed at a time. Further ones wait. The host relays no more.
const QUERIES_MAX: usize = 16;

/// Tasks that listen. Dropping them ends their connections.
#[derive(Debug, Default)]
struct Listeners(Vec<AbortHandle>);

impl Drop for Listeners {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}
