//! The host's end of a connection: the device's end of a socket pair, and the bytes from the guest that the socket has
//! not accepted yet.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use tokio::sync::oneshot;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::header::Shut;
use crate::scatter::Scatter;
use crate::table::ConnectionId;

/// An empty buffer with a larger capacity releases its memory, bytes.
const KEEP_CAPACITY: usize = 64 * 1024;

/// The device's end of a socket pair.
#[derive(Debug)]
pub(crate) struct HostEnd {
    socket: UnixStream,
    /// Bytes from the guest that the socket has not accepted.
    held: VecDeque<u8>,
    /// Whether epoll watches for room in the socket.
    awaits_room: bool,
    /// The other end has closed or shut down writing: after a short read, more or an end of file still follows.
    pub(crate) saw_hangup: bool,
    /// Notifies the caller of a host-initiated connection that the guest has accepted it.
    pub(crate) connected: Option<oneshot::Sender<()>>,
    /// When a connection whose stream was dropped is checked again.
    pub(crate) deadline: Option<Instant>,
    /// Bytes moved in either direction, to detect progress.
    pub(crate) transferred: u64,
}

/// The result of delivering bytes to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivered {
    /// The socket accepted this many bytes. The rest is held.
    Written(u32),
    /// The socket accepted this many bytes and will accept no more. None are held.
    Broken(u32),
}

impl HostEnd {
    /// `socket` must be nonblocking.
    pub(crate) fn new(socket: UnixStream, connected: Option<oneshot::Sender<()>>) -> Self {
        HostEnd {
            socket,
            held: VecDeque::new(),
            awaits_room: false,
            saw_hangup: false,
            connected,
            deadline: None,
            transferred: 0,
        }
    }

    /// Watches the socket with `id` as the token. Edge-triggered: a socket that has bytes or is closed must not keep
    /// the thread awake while the guest gives no credit.
    pub(crate) fn watch(&self, epoll: &Epoll, id: ConnectionId) -> io::Result<()> {
        epoll.ctl(ControlOperation::Add, self.socket.as_raw_fd(), EpollEvent::new(interest(self.awaits_room), id))
    }

    /// Starts or stops watching for room. Watching all the time would wake the device on each read at the other end.
    fn watch_room(&mut self, epoll: &Epoll, id: ConnectionId, room: bool) -> io::Result<()> {
        if self.awaits_room != room {
            epoll.ctl(ControlOperation::Modify, self.socket.as_raw_fd(), EpollEvent::new(interest(room), id))?;
            self.awaits_room = room;
        }
        Ok(())
    }

    /// Delivers a packet's payload directly from guest memory. Holds what the socket does not accept at once.
    pub(crate) fn deliver(&mut self, payload: &mut Scatter<'_>, epoll: &Epoll, id: ConnectionId) -> Delivered {
        let mut written = 0;
        if self.held.is_empty() {
            match payload.send_to(self.socket.as_fd()) {
                Ok(n) => written = n,
                Err(error) if is_retry(&error) => {}
                Err(_) => return Delivered::Broken(0),
            }
        }
        self.transferred += written as u64;
        if payload.len() > 0 {
            let start = self.held.len();
            self.held.resize(start + payload.len(), 0);
            let (front, back) = self.held.as_mut_slices();
            let in_front = front.len().saturating_sub(start);
            if in_front > 0 {
                payload.read(&mut front[start..]);
            }
            payload.read(&mut back[start.saturating_sub(front.len())..]);
            if self.watch_room(epoll, id, true).is_err() {
                return self.broken(written as u32);
            }
        }
        Delivered::Written(written as u32)
    }

    /// Delivers held bytes as far as the socket accepts them.
    pub(crate) fn deliver_held(&mut self, epoll: &Epoll, id: ConnectionId) -> Delivered {
        let mut written = 0;
        while !self.held.is_empty() {
            match self.socket.write(self.held.as_slices().0) {
                Ok(n) => {
                    self.held.drain(..n);
                    written += n;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return self.broken(written as u32),
            }
        }
        self.transferred += written as u64;
        if self.held.is_empty() && self.held.capacity() > KEEP_CAPACITY {
            self.held = VecDeque::new();
        }
        if self.watch_room(epoll, id, !self.held.is_empty()).is_err() {
            return self.broken(written as u32);
        }
        Delivered::Written(written as u32)
    }

    fn broken(&mut self, written: u32) -> Delivered {
        self.discard_held();
        Delivered::Broken(written)
    }

    /// Discards held bytes, which have no reader any more.
    pub(crate) fn discard_held(&mut self) {
        self.held = VecDeque::new();
    }

    /// Whether bytes are held that the socket has not accepted.
    pub(crate) fn has_held_bytes(&self) -> bool {
        !self.held.is_empty()
    }

    /// Reads from the socket directly into guest memory. Returns 0 at the end of file.
    pub(crate) fn read_into(&mut self, room: &mut Scatter<'_>) -> io::Result<usize> {
        let n = room.receive_from(self.socket.as_fd())?;
        self.transferred += n as u64;
        Ok(n)
    }

    /// Shuts down directions of the socket: SEND gives the stream's reader an end of file, RECEIVE makes its writer
    /// fail.
    pub(crate) fn half_close(&self, shut: Shut) {
        for (flag, how) in [(Shut::SEND, Shutdown::Write), (Shut::RECEIVE, Shutdown::Read)] {
            if shut.has(flag)
                && let Err(error) = self.socket.shutdown(how)
            {
                tracing::debug!(direction = ?how, %error, "failed to shut down the socket of a vsock connection");
            }
        }
    }
}

/// Whether a call on a nonblocking socket should be retried later.
pub(crate) fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn interest(room: bool) -> EventSet {
    let interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room { interest | EventSet::OUT } else { interest }
}
