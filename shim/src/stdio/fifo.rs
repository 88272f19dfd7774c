//! Fifos that containerd's client creates, and the pipes of logging programs.
//!
//! husk opens fifos for reading and writing. Such an open does not wait for the other end, and the stream survives
//! clients that leave and reconnect: input ends only when containerd closes it, output only when its copy ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

/// Opens the fifo at `path` to read from it.
pub(super) fn open_input(path: &Path) -> io::Result<pipe::Receiver> {
    pipe::OpenOptions::new().read_write(true).open_receiver(path)
}

/// Opens the fifo at `path` to write to it.
pub(super) fn open_output(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
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

/// Writes all of `data` and calls `progressed` after each part. Waits while the pipe is full.
pub(super) async fn write_all(pipe: &mut pipe::Sender, mut data: &[u8], progressed: impl Fn()) -> io::Result<()> {
    while !data.is_empty() {
        let written = pipe.write(data).await?;
        data = &data[written..];
        progressed();
    }
    Ok(())
}
