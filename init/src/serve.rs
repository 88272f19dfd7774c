//! The vsock ports: who may connect, and which services answer there.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream;
use husk_protos::metered::Metered;
use husk_protos::{HOST_CID, PORT_EVENTS, PORT_STDIO, PORT_TASK, RECEIVE_WINDOW};
use nix::sys::socket::{Backlog, listen};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, Service};

use crate::{events_service, io as stdio};

/// Pause after a failed accept, which is a lack of descriptors or memory: without it the loop would turn until some come free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A port that could not be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port cannot be listened on.
    #[error("listen on vsock port {port}: {source}")]
    Listen {
        /// Which.
        port: u32,
        /// Why.
        source: io::Error,
    },
    /// The TTRPC server did not start.
    #[error("serve TTRPC on vsock port {port}: {source}")]
    Serve {
        /// Which.
        port: u32,
        /// Why.
        source: ttrpc::Error,
    },
}

/// The three listeners, bound before the host hears that the guest is ready.
pub struct Ports {
    task: VsockListener,
    stdio: VsockListener,
    events: VsockListener,
}

impl Ports {
    /// Binds them.
    ///
    /// # Errors
    /// The first that cannot be bound.
    pub fn bind() -> Result<Self, Error> {
        let bind = |port| bind(port).map_err(|source| Error::Listen { port, source });
        Ok(Self { task: bind(PORT_TASK)?, stdio: bind(PORT_STDIO)?, events: bind(PORT_EVENTS)? })
    }

    /// Serves them on the current runtime, as long as it lives. The answer must be kept as long.
    ///
    /// # Errors
    /// When the server of the calls does not start.
    pub async fn serve(
        self,
        calls: HashMap<String, Service>,
        streams: Arc<stdio::Streams>,
        events: Arc<crate::events::Events>,
    ) -> Result<Server, Error> {
        let accepted =
            stream::unfold(self.task, |listener| async move { Some((Ok(accept(&listener).await), listener)) });
        let mut server = Server::new().add_listener(Listener::new(accepted)).register_service(calls);
        server.start().await.map_err(|source| Error::Serve { port: PORT_TASK, source })?;

        tokio::spawn(async move {
            loop {
                let (socket, gone) = Watched::new(accept(&self.stdio).await);
                let (socket, meter) = Metered::new(socket, RECEIVE_WINDOW);
                let service = stdio::service::Service { streams: streams.clone(), meter, gone: gone.clone() };
                serve_one(socket, gone, husk_protos::stdio_ttrpc::create_stdio(Arc::new(service)));
            }
        });
        tokio::spawn(async move {
            loop {
                let (socket, gone) = Watched::new(accept(&self.events).await);
                let service = events_service::Service { events: events.clone(), gone: gone.clone() };
                serve_one(socket, gone, husk_protos::events_ttrpc::create_events(Arc::new(service)));
            }
        });
        Ok(server)
    }
}

/// With room for as many connections that wait to be accepted as the kernel allows (net.core.somaxconn, 4096), where the library asks for 128:
/// a hundred processes that are started at once have more streams than that, and what finds no room is refused.
fn bind(port: u32) -> io::Result<VsockListener> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::MAXALLOWABLE)?;
    Ok(listener)
}

/// The next connection of the host's. A container that was given vsock may reach these ports over the loopback: it is hung up on.
async fn accept(listener: &VsockListener) -> VsockStream {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == HOST_CID => return stream,
            Ok((_, peer)) => tracing::warn!(cid = peer.cid(), "refused a connection that is not the host's"),
            Err(error) => {
                tracing::error!(%error, "accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A server for one connection: its services know whose they are, which ttrpc's shared ones do not.
fn serve_one<S>(socket: S, mut gone: Gone, services: HashMap<String, Service>)
where
    S: AsyncRead + AsyncWrite + Send + Sync + 'static,
{
    tokio::spawn(async move {
        let once = stream::iter([io::Result::Ok(socket)]);
        let mut server = Server::new().add_listener(Listener::new(once)).register_service(services);
        match server.start().await {
            // Dropping the server would end the connection.
            Ok(()) => gone.wait().await,
            Err(error) => tracing::error!(%error, "serve a connection"),
        }
    });
}

/// Tells when the connection has ended. A stream's handler that only waits for its own side would never learn of it from ttrpc.
#[derive(Debug, Clone)]
pub struct Gone(watch::Receiver<()>);

impl Gone {
    /// Returns once the peer has gone.
    pub async fn wait(&mut self) {
        // Nothing is ever sent: the sender's end is the news.
        while self.0.changed().await.is_ok() {}
    }
}

/// A connection that tells its handlers of its end.
struct Watched {
    inner: VsockStream,
    alive: Option<watch::Sender<()>>,
}

impl Watched {
    fn new(inner: VsockStream) -> (Self, Gone) {
        let (alive, gone) = watch::channel(());
        (Self { inner, alive: Some(alive) }, Gone(gone))
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if let Poll::Ready(result) = &polled
            && (result.is_err() || buf.filled().len() == before)
        {
            self.alive = None;
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
