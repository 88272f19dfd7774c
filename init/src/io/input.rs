//! Copies input from a stream to a process's pipe or terminal.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use husk_protos::metered::Meter;
use husk_protos::stdio::InputChunk;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use ttrpc::r#async::ServerStreamReceiver;

use crate::connection::Disconnect;
use crate::error::{CallError, FailureKind};
use crate::fd::watch_fd;

/// How [`pump`] ended. The numbers are the bytes written to the pipe.
pub(super) enum InputEnd {
    /// The client has sent everything.
    Finished(u64),
    /// The process no longer reads its input.
    Unread(u64),
    /// The stream failed. Another one may continue.
    Broken(OwnedFd, CallError),
}

/// Writes the stream's chunks to the pipe.
pub(super) async fn pump(
    fd: OwnedFd,
    mut exited: watch::Receiver<bool>,
    stream: &mut ServerStreamReceiver<InputChunk>,
    meter: &Meter,
    disconnect: &mut Disconnect,
) -> InputEnd {
    let pipe = match watch_fd(fd, Interest::WRITABLE) {
        Ok(pipe) => pipe,
        Err(error) => {
            let (fd, error) = error.into_parts();
            return InputEnd::Broken(fd, CallError::internal("watch a pipe", &error));
        }
    };
    let mut written = 0;
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = stream.recv() => chunk,
            () = disconnect.wait() => return aborted(pipe),
            Ok(()) = exited.changed() => {
                // Another process may still hold the read end. If none does, nothing else would end this stream.
                if has_no_reader(&pipe) {
                    return InputEnd::Unread(written);
                }
                continue;
            }
        };
        let chunk = match chunk {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return InputEnd::Finished(written),
            Err(error) => return InputEnd::Broken(pipe.into_inner(), CallError::internal("receive input", &error)),
        };
        let wrote = tokio::select! {
            wrote = write_all(&pipe, &chunk.data, &mut written) => wrote,
            () = disconnect.wait() => return aborted(pipe),
        };
        match wrote {
            Ok(()) => meter.consumed(&chunk),
            // EPIPE from a pipe, EIO from a terminal.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe || error.raw_os_error() == Some(libc::EIO) => {
                meter.consumed(&chunk);
                return InputEnd::Unread(written);
            }
            Err(error) => return InputEnd::Broken(pipe.into_inner(), CallError::internal("write a pipe", &error)),
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

fn aborted(pipe: AsyncFd<OwnedFd>) -> InputEnd {
    InputEnd::Broken(pipe.into_inner(), CallError::new(FailureKind::Aborted, "the connection ended"))
}

/// Adds to `written` after each write, so that it stays correct when the future is dropped.
async fn write_all(pipe: &AsyncFd<OwnedFd>, mut data: &[u8], written: &mut u64) -> io::Result<()> {
    while !data.is_empty() {
        let mut ready = pipe.writable().await?;
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

/// POLLERR on the write end of a pipe: the last reader has closed it (pipe(7), poll(2)). POLLHUP on the master of a
/// terminal: no process has it open.
fn has_no_reader(pipe: &AsyncFd<OwnedFd>) -> bool {
    let mut fds = [PollFd::new(pipe.get_ref().as_fd(), PollFlags::empty())];
    loop {
        match poll(&mut fds, PollTimeout::ZERO) {
            Err(Errno::EINTR) => {}
            Err(_) => return false,
            Ok(_) => {
                let closed = PollFlags::POLLERR | PollFlags::POLLHUP;
                return fds[0].revents().is_some_and(|events| events.intersects(closed));
            }
        }
    }
}
