//! Redirects connections of the namespace's own programs to the shim.
//!
//! - A program inside the namespace on the host that connects to 127.0.0.1, or to one of the pod's addresses, means a
//!   server in the VM; containerd's CRI plugin does so for `kubectl port-forward`.
//! - docker's DNS server inside the namespace asks other DNS servers. The replies would reach the VM, whose traffic
//!   bypasses the namespace's own stack, so the VM has to ask.
//!
//! Rules of nf_tables redirect both to sockets of the shim in the same namespace. The kernel still knows the address that
//! the program meant.
//!
//! | file           | content                                                      |
//! |----------------|--------------------------------------------------------------|
//! | `listener.rs`  | the sockets, and the address that a connection meant         |
//! | `conntrack.rs` | the address that a datagram meant                            |
//! | `table.rs`     | the tables of nf_tables with the rules                       |
//! | `netfilter.rs` | requests to the kernel                                       |

mod conntrack;
mod listener;
mod netfilter;
mod table;

use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use husk_protos::NAME_SERVER;
use husk_protos::chain::Chain;

use super::error::{NetworkError, ObjectError};
use super::netns::Claim;
pub(crate) use conntrack::Connections;
use listener::Listeners;
pub(crate) use listener::original_destination;

/// Prefixes of the tables' names, which end with the sandbox's id.
const CONNECTIONS: &str = "husk-";
const QUERIES: &str = "husk-names-";

/// Where redirected DNS queries arrive.
pub(crate) struct Queries {
    pub(crate) streams: Vec<TcpListener>,
    pub(crate) datagrams: Vec<UdpSocket>,
    /// The namespace's connections.
    pub(crate) connections: Connections,
}

/// Listens in the namespace, and redirects all TCP connections to the namespace's own addresses to the listeners, except
/// those to docker's DNS server. Replaces what a former VM of the sandbox left. Blocks.
///
/// # Errors
///
/// A socket cannot be created, or the kernel rejects the rule, such as one without nf_tables.
pub(crate) fn intercept(claim: &Claim, sandbox: &str, limit: Duration) -> Result<Vec<TcpListener>, NetworkError> {
    let table = format!("{CONNECTIONS}{sandbox}");
    redirect(claim, table, limit, |table, deadline| {
        let (listeners, port) = listener::listen(false)?;
        table::add_connections(table, port, deadline)?;
        Ok(listeners.into_iter().map(|listeners| listeners.stream).collect())
    })
}

/// Redirects DNS queries of the namespace's own programs to any server other than docker's. Replaces what a former VM of
/// the sandbox left. Blocks.
///
/// # Errors
///
/// As [`intercept`], or the kernel has no connection tracking.
pub(crate) fn intercept_queries(claim: &Claim, sandbox: &str, limit: Duration) -> Result<Queries, NetworkError> {
    let table = format!("{QUERIES}{sandbox}");
    redirect(claim, table, limit, |table, deadline| {
        let connections = Connections::open()?;
        let (listeners, port) = listener::listen(true)?;
        table::add_queries(table, port, deadline)?;
        let (mut streams, mut datagrams) = (Vec::new(), Vec::new());
        for Listeners { stream, datagram } in listeners {
            streams.push(stream);
            datagrams.extend(datagram);
        }
        Ok(Queries { streams, datagrams, connections })
    })
}

/// Adds a table in the namespace, and removes it again if the caller has given up.
fn redirect<T: Send + 'static>(
    claim: &Claim,
    table: String,
    limit: Duration,
    add: impl FnOnce(&str, Instant) -> Result<T, ObjectError> + Send + 'static,
) -> Result<T, NetworkError> {
    let unwanted = table.clone();
    claim.run_or_undo(
        limit,
        move |deadline| add(&table, deadline),
        move |_| {
            if let Err(error) = table::remove(&unwanted, Instant::now() + limit) {
                tracing::warn!(table = unwanted, error = %Chain(&error), "failed to remove a rule that came too late");
            }
        },
    )
}

/// Removes the rules. Does nothing if there are none or the namespace is gone. Blocks.
///
/// # Errors
///
/// A rule cannot be removed.
pub(crate) fn release(claim: &Claim, sandbox: &str, limit: Duration) -> Result<(), NetworkError> {
    if claim.is_gone()? {
        return Ok(());
    }
    let tables = [CONNECTIONS, QUERIES].map(|prefix| format!("{prefix}{sandbox}"));
    let remove = move |deadline| tables.iter().try_for_each(|table| table::remove(table, deadline));
    match claim.run(limit, remove) {
        // It vanished meanwhile.
        Err(_) if claim.is_gone()? => Ok(()),
        other => other,
    }
}

/// Connects to docker's DNS server in the namespace. Blocks.
///
/// # Errors
///
/// The namespace is gone, or no server listens.
pub(crate) fn connect_to_name_server(claim: &Claim, limit: Duration) -> Result<TcpStream, NetworkError> {
    claim.run(limit, move |_| {
        let connected = TcpStream::connect_timeout(&NAME_SERVER.into(), limit);
        let connected = connected.and_then(|stream| stream.set_nonblocking(true).map(|()| stream));
        connected.map_err(ObjectError::system(NAME_SERVER.to_string(), "connect"))
    })
}

/// A socket in the namespace for a datagram to docker's DNS server. Blocks.
///
/// # Errors
///
/// The namespace is gone, or its loopback is down.
pub(crate) fn socket_to_name_server(claim: &Claim, limit: Duration) -> Result<UdpSocket, NetworkError> {
    claim.run(limit, |_| {
        let connect = || {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            socket.set_nonblocking(true)?;
            socket.connect(NAME_SERVER)?;
            Ok(socket)
        };
        connect().map_err(ObjectError::system(NAME_SERVER.to_string(), "send a datagram"))
    })
}

#[cfg(test)]
mod tests;
