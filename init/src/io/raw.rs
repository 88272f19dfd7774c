//! Raw streams: each connection carries the bytes of one stream ([`husk_protos::streams`]).
//!
//! The kernel moves what it can between pipe and socket. Waits end when the host closes the connection.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::frame;
use husk_protos::relay::{CONNECTED, status};
use husk_protos::stdio::{StreamKind, StreamRequest};
use husk_protos::streams::{HEADER, OUTPUT_WINDOW, PIPE_SIZE, length};
use nix::errno::Errno;
use nix::poll::PollFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_vsock::VsockStream;

use super::input::is_unread;
use super::slot::{Client, Slot, ready_now};
use super::{ProcessStreams, Streams};
use crate::error::{CallError, FailureKind};
use crate::fd::{set_vsock_buffer, splice, watch_fd};

/// Time for the first frame. The host sends it together with the secret.
const FIRST_FRAME: Duration = Duration::from_secs(10);
/// Bytes read at once where the kernel does not move them: a terminal's output, and the beginning of each chunk of an
/// input.
const BUFFER: usize = 4096;

/// A connection of the host.
type Socket = AsyncFd<OwnedFd>;

/// Serves the stream that the host's first frame names, to its end or the host's.
pub(crate) async fn serve(mut host: VsockStream, streams: Arc<Streams>) {
    let _open = streams.connections.open();
    let request = match timeout(FIRST_FRAME, frame::read::<StreamRequest>(&mut host)).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => return tracing::warn!(error = %Chain(&error), "failed to read the name of a raw stream"),
        Err(_) => return tracing::warn!("the name of a raw stream did not arrive within {FIRST_FRAME:?}"),
    };
    let served = match watch(host, &request) {
        Ok(socket) => serve_named(&socket, &request, &streams).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served
        && !is_hang_up(&error)
    {
        let (container, exec) = (request.container_id, request.exec_id);
        tracing::warn!(container, exec, stream = ?request.kind, error = %Chain(&error), "a raw stream ended early");
    }
}

/// Registers a connection with the runtime. Without interest in its room, which the kernel would announce after each
/// packet: an announcement costs two switches between PID 1 and the process.
fn watch(host: VsockStream, request: &StreamRequest) -> io::Result<Socket> {
    if request.kind != StreamKind::STREAM_KIND_STDIN.into() {
        set_vsock_buffer(&host, OUTPUT_WINDOW)?;
    }
    Ok(watch_fd(OwnedFd::from(host), Interest::READABLE)?)
}

/// Whether the host has closed the connection, as it may at any time.
fn is_hang_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
}

async fn serve_named(socket: &Socket, request: &StreamRequest, streams: &Streams) -> io::Result<()> {
    let process = tokio::select! {
        process = streams.find(&request.container_id, &request.exec_id) => process,
        // The host sends nothing before the reply.
        closed = closed(socket) => return closed,
    };
    let process = match process {
        Ok(process) => process,
        Err(error) => return reject(socket, error).await,
    };
    let (slot, name, interest) = match request.kind.enum_value() {
        Ok(StreamKind::STREAM_KIND_STDIN) => (&process.stdin, "stdin", Interest::WRITABLE),
        Ok(StreamKind::STREAM_KIND_STDOUT) => (&process.stdout, "stdout", Interest::READABLE),
        Ok(StreamKind::STREAM_KIND_STDERR) => (&process.stderr, "stderr", Interest::READABLE),
        _ => return write_all(socket, &[libc::EINVAL as u8]).await,
    };
    attach(socket, slot, name, interest, &process).await
}

async fn attach(
    socket: &Socket,
    slot: &Slot,
    name: &str,
    interest: Interest,
    process: &ProcessStreams,
) -> io::Result<()> {
    let client = match slot.attach(name, interest) {
        Ok(client) => client,
        Err(error) => return reject(socket, error).await,
    };
    write_all(socket, &[CONNECTED]).await?;
    let (terminal, exited) = (process.terminal.is_some(), process.exited.subscribe());
    if interest == Interest::WRITABLE {
        return Input::new(socket, client, exited, terminal).copy().await;
    }
    // None: the output has ended.
    let Some(client) = client else { return Ok(()) };
    if terminal {
        copy_terminal(socket, &client, exited).await?;
    } else {
        copy_pipe(socket, &client).await?;
    }
    client.end();
    Ok(())
}

async fn reject(socket: &Socket, error: CallError) -> io::Result<()> {
    let errno = match error.kind {
        FailureKind::NotFound => Errno::ENOENT,
        FailureKind::AlreadyExists => Errno::EBUSY,
        _ => Errno::EIO,
    };
    write_all(socket, &[status::<()>(&Err(errno.into()))]).await?;
    Err(io::Error::other(error.message))
}

