//! Forwards TCP connections to the VM that programs open inside the sandbox's network namespace on the host.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::relay::{Work, relay, serve};
use husk_vsock::Stream;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::{CONNECTIONS_MAX, RedirectError, Running, add_rules};
use crate::guest::client::{DialError, Guest};
use crate::network::Claim;
use crate::network::loopback::{intercept, original_destination};
use crate::state::journal::Journal;

/// Deadline for the guest to connect to its server: longer than the guest's own, whose error says more.
const CONNECT: Duration = Duration::from_secs(15);

/// Why one connection cannot be forwarded.
#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("find out which address was meant")]
    Destination(#[source] io::Error),
    #[error("connect to {target} in the VM")]
    Dial { target: SocketAddr, source: DialError },
    #[error("configure the client's socket")]
    Client(#[source] io::Error),
}

/// Forwards connections until it is dropped.
#[derive(Debug)]
pub(crate) struct Forwarding(#[expect(dead_code, reason = "dropping ends the tasks")] Vec<Running>);

/// Redirects the namespace's connections, and forwards them to the guest. Without the kernel's help, such as nf_tables,
/// the sandbox works without forwarding: the failure is logged.
pub(crate) async fn start(claim: &Claim, sandbox: &str, journal: &Journal, guest: &Arc<Guest>) -> Option<Forwarding> {
    match redirect(claim, sandbox, journal).await {
        Ok(listeners) => {
            let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
            let serve = |listener| Running(tokio::spawn(forward_all(listener, guest, &slots)).abort_handle());
            Some(Forwarding(listeners.into_iter().map(serve).collect()))
        }
        Err(error) => {
            tracing::warn!(
                error = %Chain(&error),
                "connections inside the network namespace, such as those of kubectl port-forward, are not forwarded to the VM"
            );
            None
        }
    }
}

async fn redirect(claim: &Claim, sandbox: &str, journal: &Journal) -> Result<Vec<TcpListener>, RedirectError> {
    let listeners = add_rules(claim, sandbox, journal, intercept).await?;
    Ok(listeners.into_iter().map(TcpListener::from_std).collect::<io::Result<_>>()?)
}

/// Forwards a listener's connections to the addresses in the VM that their clients meant.
pub(super) fn forward_all(listener: TcpListener, guest: &Arc<Guest>, slots: &Arc<Semaphore>) -> Work {
    let guest = guest.clone();
    let failed = |error| tracing::warn!(%error, "failed to accept a connection for the VM");
    serve(listener, slots.clone(), failed, move |client| forward(client, guest.clone()))
}

/// Forwards one connection. A client whose connection the guest refuses, or whose stream is incomplete, gets a reset,
/// also when the shim ends meanwhile.
async fn forward(mut client: TcpStream, guest: Arc<Guest>) {
    if let Err(error) = client.set_zero_linger() {
        return tracing::warn!(%error, "failed to make the close of a connection a reset");
    }
    let ended = match connect(&client, &guest).await {
        Ok(mut server) => relay(&mut client, &mut server).await.map_err(|error| Chain(&error).to_string()),
        Err(error) => Err(Chain(&error).to_string()),
    };
    match ended {
        Ok(()) => {
            if let Err(error) = setsockopt(&client, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 }) {
                tracing::warn!(%error, "a complete connection ends with a reset");
            }
        }
        Err(error) => tracing::debug!(error, "a connection to the VM ended early"),
    }
}

async fn connect(client: &TcpStream, guest: &Guest) -> Result<Stream, ConnectError> {
    // The relay forwards bytes as they come. Small writes must not wait for acknowledgements.
    client.set_nodelay(true).map_err(ConnectError::Client)?;
    let local = client.local_addr().map_err(ConnectError::Client)?;
    let target = original_destination(client, local).map_err(ConnectError::Destination)?;
    guest.dial(target, CONNECT).await.map_err(|source| ConnectError::Dial { target, source })
}
