//! Copies input from a TTRPC stream to a process's pipe or terminal.

use std::io;

use husk_protos::metered::Meter;
use husk_protos::stdio::InputChunk;
use tokio::sync::watch;
use ttrpc::r#async::ServerStreamReceiver;

use super::slot::Client;
use crate::connection::Disconnect;
use crate::error::{CallError, FailureKind};

/// How [`pump`] ended. The numbers are the bytes written to the pipe.
pub(super) enum InputEnd {
    /// The client has sent everything.
    Finished(u64),
    /// The process no longer reads its input.
    Unread(u64),
    /// The stream failed. Another one may continue.
    Broken(CallError),
}

/// Writes the stream's chunks to the pipe.
pub(super) async fn pump(
    process: &Client<'_>,
    mut exited: watch::Receiver<bool>,
    stream: &mut ServerStreamReceiver<InputChunk>,
    meter: &Meter,
    disconnect: &mut Disconnect,
) -> InputEnd {
    let mut written = 0;
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = stream.recv() => chunk,
            () = disconnect.wait() => return aborted(),
            Ok(()) = exited.changed() => {
                // Another process may still hold the read end. If none does, nothing else would end this stream.
                if process.has_no_reader() {
                    return InputEnd::Unread(written);
                }
                continue;
            }
        };
        let chunk = match chunk {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return InputEnd::Finished(written),
            Err(error) => return InputEnd::Broken(CallError::internal("receive input", &error)),
        };
        let wrote = tokio::select! {
            wrote = write_all(process, &chunk.data, &mut written) => wrote,
            () = disconnect.wait() => return aborted(),
        };
        match wrote {
            Ok(()) => meter.consumed(&chunk),
            Err(error) if is_unread(&error) => {
                meter.consumed(&chunk);
                return InputEnd::Unread(written);
            }
            Err(error) => return InputEnd::Broken(CallError::internal("write a pipe", &error)),
        }
    }
}

/// Discards the rest of the stream. A TTRPC client receives no response while it sends: with a full window it would
/// never learn that nobody reads.
pub(super) async fn discard(stream: &mut ServerStreamReceiver<InputChunk>, meter: &Meter, disconnect: &mut Disconnect) {
    loop {
        tokio::select! {
            chunk = stream.recv() => match chunk {
                Ok(Some(chunk)) => meter.consumed(&chunk),
                Ok(None) | Err(_) => return,
            },
            () = disconnect.wait() => return,
        }
    }
}

/// EPIPE from a pipe, EIO from a terminal.
pub(super) fn is_unread(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe || error.raw_os_error() == Some(libc::EIO)
}

fn aborted() -> InputEnd {
    InputEnd::Broken(CallError::new(FailureKind::Aborted, "the connection ended"))
}

/// Adds to `written` after each write, so that it stays correct when the future is dropped.
async fn write_all(process: &Client<'_>, mut data: &[u8], written: &mut u64) -> io::Result<()> {
    while !data.is_empty() {
        let mut ready = process.pipe.writable().await?;
        match ready.try_io(|pipe| Ok(nix::unistd::write(pipe.get_ref(), data)?)) {
            Ok(Ok(bytes)) => {
                data = &data[bytes..];
                *written += bytes as u64;
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}
