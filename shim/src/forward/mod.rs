//! Relays connections between programs of the host and the VM, over vsock: see `husk_protos::relay`.
//!
//! | file         | content                                                                                      |
//! |--------------|----------------------------------------------------------------------------------------------|
//! | `address.rs` | TCP connections inside the sandbox's network namespace, such as those of `kubectl port-forward` |
//! | `names.rs`   | DNS queries to and from docker's DNS server                                                  |
//! | `socket.rs`  | Unix sockets of the host that containers mount                                               |

pub(crate) mod address;
pub(crate) mod names;
pub(crate) mod socket;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::relay::status;
use husk_vsock::Stream;
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::guest::link::HostPort;
use crate::network::{Claim, NetworkError};
use crate::state::journal::Journal;
use crate::state::{Owner, StateError, Step};

/// Most connections of a sandbox that are relayed at a time, for each of the two kinds. Further ones wait to be
/// accepted. A connection takes three descriptors, as a DNS query does: all together stay below
/// `host::child::FIRST_FD`, and below 1024, the usual limit.
const CONNECTIONS_MAX: usize = 128;
/// Most DNS queries of a sandbox that are relayed at a time, for each of the two directions. Further ones wait.
const QUERIES_MAX: usize = 16;
/// Time for the guest to take the reply. Its relay reads it at once.
const REPLY: Duration = Duration::from_secs(10);

/// Deadline for the sockets and the rules in a network namespace.
const SET_UP: Duration = Duration::from_secs(10);

/// Why what programs in the network namespace send is not relayed.
#[derive(Debug, thiserror::Error)]
enum RedirectError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("run a thread in the network namespace")]
    Thread(#[from] tokio::task::JoinError),
    #[error("register a socket")]
    Socket(#[from] io::Error),
}

/// Adds rules to the sandbox's network namespace, on a separate thread, after recording that they have to be removed.
async fn add_rules<T: Send + 'static>(
    claim: &Claim,
    sandbox: &str,
    journal: &Journal,
    add: fn(&Claim, &str, Duration) -> Result<T, NetworkError>,
) -> Result<T, RedirectError> {
    let (claim, sandbox) = (claim.clone(), sandbox.to_owned());
    journal.record(&Owner::Sandbox, [Step::Loopback { claim: claim.clone(), sandbox: sandbox.clone() }])?;
    Ok(tokio::task::spawn_blocking(move || add(&claim, &sandbox, SET_UP)).await??)
}

/// A task that ends when this is dropped.
#[derive(Debug)]
struct Running(AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves each of the guest's connections in a task of its own, at most `most` at a time, until the device ends.
/// Dropping it ends the connections.
async fn serve_guest<S: Future<Output = ()> + Send + 'static>(
    mut listener: HostPort,
    most: usize,
    serve: impl Fn(Stream) -> S,
) {
    let slots = Arc::new(Semaphore::new(most));
    let mut connections = JoinSet::new();
    // The semaphore is never closed.
    while let Ok(slot) = slots.clone().acquire_owned().await {
        let guest = loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(guest) => break guest,
                    Err(error) => {
                        tracing::debug!(error = %Chain(&error), "no more connections of the guest");
                        return;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        };
        let served = serve(guest);
        connections.spawn(async move {
            served.await;
            drop(slot);
        });
    }
}

/// Tells the guest whether its destination is connected. A guest that does not read must not keep the connection.
async fn reply<T>(guest: &mut Stream, connected: &io::Result<T>) -> io::Result<()> {
    timeout(REPLY, guest.write_u8(status(connected))).await?
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream as StdStream;

    use tokio::net::UnixStream;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_takes_no_reply_does_not_keep_its_connection() {
        let (mut ours, _theirs) = StdStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        while ours.write(&[0; 4096]).is_ok() {}
        let mut guest = Stream::VhostUser(UnixStream::from_std(ours).unwrap());
        let start = Instant::now();
        let error = reply(&mut guest, &Ok(())).await.unwrap_err();
        assert_eq!((error.kind(), start.elapsed()), (io::ErrorKind::TimedOut, REPLY));
    }
}
