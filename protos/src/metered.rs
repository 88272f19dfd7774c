//! Backpressure for a TTRPC stream with its own connection.
//!
//! ttrpc reads everything that a socket offers into unbounded queues (client) or spawns a task per message (server). A
//! peer that is hostile, or faster than the stream's consumer, would fill the memory. [`Metered`] stops reading from
//! the socket while a window of bytes is read but not consumed. The transport's flow control then throttles the peer.

use std::io::Result;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use protobuf::Message;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::lock::lock;

/// Bytes of a TTRPC frame before its payload (ttrpc PROTOCOL.md: length, stream id, type, flags).
const TTRPC_HEADER: usize = 10;

#[derive(Debug, Default)]
struct State {
    unconsumed: usize,
    reader: Option<Waker>,
}

/// The consumer's end: reports what was consumed.
#[derive(Debug, Clone)]
pub struct Meter(Arc<Mutex<State>>);

impl Meter {
    /// Reports that a message received from the stream was consumed.
    pub fn consumed(&self, message: &impl Message) {
        self.release(TTRPC_HEADER + message.compute_size() as usize);
    }

    fn release(&self, bytes: usize) {
        let waker = {
            let mut state = lock(&self.0);
            state.unconsumed = state.unconsumed.saturating_sub(bytes);
            state.reader.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A socket that pauses reading while a window of bytes is unconsumed.
#[derive(Debug)]
pub struct Metered<S> {
    inner: S,
    window: usize,
    state: Arc<Mutex<State>>,
}

impl<S> Metered<S> {
    /// Wraps `inner` with a window in bytes. The window must hold the largest message that the peer may send: a larger
    /// one would stall the connection forever.
    pub fn new(inner: S, window: usize) -> (Self, Meter) {
        let state = Arc::new(Mutex::new(State::default()));
        let meter = Meter(state.clone());
        (Self { inner, window, state }, meter)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let room = {
            let mut state = lock(&self.state);
            let room = self.window.saturating_sub(state.unconsumed);
            if room == 0 {
                // Register while holding the lock that release() takes: a release after the check would be missed
                // otherwise.
                state.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            room
        };
        let mut part = buf.take(room);
        let before = part.filled().len();
        std::task::ready!(Pin::new(&mut self.inner).poll_read(cx, &mut part))?;
        let read = part.filled().len() - before;
        // SAFETY: `part` is the unfilled rest of `buf`, whose first `read` bytes the inner reader has initialised.
        unsafe { buf.assume_init(read) };
        buf.advance(read);
        lock(&self.state).unconsumed += read;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn reading_pauses_at_the_window_and_resumes_after_consumption() {
        let (mut metered, meter) = Metered::new(&[7u8; 100][..], 60);
        let mut got = [0; 100];
        let mut filled = 0;
        while filled < 60 {
            filled += metered.read(&mut got[filled..]).await.unwrap();
        }
        let mut rest = tokio::spawn(async move {
            let mut rest = Vec::new();
            let mut chunk = [0; 64];
            let n = metered.read(&mut chunk).await.unwrap();
            rest.extend_from_slice(&chunk[..n]);
            rest.len()
        });
        tokio::task::yield_now().await;
        assert!(is_pending(&mut rest).await, "read beyond the window");
        meter.release(25);
        assert_eq!(rest.await.unwrap(), 25);
    }

    async fn is_pending(task: &mut tokio::task::JoinHandle<usize>) -> bool {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        !task.is_finished()
    }
}
