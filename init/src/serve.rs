//! The guest's vsock ports: accepts connections from the host, and serves the TTRPC services or relays them.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use husk_protos::chain::Chain;
use husk_protos::metered::Metered;
use husk_protos::unknown::Known;
use husk_protos::{HOST_CID, PORT_EVENTS, PORT_RELAY, PORT_STDIO, PORT_TASK, RECEIVE_WINDOW};
use nix::sys::socket::{Backlog, listen};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, Service};

use crate::connection::{Disconnect, WatchedConnection};
use crate::events::{Events, service::EventsService};
use crate::forward::{self, address};
use crate::io::{Streams, service::StdioService};

/// Pause after a failed accept, which means a lack of descriptors or memory. Without it the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    task: VsockListener,
    stdio: VsockListener,
    events: VsockListener,
    relay: VsockListener,
}

impl Ports {
    /// # Errors
    /// The first port that cannot be bound.
    pub(crate) fn bind() -> Result<Self, ServeError> {
        let bind = |port| bind(port).map_err(|source| ServeError::Listen { port, source });
        Ok(Self {
            task: bind(PORT_TASK)?,
            stdio: bind(PORT_STDIO)?,
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
        self,
        mut calls: HashMap<String, Service>,
        streams: Arc<Streams>,
        events: Arc<Events>,
    ) -> Result<Server, ServeError> {
        let known = Known::of(&mut calls);
        let accepted = stream::unfold((self.task, known), |(listener, known)| async move {
            Some((io::Result::Ok(known.guard(accept(&listener).await)), (listener, known)))
        });
        let mut server = Server::new().add_listener(Listener::new(accepted)).register_service(calls);
        server.start().await.map_err(|source| ServeError::Serve { port: PORT_TASK, source })?;

        tokio::spawn(async move {
            loop {
                let (socket, disconnect) = WatchedConnection::new(accept(&self.stdio).await);
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
                let (socket, disconnect) = WatchedConnection::new(accept(&self.events).await);
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

/// Accepts the next connection from the host. Closes others: a container that may use vsock can reach these ports over
/// the loopback.
async fn accept(listener: &VsockListener) -> VsockStream {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == HOST_CID => return stream,
            Ok((_, peer)) => tracing::warn!(cid = peer.cid(), "rejected a connection that is not from the host"),
            Err(error) => {
                tracing::error!(error = %Chain(&error), "failed to accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Relays the host's connections to addresses of the VM, a limited number at a time.
async fn relay(listener: VsockListener) {
    let slots = Arc::new(Semaphore::new(forward::CONNECTIONS_MAX));
    // The semaphore is never closed.
    while let Ok(slot) = slots.clone().acquire_owned().await {
        let host = accept(&listener).await;
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
