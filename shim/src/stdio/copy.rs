//! The running copies: guest stream to sink for output, fifo to guest stream for input.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::stdio::StreamKind;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::guest::client::Guest;
use crate::stdio::destination::input_fifo;
use crate::stdio::error::{CopyError, StdioError};
use crate::stdio::fifo;
use crate::stdio::progress::Progress;
use crate::stdio::sink::Sink;
use crate::stdio::{messages, raw};

/// A running copy of a process's stdout or stderr. Dropping it does not stop the copy: a grandchild may still write.
#[derive(Debug)]
pub(crate) struct Output {
    progress: Progress,
    /// The output comes on a raw stream.
    raw: bool,
    task: AbortHandle,
}

/// Completes the progress of a copy when it ends, also if it is stopped.
struct Completing(Progress);

impl Drop for Completing {
    fn drop(&mut self) {
        self.0.complete();
    }
}

impl Output {
    /// Starts to copy a process's output into the sink.
    pub(crate) fn start(guest: &Arc<Guest>, container: &str, exec: &str, kind: StreamKind, mut sink: Sink) -> Self {
        let (progress, raw) = (Progress::new(), guest.has_raw_streams());
        let (guest, container, exec) = (guest.clone(), container.to_owned(), exec.to_owned());
        let completing = Completing(progress.clone());
        let task = tokio::spawn(async move {
            let copied = if raw {
                raw::copy_output(&guest, &container, &exec, kind, &mut sink, &completing.0).await
            } else {
                messages::copy_output(&guest, &container, &exec, kind, &mut sink, &completing.0).await
            };
            if let Err(error) = copied {
                tracing::warn!(container, exec, stream = ?kind, error = %Chain(&error), "output ended early");
            }
        });
        Self { progress, raw, task: task.abort_handle() }
    }

    /// The process has exited after it wrote this many bytes. Messages contain a mark of the exit instead.
    pub(crate) fn expect(&self, bytes: u64) {
        if self.raw {
            self.progress.expect(bytes);
        }
    }

    /// Waits until all that the process wrote before its exit has been delivered. Returns false if no bytes move for
    /// `patience`: a stalled reader must not delay the exit any longer.
    pub(crate) async fn drained(&self, patience: Duration) -> bool {
        self.progress.drained(patience).await
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
        let progress = Progress::new();
        let task = tokio::spawn(std::future::pending::<()>()).abort_handle();
        (Self { progress: progress.clone(), raw: false, task }, move |complete| {
            progress.moved(1);
            if complete {
                progress.complete();
            }
        })
    }
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
    if guest.has_raw_streams() {
        raw::copy_input(guest, container, exec, fifo, close).await
    } else {
        messages::copy_input(guest, container, exec, fifo, close).await
    }
}
