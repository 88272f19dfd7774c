//! From a stream to a process's pipe, or its terminal.

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

use crate::error::{Error, Kind};
use crate::serve::Gone;

use super::watch_fd;

/// How a pump ended, with the bytes that reached the pipe.
pub enum End {
    /// Nothing more is to come.
    Finished(u64),
    /// Nobody is there to read what is still to come.
    Unread(u64),
    /// The stream broke off; another may go on.
    Broken(OwnedFd, Error),
}

/// Writes what comes on the stream into the pipe.
pub async fn pump(
    fd: OwnedFd,
    mut exited: watch::Receiver<bool>,
    stream: &mut ServerStreamReceiver<InputChunk>,
    meter: &Meter,
    gone: &mut Gone,
) -> End {
    let pipe = match watch_fd(fd, Interest::WRITABLE) {
        Ok(pipe) => pipe,
        Err(error) => {
            let (fd, error) = error.into_parts();
            return End::Broken(fd, Error::internal("watch a pipe", &error));
        }
    };
    let mut written = 0;
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = stream.recv() => chunk,
            () = gone.wait() => return aborted(pipe),
            Ok(()) = exited.changed() => {
                // Somebody else may still hold the other end; otherwise nobody will ever read, nor this stream be told.
                if has_no_reader(&pipe) {
                    return End::Unread(written);
                }
                continue;
            }
        };
        let chunk = match chunk {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return End::Finished(written),
            Err(error) => return End::Broken(pipe.into_inner(), Error::internal("receive input", &error)),
        };
        let wrote = tokio::select! {
            wrote = write_all(&pipe, &chunk.data, &mut written) => wrote,
            () = gone.wait() => return aborted(pipe),
        };
        match wrote {
            Ok(()) => meter.consumed(&chunk),
            // EPIPE of a pipe, EIO of a terminal.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe || error.raw_os_error() == Some(libc::EIO) => {
                meter.consumed(&chunk);
                return End::Unread(written);
            }
            Err(error) => return End::Broken(pipe.into_inner(), Error::internal("write a pipe", &error)),
        }
    }
}

/// Takes what is still to come, and throws it away. A client's TTRPC cannot hear an answer while it sends: one that is left with a full
/// window would never learn that nobody reads.
pub async fn discard(stream: &mut ServerStreamReceiver<InputChunk>, meter: &Meter, gone: &mut Gone) {
    loop {
        tokio::select! {
            chunk = stream.recv() => match chunk {
                Ok(Some(chunk)) => meter.consumed(&chunk),
                Ok(None) | Err(_) => return,
            },
            () = gone.wait() => return,
        }
    }
}

fn aborted(pipe: AsyncFd<OwnedFd>) -> End {
    End::Broken(pipe.into_inner(), Error::new(Kind::Aborted, "the connection ended"))
}

/// `written` counts on even if the future is dropped in between.
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

/// POLLERR on a pipe's write end: its last reader has closed (pipe(7), poll(2)). POLLHUP on a terminal's master: no process has it.
fn has_no_reader(pipe: &AsyncFd<OwnedFd>) -> bool {
    let mut fds = [PollFd::new(pipe.get_ref().as_fd(), PollFlags::empty())];
    loop {
        match poll(&mut fds, PollTimeout::ZERO) {
            Err(Errno::EINTR) => {}
            Err(_) => return false,
            Ok(_) => {
                let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
                return fds[0].revents().is_some_and(|events| events.intersects(gone));
            }
        }
    }
}
