//! Relays connections between programs of the host and the VM, over vsock: see `husk_protos::relay`.
//!
//! | file         | content                                                                                      |
//! |--------------|----------------------------------------------------------------------------------------------|
//! | `address.rs` | TCP connections inside the sandbox's network namespace, such as those of `kubectl port-forward` |
//! | `socket.rs`  | Unix sockets of the host that containers mount                                               |

pub(crate) mod address;
pub(crate) mod socket;

use tokio::task::AbortHandle;

/// Most connections of a sandbox that are relayed at a time, for each of the two kinds. Further ones wait to be
/// accepted. A connection takes three descriptors: all together stay below `host::child::FIRST_FD`, and below 1024, the
/// usual limit.
const CONNECTIONS_MAX: usize = 128;

/// A task that ends when this is dropped.
#[derive(Debug)]
struct Running(AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}
