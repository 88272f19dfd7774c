//! Connections from the host that report their end.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio_vsock::VsockStream;

/// Notifies the handlers of one connection when the peer disconnects. ttrpc does not: a stream handler that waits for
/// something else in the guest would never return.
#[derive(Debug, Clone)]
pub(crate) struct Disconnect(watch::Receiver<()>);

impl Disconnect {
    /// Returns once the peer has disconnected.
    pub(crate) async fn wait(&mut self) {
        // Nothing is ever sent: dropping the sender is the signal.
        while self.0.changed().await.is_ok() {}
    }
}

/// A socket that signals [`Disconnect`] on a read error or at the end of the stream.
pub(crate) struct WatchedConnection {
    inner: VsockStream,
    connected: Option<watch::Sender<()>>,
}

impl WatchedConnection {
    pub(crate) fn new(inner: VsockStream) -> (Self, Disconnect) {
        let (connected, disconnect) = watch::channel(());
        (Self { inner, connected: Some(connected) }, Disconnect(disconnect))
    }
}

impl AsyncRead for WatchedConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if let Poll::Ready(result) = &polled
            && (result.is_err() || buf.filled().len() == before)
        {
            self.connected = None;
        }
        polled
    }
}

impl AsyncWrite for WatchedConnection {
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
