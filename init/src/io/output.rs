//! Copies output from a process's pipe or terminal to its TTRPC stream.

use std::io;

use husk_protos::STDIO_CHUNK;
use husk_protos::stdio::OutputChunk;
use tokio::sync::watch;
use ttrpc::r#async::ServerStreamSender;

use super::slot::Client;
use crate::connection::Disconnect;
use crate::error::{CallError, FailureKind};

/// Sends output until the end of the pipe. The exit mark follows the bytes that were in the pipe at the exit: a process
/// that inherited the pipe can neither delay the mark nor insert output before it.
pub(super) async fn pump(
    output: &Client<'_>,
    exited: watch::Receiver<bool>,
    stream: &ServerStreamSender<OutputChunk>,
    disconnect: &mut Disconnect,
) -> Result<(), CallError> {
    Pump { output, exited, stream, disconnect, marked: false }.run().await
}

struct Pump<'a> {
    output: &'a Client<'a>,
    exited: watch::Receiver<bool>,
    stream: &'a ServerStreamSender<OutputChunk>,
    disconnect: &'a mut Disconnect,
    /// The exit mark has been sent.
    marked: bool,
}

impl Pump<'_> {
    async fn run(&mut self) -> Result<(), CallError> {
        loop {
            if !self.marked && self.output.left() == Some(0) {
                self.send(&OutputChunk { exited: true, ..Default::default() }).await?;
                self.marked = true;
            }
            // Empty while waiting: an idle stream holds no memory.
            let mut chunk = OutputChunk::new();
            let Some(read) = self.read(&mut chunk.data).await? else { continue };
            match read {
                Ok(0) => return Ok(()),
                // EIO: no process has the terminal open any more, and all output was read.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
                Ok(read) => {
                    chunk.data.truncate(read);
                    self.send(&chunk).await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CallError::internal("read a pipe", &error)),
            }
        }
    }

    /// Waits for output and reads it. None when there is nothing to read yet and the exit mark may be due.
    async fn read(&mut self, data: &mut Vec<u8>) -> Result<Option<io::Result<usize>>, CallError> {
        let Self { output, exited, disconnect, marked, .. } = self;
        if output.has_rest() {
            data.resize(chunk_size(output, *marked), 0);
            return Ok(Some(output.read(data)));
        }
        let mut ready = tokio::select! {
            biased;
            () = disconnect.wait() => return Err(CallError::new(FailureKind::Aborted, "the connection ended")),
            ready = output.pipe.readable() => ready.map_err(|e| CallError::internal("wait for a pipe", &e))?,
            // An error means that the process's record is gone. No exit will follow; only the end of the pipe.
            Ok(()) = exited.changed() => return Ok(None),
        };
        data.resize(chunk_size(output, *marked), 0);
        Ok(ready.try_io(|_| output.read(data)).ok())
    }

    async fn send(&self, chunk: &OutputChunk) -> Result<(), CallError> {
        self.stream.send(chunk).await.map_err(|e| CallError::internal("send output", &e))
    }
}

/// No chunk extends past the exit mark.
fn chunk_size(output: &Client<'_>, marked: bool) -> usize {
    let left = output.left().filter(|_| !marked).and_then(|left| usize::try_from(left).ok());
    left.map_or(STDIO_CHUNK, |left| left.min(STDIO_CHUNK))
}
