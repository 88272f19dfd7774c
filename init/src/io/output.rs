//! From a process's pipe to its stream.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use husk_protos::STDIO_CHUNK;
use husk_protos::stdio::OutputChunk;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use ttrpc::r#async::ServerStreamSender;

use crate::error::{Error, Kind};
use crate::serve::Gone;

use super::watch_fd;

/// How a pump ended.
pub enum End {
    /// The last writer has closed the pipe, and all was sent.
    OfPipe,
    /// The stream cannot be sent to any more; the pipe may have more.
    OfStream(OwnedFd, Error),
}

/// What is still to be sent before the stream says that the process has exited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// The process lives.
    Alive,
    /// It has exited; this much of what it wrote is still in the pipe.
    Due(usize),
    /// Said.
    Sent,
}

/// Sends what comes out of the pipe until its end. The mark goes out after what was in the pipe at the exit: a process that outlives
/// it and keeps the pipe open can neither delay the mark nor slip output before it.
pub async fn pump(
    fd: OwnedFd,
    mut exited: watch::Receiver<bool>,
    stream: &ServerStreamSender<OutputChunk>,
    gone: &mut Gone,
) -> End {
    let pipe = match watch_fd(fd, Interest::READABLE) {
        Ok(pipe) => pipe,
        Err(error) => {
            let (fd, error) = error.into_parts();
            return End::OfStream(fd, Error::internal("watch a pipe", &error));
        }
    };
    let mut mark = Mark::Alive;
    loop {
        if mark == Mark::Alive && *exited.borrow() {
            match in_pipe(&pipe) {
                Ok(left) => mark = Mark::Due(left),
                Err(error) => return End::OfStream(pipe.into_inner(), Error::internal("look into a pipe", &error)),
            }
        }
        if mark == Mark::Due(0) {
            let chunk = OutputChunk { exited: true, ..Default::default() };
            if let Err(error) = stream.send(&chunk).await {
                return End::OfStream(pipe.into_inner(), lost(&error));
            }
            mark = Mark::Sent;
        }
        let most = if let Mark::Due(left) = mark { left.min(STDIO_CHUNK) } else { STDIO_CHUNK };
        let mut ready = tokio::select! {
            biased;
            () = gone.wait() => return End::OfStream(pipe.into_inner(), Error::new(Kind::Aborted, "the connection ended")),
            ready = pipe.readable() => match ready {
                Ok(ready) => ready,
                Err(error) => return End::OfStream(pipe.into_inner(), Error::internal("wait for a pipe", &error)),
            },
            // An error says that the process's record is gone, and with it any exit: then only the pipe's end is left to wait for.
            Ok(()) = exited.changed(), if mark == Mark::Alive => continue,
        };
        let mut data = vec![0; most];
        match ready.try_io(|pipe| Ok(nix::unistd::read(pipe.get_ref(), &mut data)?)) {
            Ok(Ok(0)) => break,
            Ok(Ok(read)) => {
                data.truncate(read);
                let chunk = OutputChunk { data, ..Default::default() };
                if let Err(error) = stream.send(&chunk).await {
                    return End::OfStream(pipe.into_inner(), lost(&error));
                }
                if let Mark::Due(left) = &mut mark {
                    *left -= read;
                }
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return End::OfStream(pipe.into_inner(), Error::internal("read a pipe", &error)),
            Err(_would_block) => {}
        }
    }
    End::OfPipe
}

fn lost(error: &ttrpc::Error) -> Error {
    Error::internal("send output", error)
}

/// Bytes in the pipe (FIONREAD, pipe(7)).
fn in_pipe(pipe: &AsyncFd<OwnedFd>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, into a variable that outlives the call.
    let done = unsafe { libc::ioctl(pipe.get_ref().as_raw_fd(), libc::FIONREAD as _, &raw mut bytes) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
}
