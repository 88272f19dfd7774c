//! From a process's pipe, or its terminal, to its stream.

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

/// More than a terminal holds of what was written to it: its two buffers have 8 KiB (pty_common_install) and 4 KiB (N_TTY_BUF_SIZE), and
/// what is in the first cannot be asked for.
const TERMINAL_HOLDS: usize = 64 * 1024;

/// What output comes out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A pipe's reading end.
    Pipe,
    /// A terminal's master.
    Terminal,
}

/// How a pump ended.
pub enum End {
    /// The last writer has closed the pipe, and all was sent.
    Finished,
    /// The stream cannot be sent to any more; the pipe may have more.
    Broken(OwnedFd, Error),
}

/// What is still to be sent before the stream says that the process has exited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// The process lives.
    Alive,
    /// It has exited; this much of what it wrote is still in the pipe, or at most this much in the terminal.
    Due(usize),
    /// Said.
    Sent,
}

/// Sends what comes out of the pipe until its end. The mark goes out after what was in the pipe at the exit: a process that outlives
/// it and keeps the pipe open can neither delay the mark nor slip output before it.
pub async fn pump(
    fd: OwnedFd,
    source: Source,
    mut exited: watch::Receiver<bool>,
    stream: &ServerStreamSender<OutputChunk>,
    gone: &mut Gone,
) -> End {
    let pipe = match watch_fd(fd, Interest::READABLE) {
        Ok(pipe) => pipe,
        Err(error) => {
            let (fd, error) = error.into_parts();
            return End::Broken(fd, Error::internal("watch a pipe", &error));
        }
    };
    let mut mark = Mark::Alive;
    loop {
        if mark == Mark::Alive && *exited.borrow() {
            let left = if source == Source::Terminal { Ok(TERMINAL_HOLDS) } else { in_pipe(&pipe) };
            match left {
                Ok(left) => mark = Mark::Due(left),
                Err(error) => return End::Broken(pipe.into_inner(), Error::internal("look into a pipe", &error)),
            }
        }
        if mark == Mark::Due(0) {
            let chunk = OutputChunk { exited: true, ..Default::default() };
            if let Err(error) = stream.send(&chunk).await {
                return End::Broken(pipe.into_inner(), lost(&error));
            }
            mark = Mark::Sent;
        }
        let most = if let Mark::Due(left) = mark { left.min(STDIO_CHUNK) } else { STDIO_CHUNK };
        // Empty while it waits: an idle stream holds no memory.
        let mut chunk = OutputChunk::new();
        let read = if source == Source::Terminal && matches!(mark, Mark::Due(_)) {
            // Asked of the terminal itself: its EAGAIN comes only when all that was written has come through (n_tty_read).
            chunk.data.resize(most, 0);
            read(&pipe, &mut chunk.data)
        } else {
            let mut ready = tokio::select! {
                biased;
                () = gone.wait() => return End::Broken(pipe.into_inner(), Error::new(Kind::Aborted, "the connection ended")),
                ready = pipe.readable() => match ready {
                    Ok(ready) => ready,
                    Err(error) => return End::Broken(pipe.into_inner(), Error::internal("wait for a pipe", &error)),
                },
                // An error says that the process's record is gone, and with it any exit: then only the pipe's end is left to wait for.
                Ok(()) = exited.changed(), if mark == Mark::Alive => continue,
            };
            chunk.data.resize(most, 0);
            match ready.try_io(|pipe| read(pipe, &mut chunk.data)) {
                Ok(read) => read,
                Err(_would_block) => continue,
            }
        };
        match read {
            Ok(0) => break,
            // No process has the terminal any more (EIO, as of ptmx in the kernel's drivers/tty/n_tty.c); all was read before.
            Err(error) if source == Source::Terminal && error.raw_os_error() == Some(libc::EIO) => break,
            Ok(read) => {
                chunk.data.truncate(read);
                if let Err(error) = stream.send(&chunk).await {
                    return End::Broken(pipe.into_inner(), lost(&error));
                }
                if let Mark::Due(left) = &mut mark {
                    *left -= read;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => mark = Mark::Due(0),
            Err(error) => return End::Broken(pipe.into_inner(), Error::internal("read a pipe", &error)),
        }
    }
    End::Finished
}

fn lost(error: &ttrpc::Error) -> Error {
    Error::internal("send output", error)
}

fn read(pipe: &AsyncFd<OwnedFd>, data: &mut [u8]) -> io::Result<usize> {
    Ok(nix::unistd::read(pipe.get_ref(), data)?)
}

/// Bytes in the pipe (FIONREAD, pipe(7)).
fn in_pipe(pipe: &AsyncFd<OwnedFd>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, into a variable that outlives the call.
    let done = unsafe { libc::ioctl(pipe.get_ref().as_raw_fd(), libc::FIONREAD as _, &raw mut bytes) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
}
