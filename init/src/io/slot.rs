//! One stream of a process: PID 1's end of its pipe or terminal, the client attached to it, and how many bytes belong
//! before the process's exit.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use husk_protos::lock::lock;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{CallError, FailureKind};
use crate::fd::{set_nonblocking, splice, watch_fd};

/// More than the output that a terminal buffers: 8 KiB (pty_common_install) and 4 KiB (N_TTY_BUF_SIZE). The amount in
/// the first buffer cannot be queried.
const TERMINAL_BUFFERS: usize = 64 * 1024;

/// One stream of a process.
#[derive(Debug)]
pub(super) struct Slot(Mutex<State>);

#[derive(Debug)]
struct State {
    end: End,
    /// Bytes of output that the client has taken from the pipe.
    taken: u64,
    /// What was in a terminal when the process exited. It precedes what the terminal has received since.
    rest: Vec<u8>,
    /// `taken` when the client has all that the process wrote before it exited.
    at_exit: Option<u64>,
}

/// PID 1's end of the pipe or terminal.
#[derive(Debug)]
enum End {
    /// The process has /dev/null instead.
    Absent,
    /// No client is attached.
    Idle(Arc<OwnedFd>),
    /// A client is attached.
    Attached {
        pipe: Arc<OwnedFd>,
        /// Close the pipe when the client detaches.
        closing: bool,
    },
    Closed,
}

impl Slot {
    pub(super) fn absent() -> Self {
        Self(Mutex::new(State { end: End::Absent, taken: 0, rest: Vec::new(), at_exit: None }))
    }

    pub(super) fn idle(fd: OwnedFd) -> io::Result<Self> {
        let slot = Self::absent();
        slot.open(fd)?;
        Ok(slot)
    }

    /// Opens the stream.
    pub(super) fn open(&self, fd: OwnedFd) -> io::Result<()> {
        // Affects only this end. The process's end is another open file and stays blocking, as programs expect.
        set_nonblocking(&fd)?;
        self.state().end = End::Idle(Arc::new(fd));
        Ok(())
    }

    /// Closes the pipe, once no client is attached to it. Idempotent.
    pub(super) fn close(&self) {
        let mut state = self.state();
        match &mut state.end {
            End::Idle(_) => state.end = End::Closed,
            End::Attached { closing, .. } => *closing = true,
            End::Absent | End::Closed => {}
        }
    }

    /// Attaches a client. None if the stream has reached its end.
    pub(super) fn attach(&self, name: &str, interest: Interest) -> Result<Option<Client<'_>>, CallError> {
        let mut state = self.state();
        let pipe = match &state.end {
            End::Idle(pipe) => pipe.clone(),
            End::Attached { .. } => {
                let what = format!("a client is already attached to {name}");
                return Err(CallError::new(FailureKind::AlreadyExists, what));
            }
            End::Absent => {
                return Err(CallError::new(FailureKind::NotFound, format!("the process has no {name}")));
            }
            End::Closed => return Ok(None),
        };
        let watched = watch_fd(pipe.clone(), interest).map_err(|e| CallError::internal("watch a pipe", &e))?;
        state.end = End::Attached { pipe, closing: false };
        // What an earlier client has taken does not count for this one.
        state.at_exit = state.at_exit.map(|total| total.saturating_sub(state.taken));
        state.taken = 0;
        Ok(Some(Client { slot: self, pipe: watched, ended: false }))
    }

    /// Records that the process has exited: determines what it has written before, which another process that has
    /// inherited the stream can then no longer change.
    pub(super) fn exited(&self, terminal: bool) {
        let mut state = self.state();
        let left = match &state.end {
            End::Idle(pipe) | End::Attached { pipe, .. } if terminal => {
                let rest = read_terminal(pipe);
                let length = rest.len();
                state.rest = rest;
                length
            }
            End::Idle(pipe) | End::Attached { pipe, .. } => buffered(pipe.as_fd()).unwrap_or_else(|error| {
                tracing::error!(%error, "failed to query the size of a pipe's content");
                0
            }),
            End::Absent | End::Closed => 0,
        };
        state.at_exit = Some(state.taken + left as u64);
    }

    /// How many bytes the client has taken when it has all that the process wrote before its exit.
    pub(super) fn at_exit(&self) -> u64 {
        self.state().at_exit.unwrap_or(0)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

/// A client's hold on a stream. Dropping it leaves the stream to the next client.
pub(super) struct Client<'a> {
    slot: &'a Slot,
    pub(super) pipe: AsyncFd<Arc<OwnedFd>>,
    ended: bool,
}

impl Client<'_> {
    /// The stream has ended: dropping the client closes the pipe.
    pub(super) fn end(mut self) {
        self.ended = true;
    }

    /// Takes output into `data`.
    pub(super) fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        let mut state = self.slot.state();
        let taken = if state.rest.is_empty() {
            read(|| nix::unistd::read(self.pipe.get_ref(), data))?
        } else {
            let taken = data.len().min(state.rest.len());
            data[..taken].copy_from_slice(&state.rest[..taken]);
            state.rest.drain(..taken);
            taken
        };
        state.taken += taken as u64;
        Ok(taken)
    }

    /// Moves output from a pipe to a socket.
    pub(super) fn splice_to(&self, socket: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        // Counts before anybody can ask: nothing else runs between the two.
        let taken = splice(self.pipe.get_ref(), socket, most)?;
        self.slot.state().taken += taken as u64;
        Ok(taken)
    }

    /// Whether a pipe is empty.
    pub(super) fn is_empty(&self) -> io::Result<bool> {
        Ok(buffered(self.pipe.get_ref().as_fd())? == 0)
    }

    /// Whether output can be read that the pipe or terminal does not announce.
    pub(super) fn has_rest(&self) -> bool {
        !self.slot.state().rest.is_empty()
    }

    /// After the process's exit: how many bytes before it are still to be taken.
    pub(super) fn left(&self) -> Option<u64> {
        let state = self.slot.state();
        state.at_exit.map(|total| total.saturating_sub(state.taken))
    }

    /// POLLERR on the write end of a pipe: the last reader has closed it (pipe(7), poll(2)). POLLHUP on the master of a
    /// terminal: no process has it open.
    pub(super) fn has_no_reader(&self) -> bool {
        ready_now(self.pipe.get_ref().as_fd(), PollFlags::empty()).intersects(PollFlags::POLLERR | PollFlags::POLLHUP)
    }
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        let mut state = self.slot.state();
        if let End::Attached { pipe, closing } = &state.end {
            state.end = if self.ended || *closing { End::Closed } else { End::Idle(pipe.clone()) };
        }
    }
}

