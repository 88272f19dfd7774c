//! Fifos that containerd's client creates, and the pipes of logging programs.
//!
//! husk opens fifos for reading and writing. Such an open does not wait for the other end, and the stream survives
//! clients that leave and reconnect: input ends only when containerd closes it, output only when its copy ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use husk_protos::streams::PIPE_SIZE;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

/// Opens the fifo at `path` to read from it.
pub(super) fn open_input(path: &Path) -> io::Result<pipe::Receiver> {
    let fifo = pipe::OpenOptions::new().read_write(true).open_receiver(path)?;
    enlarge(&fifo);
    Ok(fifo)
}

/// Opens the fifo at `path` to write to it.
pub(super) fn open_output(path: &Path) -> io::Result<File> {
    let fifo = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    enlarge(&fifo);
    Ok(fifo)
}

/// Gives a fifo room for what one system call moves. One that keeps its size is only slower: a user whose pipes occupy
/// too much memory may not enlarge any (pipe(7), `pipe-user-pages-soft`).
fn enlarge(fifo: impl AsFd) {
    let size = fcntl(&fifo, FcntlArg::F_GETPIPE_SZ).unwrap_or(0);
    if size < PIPE_SIZE as i32
        && let Err(error) = fcntl(&fifo, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE as i32))
    {
        tracing::debug!(%error, size, "failed to enlarge a fifo");
    }
}

/// Reads the bytes that are in the fifo now; `None` if it is empty.
///
/// Asks the kernel: the runtime may not know yet that the fifo is readable, and would report it as empty.
pub(super) fn read_now(fifo: &pipe::Receiver, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match nix::unistd::read(fifo, buffer) {
        Ok(length) => Ok(Some(length)),
        Err(Errno::EAGAIN) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads and discards until the caller drops the future.
pub(super) async fn discard(fifo: &mut pipe::Receiver) {
    let mut buffer = [0; 4096];
    // The end or an error: nothing more can be read.
    while fifo.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
    std::future::pending().await
}

/// Writes all of `data` and calls `progressed` with the length of each part. Waits while the pipe is full.
pub(super) async fn write_all(pipe: &mut pipe::Sender, mut data: &[u8], progressed: impl Fn(usize)) -> io::Result<()> {
    while !data.is_empty() {
        let written = pipe.write(data).await?;
        data = &data[written..];
        progressed(written);
    }
    Ok(())
}
