//! Copies on raw streams ([`husk_protos::streams`]).

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Poll, ready};

use husk_protos::relay::read_status;
use husk_protos::stdio::StreamKind;
use husk_protos::streams::{CHUNK_MAX, HEADER, OUTPUT_WINDOW, header};
use husk_vsock::{Stream, WINDOW};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::Notify;

use crate::guest::client::{Guest, GuestError};
use crate::stdio::error::CopyError;
use crate::stdio::fifo;
use crate::stdio::progress::Progress;
use crate::stdio::sink::Sink;

// What the guest sends without an announcement, the device has room for.
const _: () = assert!(OUTPUT_WINDOW == WINDOW as u64);

thread_local! {
    /// The buffer of all copies. A copy uses it between a read and the write that follows at once, and keeps only what
    /// the other side does not take: neither an idle stream nor one that flows holds memory of its own.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; HEADER + CHUNK_MAX]);
}

/// Copies an output to its end.
pub(super) async fn copy_output(
    guest: &Guest,
    container: &str,
    exec: &str,
    kind: StreamKind,
    sink: &mut Sink,
    progress: &Progress,
) -> Result<(), CopyError> {
    deliver(guest.raw_stream(container, exec, kind).await?, sink, progress).await
}

/// Copies what an open stream delivers to its end.
pub(super) async fn deliver(
    mut stream: impl AsyncRead + Unpin,
    sink: &mut Sink,
    progress: &Progress,
) -> Result<(), CopyError> {
    loop {
        let moved = pass_output(&mut stream, sink).await.map_err(GuestError::RawStream)?;
        let Some((written, rest)) = moved else { return Ok(()) };
        if written > 0 {
            progress.moved(written);
        }
        if !rest.is_empty() {
            sink.write(rest, |bytes| progress.moved(bytes)).await;
        }
    }
}

/// Waits for output and passes it on as far as the sink takes it without waiting. Returns the length of that, and the
/// rest; `None` at the end.
async fn pass_output(stream: &mut (impl AsyncRead + Unpin), sink: &mut Sink) -> io::Result<Option<(usize, Vec<u8>)>> {
    poll_fn(|cx| {
        BUFFER.with_borrow_mut(|buffer| {
            let mut part = ReadBuf::new(buffer);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut part))?;
            let data = part.filled();
            if data.is_empty() {
                return Poll::Ready(Ok(None));
            }
            let written = sink.write_now(data);
            Poll::Ready(Ok(Some((written, data[written..].to_vec()))))
        })
    })
    .await
}

/// Copies from the fifo until `close` is notified, and then what the fifo contains.
pub(super) async fn copy_input(
    guest: &Guest,
    container: &str,
    exec: &str,
    fifo: &mut pipe::Receiver,
    close: &Notify,
) -> Result<(), CopyError> {
    let mut stream = guest.raw_stream(container, exec, StreamKind::STREAM_KIND_STDIN).await?;
    let failed = |error| CopyError::Guest(GuestError::RawStream(error));
    loop {
        let rest = tokio::select! {
            rest = pass_input(fifo, &mut stream) => rest?,
            () = close.notified() => break,
        };
        stream.write_all(&rest).await.map_err(failed)?;
    }
    // The client wrote everything before it asked to close, so the fifo's content completes the input.
    let mut buffer = vec![0; CHUNK_MAX];
    while let Some(length) = fifo::read_now(fifo, &mut buffer).map_err(CopyError::Read)? {
        stream.write_all(&header(length)).await.map_err(failed)?;
        stream.write_all(&buffer[..length]).await.map_err(failed)?;
    }
    stream.write_all(&header(0)).await.map_err(failed)?;
    read_status(&mut stream).await.map_err(failed)
}

/// Waits for input and passes it on as far as the stream takes it without waiting. Returns the rest.
async fn pass_input(fifo: &mut pipe::Receiver, stream: &mut Stream) -> Result<Vec<u8>, CopyError> {
    poll_fn(|cx| {
        BUFFER.with_borrow_mut(|buffer| {
            let mut part = ReadBuf::new(&mut buffer[HEADER..]);
            ready!(Pin::new(&mut *fifo).poll_read(cx, &mut part)).map_err(CopyError::Read)?;
            let length = part.filled().len();
            if length == 0 {
                // Would end the input. A fifo that is open for writing has no end.
                return Poll::Ready(Ok(Vec::new()));
            }
            buffer[..HEADER].copy_from_slice(&header(length));
            let chunk = &buffer[..HEADER + length];
            let written = match Pin::new(&mut *stream).poll_write(cx, chunk) {
                Poll::Ready(written) => written.map_err(GuestError::RawStream)?,
                Poll::Pending => 0,
            };
            Poll::Ready(Ok(chunk[written..].to_vec()))
        })
    })
    .await
}
