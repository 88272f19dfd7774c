//! Counts the connections of a server, so that it can stay until its clients have closed them: a client may discard a
//! response that it has not read when the server closes the connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use husk_protos::connections::{Connections, Open};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The open connections of a server.
#[derive(Debug, Clone, Default)]
pub(crate) struct Clients(Connections);

impl Clients {
    /// Counts a connection until it is dropped.
    pub(crate) fn count<S>(&self, inner: S) -> Counted<S> {
        Counted { inner, _open: self.0.open() }
    }

    /// Waits until all connections are closed, but not longer than this.
    pub(crate) async fn gone(&self, within: Duration) {
        // A client that stays loses nothing but its connection.
        let _ = tokio::time::timeout(within, self.0.closed()).await;
    }
}

/// A counted connection.
#[derive(Debug)]
pub(crate) struct Counted<S> {
    inner: S,
    _open: Open,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_server_stays_until_its_last_client_has_left_or_the_time_is_up() {
        let clients = Clients::default();
        clients.gone(Duration::MAX).await;
        let (one, two) = (clients.count(tokio::io::empty()), clients.count(tokio::io::empty()));
        clients.gone(Duration::ZERO).await;
        let waiting = tokio::spawn({
            let clients = clients.clone();
            async move { clients.gone(Duration::from_secs(3600)).await }
        });
        drop(one);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(two);
        waiting.await.unwrap();
    }
}