/// Sends what a process writes to its pipe until the last writer has closed it.
async fn copy_pipe(socket: &Socket, output: &Client<'_>) -> io::Result<()> {
    loop {
        let mut readable = tokio::select! {
            biased;
            closed = closed(socket) => return closed,
            readable = output.pipe.readable() => readable?,
        };
        match output.splice_to(socket.as_fd(), PIPE_SIZE) {
            Ok(0) => return Ok(()),
            // The pipe is probably empty, and asking costs less than another attempt.
            Ok(moved) if moved < PIPE_SIZE / 4 => {
                if output.is_empty()? {
                    readable.clear_ready();
                }
            }
            // A process that writes without pause must not starve the rest of PID 1.
            Ok(_) => tokio::task::yield_now().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // The process may have written since the attempt. Then the socket has room.
                if output.is_empty()? {
                    readable.clear_ready();
                } else if ready_now(socket.as_fd(), PollFlags::POLLOUT).is_empty() {
                    tokio::select! {
                        closed = closed(socket) => return closed,
                        room = room_in(socket) => room?,
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sends what appears on a terminal until no process has it open.
async fn copy_terminal(socket: &Socket, output: &Client<'_>, mut exited: watch::Receiver<bool>) -> io::Result<()> {
    loop {
        let mut data = Vec::new();
        if output.has_rest() {
            data.resize(BUFFER, 0);
            let read = output.read(&mut data)?;
            write_all(socket, &data[..read]).await?;
            continue;
        }
        let mut ready = tokio::select! {
            biased;
            closed = closed(socket) => return closed,
            ready = output.pipe.readable() => ready?,
            // The rest of the process's output may have been set aside.
            Ok(()) = exited.changed() => continue,
        };
        data.resize(BUFFER, 0);
        match ready.try_io(|_| output.read(&mut data)) {
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(read)) => write_all(socket, &data[..read]).await?,
            // EIO: no process has the terminal open any more, and all output was read.
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// An input on its way from the host to a process.
struct Input<'a> {
    socket: &'a Socket,
    /// None when the process no longer reads. The rest of the input is discarded.
    process: Option<Client<'a>>,
    exited: watch::Receiver<bool>,
    terminal: bool,
    buffer: Box<[u8; BUFFER]>,
    /// The part of the buffer that is still to be used.
    filled: std::ops::Range<usize>,
    /// Bytes of the present chunk that are not in the buffer.
    left: usize,
    /// The socket may be readable although the runtime does not know.
    unannounced: bool,
}

impl<'a> Input<'a> {
    fn new(socket: &'a Socket, process: Option<Client<'a>>, exited: watch::Receiver<bool>, terminal: bool) -> Self {
        let buffer = Box::new([0; BUFFER]);
        Self { socket, process, exited, terminal, buffer, filled: 0..0, left: 0, unannounced: false }
    }

    async fn copy(mut self) -> io::Result<()> {
        loop {
            if self.left == 0 {
                let Some(header) = self.header() else {
                    self.fill().await?;
                    continue;
                };
                self.left = length(header).ok_or(io::ErrorKind::InvalidData)?;
                if self.left == 0 {
                    break;
                }
            } else if !self.filled.is_empty() {
                self.write_part().await?;
            } else if self.left < BUFFER || self.terminal || self.process.is_none() {
                self.fill().await?;
            } else {
                self.splice().await?;
            }
        }
        self.stop_writing();
        write_all(self.socket, &[CONNECTED]).await
    }

    /// The header of the next chunk, if it is in the buffer.
    fn header(&mut self) -> Option<[u8; HEADER]> {
        let header = *self.buffer[self.filled.clone()].first_chunk()?;
        self.filled.start += HEADER;
        Some(header)
    }

    /// Waits for input and reads it behind the rest of a header.
    async fn fill(&mut self) -> io::Result<()> {
        self.buffer.copy_within(self.filled.clone(), 0);
        self.filled = 0..self.filled.len();
        loop {
            if !self.unannounced {
                let ready = tokio::select! {
                    ready = self.socket.readable() => Some(ready?),
                    Ok(()) = self.exited.changed() => None,
                };
                let Some(mut ready) = ready else {
                    self.process_exited();
                    continue;
                };
                let room = &mut self.buffer[self.filled.end..];
                match ready.try_io(|socket| Ok(nix::unistd::read(socket.get_ref(), room)?)) {
                    Ok(Ok(0)) => return Err(io::ErrorKind::ConnectionAborted.into()),
                    Ok(Ok(read)) => {
                        if self.filled.end + read < BUFFER {
                            ready.clear_ready();
                        }
                        self.filled.end += read;
                        return Ok(());
                    }
                    Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(Err(error)) => return Err(error),
                    Err(_would_block) => {}
                }
                continue;
            }
            match nix::unistd::read(self.socket.get_ref(), &mut self.buffer[self.filled.end..]) {
                Ok(0) => return Err(io::ErrorKind::ConnectionAborted.into()),
                Ok(read) => {
                    self.filled.end += read;
                    return Ok(());
                }
                // Only now: what is left after a read is not announced again.
                Err(Errno::EAGAIN) => self.unannounced = false,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes what the buffer has of the chunk.
    async fn write_part(&mut self) -> io::Result<()> {
        let end = self.filled.end.min(self.filled.start + self.left);
        let part = self.filled.start..end;
        let written = match &self.process {
            None => part.len(),
            Some(process) => match nix::unistd::write(process.pipe.get_ref(), &self.buffer[part]) {
                Ok(written) => written,
                Err(error) => return self.cannot_write(error).await,
            },
        };
        self.filled.start += written;
        self.left -= written;
        Ok(())
    }

    /// Has the kernel move a part of the chunk.
    async fn splice(&mut self) -> io::Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        match splice(self.socket.get_ref(), process.pipe.get_ref(), self.left) {
            Ok(0) => Err(io::ErrorKind::ConnectionAborted.into()),
            Ok(moved) => {
                self.left -= moved;
                // A client that sends without pause must not starve the rest of PID 1.
                tokio::task::yield_now().await;
                Ok(())
            }
            Err(Errno::EAGAIN) if has_room(process) => {
                // Nothing has arrived.
                self.unannounced = true;
                self.fill().await
            }
            Err(error) => self.cannot_write(error).await,
        }
    }

    /// Waits for room after a failed write, or notes that the process no longer reads.
    async fn cannot_write(&mut self, error: Errno) -> io::Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        match error {
            Errno::EINTR => return Ok(()),
            Errno::EAGAIN => {}
            error if is_unread(&error.into()) => {
                self.stop_writing();
                return Ok(());
            }
            error => return Err(error.into()),
        }
        // The wait for the host's end consumes announcements of input.
        self.unannounced = true;
        tokio::select! {
            room = room(process) => room,
            closed = closed(self.socket) => closed,
            Ok(()) = self.exited.changed() => {
                self.process_exited();
                Ok(())
            }
        }
    }

    /// Another process may still hold the read end. If none does, nothing else would end this stream.
    fn process_exited(&mut self) {
        if self.process.as_ref().is_some_and(Client::has_no_reader) {
            self.stop_writing();
        }
    }

    fn stop_writing(&mut self) {
        if let Some(process) = self.process.take() {
            process.end();
        }
    }
}

fn has_room(process: &Client<'_>) -> bool {
    !ready_now(process.pipe.get_ref().as_fd(), PollFlags::POLLOUT).is_empty()
}

/// Waits until the process's pipe or terminal has room, or no reader.
async fn room(process: &Client<'_>) -> io::Result<()> {
    loop {
        let mut ready = process.pipe.writable().await?;
        if has_room(process) {
            return Ok(());
        }
        ready.clear_ready();
    }
}

/// Returns with an error once the host has closed the connection. Consumes announcements of what the host sends.
async fn closed(socket: &Socket) -> io::Result<()> {
    loop {
        let mut ready = socket.readable().await?;
        if ready.ready().is_read_closed() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        ready.clear_ready();
    }
}

/// Waits until the connection has room, or has ended.
async fn room_in(socket: &Socket) -> io::Result<()> {
    let full = watch_fd(socket.get_ref().try_clone()?, Interest::WRITABLE)?;
    full.writable().await.map(drop)
}

async fn write_all(socket: &Socket, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match nix::unistd::write(socket.get_ref(), data) {
            Ok(written) => data = &data[written..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => room_in(socket).await?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use husk_protos::streams::header;

    use super::*;
    use crate::fd::set_nonblocking;
    use crate::io::StreamSet;

    /// A connection: the host's end, and the guest's.
    fn connection() -> (UnixStream, Socket) {
        let (host, guest) = UnixStream::pair().unwrap();
        set_nonblocking(&guest).unwrap();
        (host, watch_fd(guest.into(), Interest::READABLE).unwrap())
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    fn chunk(data: &[u8]) -> Vec<u8> {
        [&header(data.len())[..], data].concat()
    }

    #[tokio::test]
    async fn input_reaches_the_process_whatever_its_chunks_and_ends_with_an_empty_one() {
        for sizes in [&[][..], &[1], &[5, 4092, 4096, 1, 70_000], &[CHUNK, 3], &[10; 1000]] {
            let (process, ends) = ProcessStreams::new(StreamSet { stdin: true, ..StreamSet::default() }).unwrap();
            let (mut host, guest) = connection();
            let data: Vec<_> = sizes.iter().map(|size| pattern(*size)).collect();
            let expected = data.concat();
            let reader = thread::spawn(move || {
                let mut received = Vec::new();
                std::fs::File::from(ends.stdin.unwrap()).read_to_end(&mut received).unwrap();
                received
            });
            let sender = thread::spawn(move || {
                let mut reply = [0xff; 2];
                host.read_exact(&mut reply[..1]).unwrap();
                let chunks: Vec<_> = data.iter().map(|data| chunk(data)).collect();
                host.write_all(&[chunks.concat(), chunk(b"")].concat()).unwrap();
                host.read_exact(&mut reply[1..]).unwrap();
                reply
            });
            attach(&guest, &process.stdin, "stdin", Interest::WRITABLE, &process).await.unwrap();
            assert_eq!(sender.join().unwrap(), [CONNECTED; 2], "{sizes:?}");
            assert!(reader.join().unwrap() == expected, "{sizes:?}");
        }
    }

    /// The largest chunk.
    const CHUNK: usize = husk_protos::streams::CHUNK_MAX;

    #[tokio::test]
    async fn input_that_nobody_reads_is_discarded_and_an_oversized_chunk_rejected() {
        let (process, ends) = ProcessStreams::new(StreamSet { stdin: true, ..StreamSet::default() }).unwrap();
        let (mut host, guest) = connection();
        host.write_all(&header(CHUNK + 1)).unwrap();
        let stdin = || attach(&guest, &process.stdin, "stdin", Interest::WRITABLE, &process);
        assert_eq!(stdin().await.unwrap_err().kind(), io::ErrorKind::InvalidData);

        drop(ends);
        process.exited();
        let (mut host, guest) = connection();
        let sender = thread::spawn(move || {
            host.write_all(&[chunk(&pattern(CHUNK)), chunk(b"more"), chunk(b"")].concat()).unwrap();
            let mut replies = [0xff; 2];
            host.read_exact(&mut replies).unwrap();
            replies
        });
        attach(&guest, &process.stdin, "stdin", Interest::WRITABLE, &process).await.unwrap();
        assert_eq!(sender.join().unwrap(), [CONNECTED; 2]);
    }

    #[tokio::test]
    async fn a_host_that_leaves_ends_its_hold_on_an_input_that_is_full() {
        let (process, ends) = ProcessStreams::new(StreamSet { stdin: true, ..StreamSet::default() }).unwrap();
        let (mut host, guest) = connection();
        let sender = thread::spawn(move || {
            let data = chunk(&pattern(CHUNK));
            // The pipe holds one chunk, and the connection some more.
            host.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
            while host.write_all(&data).is_ok() {}
        });
        let left = attach(&guest, &process.stdin, "stdin", Interest::WRITABLE, &process).await.unwrap_err();
        assert_eq!(left.kind(), io::ErrorKind::ConnectionAborted);
        sender.join().unwrap();
        // The next client continues.
        assert!(process.stdin.attach("stdin", Interest::WRITABLE).unwrap().is_some());
        drop(ends);
    }

    #[tokio::test]
    async fn output_arrives_unchanged_and_the_exit_knows_its_length() {
        let (process, ends) = ProcessStreams::new(StreamSet { stdout: true, ..StreamSet::default() }).unwrap();
        let (mut host, guest) = connection();
        let data = pattern(3_000_000);
        let expected = data.clone();
        let writer = thread::spawn(move || std::fs::File::from(ends.stdout.unwrap()).write_all(&data).unwrap());
        let reader = thread::spawn(move || {
            let mut received = Vec::new();
            host.read_to_end(&mut received).unwrap();
            received
        });
        attach(&guest, &process.stdout, "stdout", Interest::READABLE, &process).await.unwrap();
        drop(guest);
        let received = reader.join().unwrap();
        assert!(received[0] == CONNECTED && received[1..] == expected);
        writer.join().unwrap();
        process.exited();
        assert_eq!(process.bytes_at_exit(), [3_000_000, 0]);
    }

    #[tokio::test]
    async fn a_stream_that_cannot_be_had_is_rejected_by_its_cause() {
        let (process, _ends) = ProcessStreams::new(StreamSet { stdout: true, ..StreamSet::default() }).unwrap();
        let _first = process.stdout.attach("stdout", Interest::READABLE).unwrap();
        for (slot, name, errno) in [(&process.stdout, "stdout", libc::EBUSY), (&process.stderr, "stderr", libc::ENOENT)]
        {
            let (mut host, guest) = connection();
            attach(&guest, slot, name, Interest::READABLE, &process).await.unwrap_err();
            let mut reply = [0];
            host.read_exact(&mut reply).unwrap();
            assert_eq!(i32::from(reply[0]), errno, "{name}");
        }
    }
}
