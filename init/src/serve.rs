//! The guest's vsock ports: accepts connections from the host, and serves the TTRPC services or relays them.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream;
use husk_protos::chain::Chain;
use husk_protos::metered::Metered;
use husk_protos::unknown::Known;
use husk_protos::{HOST_CID, PORT_EVENTS, PORT_RELAY, PORT_STDIO, PORT_STREAMS, PORT_TASK, RECEIVE_WINDOW, SECRET};
use nix::sys::socket::{Backlog, listen};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, Service};

use crate::connection::{Disconnect, WatchedConnection};
use crate::events::{Events, service::EventsService};
use crate::forward::{self, address};
use crate::io::{Streams, raw, service::StdioService};

/// Pause after a failed accept, which means a lack of descriptors or memory. Without it the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Time for the host to prove itself on a connection. It does so at once, unless it is stopped.
const PROOF: Duration = Duration::from_secs(10);
/// Connections to a port on which the host has not proven itself yet. Further ones wait to be accepted.
const UNPROVEN_MAX: usize = 64;

/// A port that cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("listen on vsock port {port}")]
    Listen { port: u32, source: io::Error },
    #[error("serve TTRPC on vsock port {port}")]
    Serve { port: u32, source: ttrpc::Error },
}

/// The listening sockets. They are bound before the host learns that the guest is ready.
pub(crate) struct Ports {
    task: Port,
    stdio: Port,
    streams: Port,
    events: Port,
    relay: Port,
}

impl Ports {
    /// Binds the ports. Only connections that begin with the secret are served.
    ///
    /// # Errors
    /// The first port that cannot be bound.
    pub(crate) fn bind(secret: [u8; SECRET]) -> Result<Self, ServeError> {
        let bind = |port| match bind(port) {
            Ok(listener) => Ok(Port { listener, secret, unproven: Vec::new() }),
            Err(source) => Err(ServeError::Listen { port, source }),
        };
        Ok(Self {
            task: bind(PORT_TASK)?,
            stdio: bind(PORT_STDIO)?,
            streams: bind(PORT_STREAMS)?,
            events: bind(PORT_EVENTS)?,
            relay: bind(PORT_RELAY)?,
        })
    }

    /// Serves the ports on the current runtime. `calls` are the services of the Task port. Dropping the returned server
    /// ends its connections.
    ///
    /// # Errors
    /// When the server of the Task port does not start.
    pub(crate) async fn serve(
        mut self,
        mut calls: HashMap<String, Service>,
        streams: Arc<Streams>,
        events: Arc<Events>,
    ) -> Result<Server, ServeError> {
        let known = Known::of(&mut calls);
        let accepted = stream::unfold((self.task, known), |(mut port, known)| async move {
            Some((io::Result::Ok(known.guard(port.accept().await)), (port, known)))
        });
        let mut server = Server::new().add_listener(Listener::new(accepted)).register_service(calls);
        server.start().await.map_err(|source| ServeError::Serve { port: PORT_TASK, source })?;

        tokio::spawn(serve_raw(self.streams, streams.clone()));
        tokio::spawn(async move {
            loop {
                let (socket, disconnect) = WatchedConnection::new(self.stdio.accept().await);
                let (socket, meter) = Metered::new(socket, RECEIVE_WINDOW);
                let service = StdioService { streams: streams.clone(), meter, disconnect: disconnect.clone() };
                let open = streams.connections.open();
                let served = serve_one(socket, disconnect, husk_protos::stdio_ttrpc::create_stdio(Arc::new(service)));
                tokio::spawn(async move {
                    served.await;
                    drop(open);
                });
            }
        });
        tokio::spawn(async move {
            loop {
                let (socket, disconnect) = WatchedConnection::new(self.events.accept().await);
                let service = EventsService { events: events.clone(), disconnect: disconnect.clone() };
                tokio::spawn(serve_one(
                    socket,
                    disconnect,
                    husk_protos::events_ttrpc::create_events(Arc::new(service)),
                ));
            }
        });
        tokio::spawn(relay(self.relay));
        Ok(server)
    }
}

/// Listens with the largest backlog that the kernel allows (net.core.somaxconn, 4096); the library's default is 128. A
/// hundred processes that start at once open more streams than that, and the kernel rejects connections beyond the
/// backlog.
fn bind(port: u32) -> io::Result<VsockListener> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::MAXALLOWABLE)?;
    Ok(listener)
}

/// A listening socket, and connections that it has accepted.
struct Port {
    listener: VsockListener,
    secret: [u8; SECRET],
    unproven: Vec<BoxFuture<'static, Option<VsockStream>>>,
}

