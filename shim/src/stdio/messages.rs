//! Copies with the guest's TTRPC service.

use husk_protos::STDIO_CHUNK;
use husk_protos::stdio::{InputChunk, InputResponse, StreamKind};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use ttrpc::r#async::ClientStreamSender;

use crate::guest::client::{Guest, GuestError};
use crate::stdio::error::CopyError;
use crate::stdio::fifo;
use crate::stdio::progress::Progress;
use crate::stdio::sink::Sink;

/// Copies an output to its end.
pub(super) async fn copy_output(
    guest: &Guest,
    container: &str,
    exec: &str,
    kind: StreamKind,
    sink: &mut Sink,
    progress: &Progress,
) -> Result<(), CopyError> {
    let mut stream = guest.output(container, exec, kind).await?;
    while let Some(chunk) = stream.recv().await? {
        if !chunk.data.is_empty() {
            sink.write(chunk.data, |bytes| progress.moved(bytes)).await;
        }
        if chunk.exited {
            progress.complete();
        }
    }
    Ok(())
}

/// Copies from the fifo until `close` is notified, and then what the fifo contains.
pub(super) async fn copy_input(
    guest: &Guest,
    container: &str,
    exec: &str,
    fifo: &mut pipe::Receiver,
    close: &Notify,
) -> Result<(), CopyError> {
    let mut stream = guest.input(container, exec).await?;
    let mut buffer = vec![0; STDIO_CHUNK];
    loop {
        let length = tokio::select! {
            length = fifo.read(&mut buffer) => length.map_err(CopyError::Read)?,
            () = close.notified() => break,
        };
        send(&stream, &buffer[..length]).await?;
    }
    // The client wrote everything before it asked to close, so the fifo's content completes the input.
    while let Some(length) = fifo::read_now(fifo, &mut buffer).map_err(CopyError::Read)? {
        send(&stream, &buffer[..length]).await?;
    }
    stream.close_and_recv().await.map_err(GuestError::from)?;
    Ok(())
}

async fn send(stream: &ClientStreamSender<InputChunk, InputResponse>, data: &[u8]) -> Result<(), CopyError> {
    let sent = stream.send(&InputChunk { data: data.to_vec(), ..Default::default() }).await;
    Ok(sent.map_err(GuestError::from)?)
}
