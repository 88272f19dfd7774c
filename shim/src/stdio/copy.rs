//! The running copies: guest stream to sink for output, fifo to guest stream for input.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::STDIO_CHUNK;
use husk_protos::chain::Chain;
use husk_protos::stdio::{InputChunk, InputResponse, StreamKind};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use ttrpc::r#async::ClientStreamSender;

use crate::guest::client::{Guest, GuestError};
use crate::stdio::destination::input_fifo;
use crate::stdio::error::StdioError;
use crate::stdio::fifo;
use crate::stdio::sink::Sink;

/// The progress of an output copy.
#[derive(Debug, Clone, Copy)]
struct Progress {
    /// All bytes that the process itself wrote have been delivered.
    complete: bool,
    last_moved: Instant,
}

/// A running copy of a process's stdout or stderr. Dropping it does not stop the copy: a grandchild may still write.
#[derive(Debug)]
pub(crate) struct Output {
    progress: watch::Receiver<Progress>,
    task: AbortHandle,
}

impl Output {
    /// Starts to copy a process's output into the sink.
    pub(crate) fn start(guest: &Arc<Guest>, container: &str, exec: &str, kind: StreamKind, sink: Sink) -> Self {
        let (sender, progress) = watch::channel(Progress { complete: false, last_moved: Instant::now() });
        let (guest, container, exec) = (guest.clone(), container.to_owned(), exec.to_owned());
        let task = tokio::spawn(async move {
            if let Err(error) = copy_output(&guest, &container, &exec, kind, sink, &sender).await {
                tracing::warn!(container, exec, stream = ?kind, error = %Chain(&error), "output ended early");
            }
            sender.send_modify(|progress| progress.complete = true);
        });
        Self { progress, task: task.abort_handle() }
    }

    /// Waits until all that the process wrote before its exit has been delivered. Returns false if no bytes move for
    /// `patience`: a stalled reader must not delay the exit any longer.
    pub(crate) async fn drained(&self, patience: Duration) -> bool {
        let mut progress = self.progress.clone();
        // Patience starts now, not when bytes last moved: a process may have been silent for long before its last
        // output.
        let started = Instant::now();
        loop {
            let deadline = {
                let now = progress.borrow_and_update();
                if now.complete {
                    return true;
                }
                now.last_moved.max(started) + patience
            };
            tokio::select! {
                changed = progress.changed() => {
                    if changed.is_err() {
                        return true;
                    }
                }
                () = tokio::time::sleep_until(deadline) => {
                    if progress.has_changed().unwrap_or(false) {
                        continue;
                    }
                    return false;
                }
            }
        }
    }

    /// Stops the copy and closes the sink.
    pub(crate) fn abort(&self) {
        self.task.abort();
    }
}

#[cfg(test)]
impl Output {
    /// A copy without a process. The returned function reports that bytes moved, with `true` that the copy is complete.
    pub(crate) fn pretended() -> (Self, impl Fn(bool) + Send + 'static) {
        let (sender, progress) = watch::channel(Progress { complete: false, last_moved: Instant::now() });
        let task = tokio::spawn(std::future::pending::<()>()).abort_handle();
        (Self { progress, task }, move |complete| {
            sender.send_modify(|progress| *progress = Progress { complete, last_moved: Instant::now() });
        })
    }
}

#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("read fifo")]
    Read(#[source] std::io::Error),
}

async fn copy_output(
    guest: &Guest,
    container: &str,
    exec: &str,
    kind: StreamKind,
    mut sink: Sink,
    progress: &watch::Sender<Progress>,
) -> Result<(), CopyError> {
    let mut stream = guest.output(container, exec, kind).await?;
    while let Some(chunk) = stream.recv().await? {
        if !chunk.data.is_empty() {
            sink.write(chunk.data, || progress.send_modify(|progress| progress.last_moved = Instant::now())).await;
        }
        if chunk.exited {
            progress.send_modify(|progress| progress.complete = true);
        }
    }
    Ok(())
}

/// A running copy of a process's stdin.
#[derive(Debug)]
pub(crate) struct Input {
    close: Arc<Notify>,
    exited: Arc<Notify>,
    task: AbortHandle,
}

impl Input {
    /// Opens the fifo at `address` and starts to copy from it.
    ///
    /// # Errors
    /// [`StdioError::Open`], or [`StdioError::Scheme`].
    pub(crate) fn start(guest: &Arc<Guest>, container: &str, exec: &str, address: &str) -> Result<Self, StdioError> {
        let path = input_fifo(address)?;
        let fifo = fifo::open_input(path).map_err(|source| StdioError::Open {
            field: "stdin",
            path: path.to_owned(),
            source,
        })?;
        let close = Arc::new(Notify::new());
        let exited = Arc::new(Notify::new());
        let (guest, container, exec) = (guest.clone(), container.to_owned(), exec.to_owned());
        let (closed, ended) = (close.clone(), exited.clone());
        let task = tokio::spawn(async move {
            let mut fifo = fifo;
            let mut ended = pin!(ended.notified());
            tokio::select! {
                copied = copy_input(&guest, &container, &exec, &mut fifo, &closed) => {
                    if let Err(error) = copied {
                        tracing::warn!(container, exec, stream = "stdin", error = %Chain(&error), "input ended early");
                    }
                    ended.await;
                }
                () = &mut ended => {}
            }
            fifo::discard(&mut fifo).await;
        });
        Ok(Self { close, exited, task: task.abort_handle() })
    }

    /// Stops the copy, but reads and discards until [`Self::abort`]: a client that writes to a terminal whose process has
    /// just exited must not get EPIPE. containerd's CRI plugin closes the output too when that happens, and loses what it
    /// has not read yet.
    pub(crate) fn discard(&self) {
        self.exited.notify_one();
    }

    /// Delivers the fifo's present content and then ends the process's input. Idempotent.
    pub(crate) fn close(&self) {
        // notify_one stores a permit if the copy is not waiting at this moment.
        self.close.notify_one();
    }

    /// Stops the copy at once.
    pub(crate) fn abort(&self) {
        self.task.abort();
    }
}

async fn copy_input(
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
