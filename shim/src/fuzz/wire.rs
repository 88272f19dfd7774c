//! The guest's end of a connection, in memory, and the runtime in which connections are served.

use std::io::Result;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Builder, Runtime};

/// In how many turns of the runtime the tasks of a closed connection end.
const TURNS: usize = 64;

thread_local! {
    /// One for all inputs: to make one takes longer than most inputs.
    static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
}

/// Runs a future, and checks that the tasks end that it has started.
pub(super) fn run<T>(work: impl Future<Output = T>) -> T {
    RUNTIME.with(|runtime| {
        let tasks = || runtime.metrics().num_alive_tasks();
        let result = runtime.block_on(work);
        runtime.block_on(async {
            for _ in 0..TURNS {
                if tasks() == 0 {
                    break;
                }
                tokio::task::yield_now().await;
            }
        });
        assert_eq!(tasks(), 0, "tasks of a closed connection are left");
        result
    })
}

/// What a guest sends: all of it, in pieces, and then the end of the connection. What the shim sends is dropped.
pub(super) struct Wire {
    bytes: Vec<u8>,
    read: usize,
    piece: usize,
    /// Messages of the shim for which the guest waits.
    waits: usize,
    reader: Option<Waker>,
}

impl Wire {
    /// A guest that sends at once, in pieces of at most this many bytes.
    pub(super) fn sends(bytes: &[u8], piece: usize) -> Self {
        Self { bytes: bytes.to_vec(), read: 0, piece: piece.max(1), waits: 0, reader: None }
    }

    /// A guest that waits for so many messages.
    pub(super) fn answers(messages: usize, bytes: Vec<u8>) -> Self {
        Self { bytes, read: 0, piece: usize::MAX, waits: messages, reader: None }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        if self.waits > 0 {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let room = buffer.remaining().min(self.piece);
        let end = self.bytes.len().min(self.read.saturating_add(room));
        buffer.put_slice(&self.bytes[self.read..end]);
        self.read = end;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.waits = self.waits.saturating_sub(1);
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}
