//! The copies: guest stream → sink for output, fifo → guest stream for input.

use std::sync::Arc;
use std::time::Duration;

use husk_protos::STDIO_CHUNK;
use husk_protos::stdio::{InputChunk, StreamKind};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::guest::client::Guest;
use crate::stdio::{Error, Sink, fifo_path};

/// How far a copy of output has come.
#[derive(Debug, Clone, Copy)]
struct Progress {
    /// All that the process itself wrote has been delivered.
    complete: bool,
    /// When bytes last moved.
    at: Instant,
}

/// A running copy of a process's stdout or stderr. Dropping it does not end it: a grandchild may still write.
#[derive(Debug)]
pub struct Output {
    progress: watch::Receiver<Progress>,
    task: AbortHandle,
}

impl Output {
    /// Begins to copy what a process writes into the sink.
    pub fn start(guest: &Arc<Guest>, container: &str, exec: &str, kind: StreamKind, sink: Sink) -> Self {
        let (sender, progress) = watch::channel(Progress { complete: false, at: Instant::now() });
        let (guest, container, exec) = (guest.clone(), container.to_owned(), exec.to_owned());
        let task = tokio::spawn(async move {
            if let Err(error) = copy_output(&guest, &container, &exec, kind, sink, &sender).await {
                tracing::warn!(container, exec, stream = ?kind, %error, "output ended early");
            }
            sender.send_modify(|progress| progress.complete = true);
        });
        Self { progress, task: task.abort_handle() }
    }

    /// Waits until all that the process wrote before its exit has been delivered. Gives up, and returns false, when nothing has moved for
    /// `patience`: then there is a reader who does not read, and the exit must not wait for it any longer.
    pub async fn drained(&self, patience: Duration) -> bool {
        let mut progress = self.progress.clone();
        // Not counted from when bytes last moved: a process may have been silent for long, and its last words be under way.
        let begun = Instant::now();
        loop {
            let deadline = {
                let now = progress.borrow_and_update();
                if now.complete {
                    return true;
                }
                now.at.max(begun) + patience
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

    /// Ends the copy and closes the sink.
    pub fn abort(&self) {
        self.task.abort();
    }
}

#[cfg(test)]
impl Output {
    /// One that copies nothing. The function says that bytes have moved, or that it is complete.
    pub fn pretended() -> (Self, impl Fn(bool) + Send + 'static) {
        let (sender, progress) = watch::channel(Progress { complete: false, at: Instant::now() });
        let task = tokio::spawn(std::future::pending::<()>()).abort_handle();
        (Self { progress, task }, move |complete| {
            sender.send_modify(|progress| *progress = Progress { complete, at: Instant::now() });
        })
    }
}

#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("{0}")]
    Guest(#[from] crate::guest::client::GuestError),
    #[error("guest stream: {0}")]
    Stream(#[from] ttrpc::Error),
    #[error("read fifo: {0}")]
    Read(std::io::Error),
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
            sink.write(chunk.data, || progress.send_modify(|progress| progress.at = Instant::now())).await;
        }
        if chunk.exited {
            progress.send_modify(|progress| progress.complete = true);
        }
    }
    Ok(())
}

/// A running copy of a process's stdin.
#[derive(Debug)]
pub struct Input {
    close: Arc<Notify>,
    task: AbortHandle,
}

impl Input {
    /// Opens the fifo at `address` and begins to copy from it.
    ///
    /// It is opened for writing too, so that a client who goes away does not end the process's input: only [`Input::close`] does.
    pub fn start(guest: &Arc<Guest>, container: &str, exec: &str, address: &str) -> Result<Self, Error> {
        let path = fifo_path("stdin", address)?;
        let fifo = pipe::OpenOptions::new().read_write(true).open_receiver(path).map_err(|source| Error::Open {
            field: "stdin",
            path: path.to_owned(),
            source,
        })?;
        let close = Arc::new(Notify::new());
        let (guest, container, exec, closed) = (guest.clone(), container.to_owned(), exec.to_owned(), close.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = copy_input(&guest, &container, &exec, fifo, &closed).await {
                tracing::warn!(container, exec, stream = "stdin", %error, "input ended early");
            }
        });
        Ok(Self { close, task: task.abort_handle() })
    }

    /// What is in the fifo now still goes to the process; then its input ends. Calling it again is harmless.
    pub fn close(&self) {
        // A permit is kept if the copy is not waiting at this moment.
        self.close.notify_one();
    }

    /// Ends the copy without further ado.
    pub fn abort(&self) {
        self.task.abort();
    }
}

async fn copy_input(
    guest: &Guest,
    container: &str,
    exec: &str,
    mut fifo: pipe::Receiver,
    close: &Notify,
) -> Result<(), CopyError> {
    let mut stream = guest.input(container, exec).await?;
    let mut buffer = vec![0; STDIO_CHUNK];
    loop {
        let read = tokio::select! {
            read = fifo.read(&mut buffer) => read.map_err(CopyError::Read)?,
            () = close.notified() => break,
        };
        send(&stream, &buffer[..read]).await?;
    }
    // The client wrote all it had before it asked to close, so what is not in the fifo by now is not coming.
    // Asked of the fifo itself: the runtime may not have heard yet that it is readable, and would say that nothing is there.
    loop {
        match nix::unistd::read(&fifo, &mut buffer) {
            Ok(read) => send(&stream, &buffer[..read]).await?,
            Err(nix::errno::Errno::EAGAIN) => break,
            Err(errno) => return Err(CopyError::Read(errno.into())),
        }
    }
    stream.close_and_recv().await?;
    Ok(())
}

async fn send(
    stream: &ttrpc::r#async::ClientStreamSender<InputChunk, husk_protos::stdio::InputResponse>,
    data: &[u8],
) -> Result<(), CopyError> {
    Ok(stream.send(&InputChunk { data: data.to_vec(), ..Default::default() }).await?)
}