/// Those of `events` that have occurred, and errors.
pub(super) fn ready_now(fd: BorrowedFd<'_>, events: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(fd, events)];
    loop {
        match poll(&mut fds, PollTimeout::ZERO) {
            Err(Errno::EINTR) => {}
            Err(_) => return PollFlags::empty(),
            Ok(_) => return fds[0].revents().unwrap_or(PollFlags::empty()),
        }
    }
}

/// Number of bytes in the pipe (FIONREAD, pipe(7)).
fn buffered(pipe: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to a variable that outlives the call.
    let done = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD as _, &raw mut bytes) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
}

/// Reads a pipe or a terminal with `attempt`. EIO: no process has the terminal open any more, and all output was read.
fn read(mut attempt: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
    match attempt() {
        // While a read looks for output, its process can write some and close the terminal: n_tty_read waits for
        // flush_to_ldisc without a lock. Nothing follows the close, so the next read finds that output.
        Err(Errno::EIO) => attempt(),
        result => result,
    }
}

/// What is in a terminal's buffers: it returns EAGAIN only after all output has passed them (n_tty_read), and EIO when
/// no process has it open any more.
fn read_terminal(master: &OwnedFd) -> Vec<u8> {
    let mut rest = Vec::new();
    let mut part = [0; 1024];
    while rest.len() < TERMINAL_BUFFERS {
        match nix::unistd::read(master, &mut part) {
            Ok(0) | Err(_) => break,
            Ok(read) => rest.extend_from_slice(&part[..read]),
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;

    #[tokio::test]
    async fn a_stream_has_one_client_at_a_time() {
        let (read, _write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let slot = Slot::idle(read).unwrap();
        let attach = || slot.attach("stdout", Interest::READABLE);
        let client = attach().unwrap().unwrap();
        assert_eq!(attach().err().unwrap().kind, FailureKind::AlreadyExists);
        drop(client);
        attach().unwrap().unwrap().end();
        assert!(attach().unwrap().is_none(), "the pipe has reached its end");
        let missing = Slot::absent();
        assert_eq!(missing.attach("stderr", Interest::READABLE).err().unwrap().kind, FailureKind::NotFound);
    }

    #[tokio::test]
    async fn a_close_waits_for_the_attached_client() {
        let (_read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let slot = Slot::idle(write).unwrap();
        let client = slot.attach("stdin", Interest::WRITABLE).unwrap();
        slot.close();
        slot.close();
        drop(client);
        assert!(slot.attach("stdin", Interest::WRITABLE).unwrap().is_none());
    }

    #[tokio::test]
    async fn what_precedes_the_exit_is_counted_for_the_present_client() {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let slot = Slot::idle(read).unwrap();
        let attach = || slot.attach("stdout", Interest::READABLE).unwrap().unwrap();
        nix::unistd::write(&write, b"0123456789").unwrap();
        let client = attach();
        assert_eq!((client.read(&mut [0; 4]).unwrap(), client.left()), (4, None));
        slot.exited(false);
        // Of a child that has inherited the pipe.
        nix::unistd::write(&write, b"later").unwrap();
        assert_eq!((slot.at_exit(), client.left()), (10, Some(6)));
        assert_eq!(client.read(&mut [0; 2]).unwrap(), 2);
        drop(client);
        let client = attach();
        assert_eq!((slot.at_exit(), client.left()), (4, Some(4)));
        assert_eq!((client.read(&mut [0; 100]).unwrap(), client.left()), (9, Some(0)));
    }

    #[test]
    fn output_right_before_a_terminal_is_closed_is_not_lost() {
        for (attempts, result) in [
            (vec![Err(Errno::EIO), Ok(7)], Ok(7)),
            (vec![Err(Errno::EIO), Err(Errno::EIO)], Err(Errno::EIO)),
            (vec![Err(Errno::EAGAIN)], Err(Errno::EAGAIN)),
            (vec![Ok(7)], Ok(7)),
        ] {
            let mut attempts = attempts.into_iter();
            assert_eq!(read(|| attempts.next().unwrap()), result);
            assert_eq!(attempts.next(), None);
        }
    }

    #[tokio::test]
    async fn a_terminals_output_before_the_exit_precedes_later_output() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let slot = Slot::idle(pty.master).unwrap();
        nix::unistd::write(&pty.slave, b"before ").unwrap();
        slot.exited(true);
        nix::unistd::write(&pty.slave, b"after").unwrap();
        let client = slot.attach("stdout", Interest::READABLE).unwrap().unwrap();
        assert!(client.has_rest());
        assert_eq!((slot.at_exit(), client.left()), (7, Some(7)));
        let mut data = [0; 100];
        let read = client.read(&mut data).unwrap();
        assert_eq!((&data[..read], client.left()), (&b"before "[..], Some(0)));
        assert!(!client.has_rest());
    }
}