impl Port {
    /// The next connection on which the shim has proven itself. Others are closed: a container that may use vsock can
    /// reach the ports over the loopback, and on the kernel's vsock device every process of the host can. None of them
    /// delays the shim's.
    async fn accept(&mut self) -> VsockStream {
        loop {
            match poll_fn(|cx| self.poll_accept(cx)).await {
                Ok(stream) => return stream,
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "failed to accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<VsockStream>> {
        loop {
            let mut at = 0;
            while at < self.unproven.len() {
                match self.unproven[at].as_mut().poll(cx) {
                    Poll::Pending => at += 1,
                    Poll::Ready(proven) => {
                        drop(self.unproven.swap_remove(at));
                        if let Some(stream) = proven {
                            return Poll::Ready(Ok(stream));
                        }
                    }
                }
            }
            if self.unproven.len() >= UNPROVEN_MAX {
                return Poll::Pending;
            }
            let (stream, peer) = ready!(self.listener.poll_accept(cx))?;
            self.unproven.push(Box::pin(prove(stream, peer.cid(), self.secret)));
        }
    }
}

/// Reads the secret, and returns the connection if it is right.
async fn prove<S: AsyncRead + Unpin>(mut stream: S, cid: u32, secret: [u8; SECRET]) -> Option<S> {
    let mut sent = [0; SECRET];
    let proven = cid == HOST_CID
        && matches!(timeout(PROOF, stream.read_exact(&mut sent)).await, Ok(Ok(_)))
        // Takes the same time wherever the bytes differ.
        && sent.iter().zip(secret).fold(0, |difference, (one, other)| difference | (one ^ other)) == 0;
    if !proven {
        tracing::warn!(cid, "rejected a connection that is not the shim's");
    }
    proven.then_some(stream)
}

/// Serves raw streams, one per connection.
async fn serve_raw(mut port: Port, streams: Arc<Streams>) {
    loop {
        let host = port.accept().await;
        tokio::spawn(raw::serve(host, streams.clone()));
    }
}

/// Relays the host's connections to addresses of the VM, a limited number at a time.
async fn relay(mut port: Port) {
    let slots = Arc::new(Semaphore::new(forward::CONNECTIONS_MAX));
    // The semaphore is never closed.
    while let Ok(slot) = slots.clone().acquire_owned().await {
        let host = port.accept().await;
        tokio::spawn(async move {
            address::forward(host).await;
            drop(slot);
        });
    }
}

/// Runs a server for one connection. Its services know their connection, which the services of a shared ttrpc server do
/// not.
async fn serve_one<S>(socket: S, mut disconnect: Disconnect, mut services: HashMap<String, Service>)
where
    S: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
{
    let socket = Known::of(&mut services).guard(socket);
    let once = stream::iter([io::Result::Ok(socket)]);
    let mut server = Server::new().add_listener(Listener::new(once)).register_service(services);
    match server.start().await {
        // Keep the server until then: dropping it ends the connection.
        Ok(()) => disconnect.wait().await,
        Err(error) => tracing::error!(error = %Chain(&error), "failed to serve a connection"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    const SECRET_OF_VM: [u8; SECRET] = [7; SECRET];

    #[tokio::test(start_paused = true)]
    async fn only_a_connection_that_begins_with_the_secret_is_served() {
        let mut wrong = SECRET_OF_VM;
        wrong[SECRET - 1] ^= 1;
        let table: [(u32, &[u8], bool, bool); 7] = [
            (HOST_CID, &SECRET_OF_VM, true, true),
            (HOST_CID, &wrong, true, false),
            (HOST_CID, b"", true, false),
            (HOST_CID, b"", false, false),
            (HOST_CID, &SECRET_OF_VM[1..], true, false),
            // Without the last byte, an open connection is closed when the time is over.
            (HOST_CID, &SECRET_OF_VM[1..], false, false),
            // Not from the host.
            (3, &SECRET_OF_VM, true, false),
        ];
        for (cid, sent, closed, served) in table {
            let (mut host, guest) = tokio::io::duplex(256);
            host.write_all(sent).await.unwrap();
            if served {
                host.write_all(b"more").await.unwrap();
            }
            let host = (!closed).then_some(host);
            let stream = prove(guest, cid, SECRET_OF_VM).await;
            assert_eq!(stream.is_some(), served, "{cid} {sent:?}");
            if let Some(mut stream) = stream {
                let mut rest = String::new();
                stream.read_to_string(&mut rest).await.unwrap();
                assert_eq!(rest, "more");
            }
            drop(host);
        }
    }
}
