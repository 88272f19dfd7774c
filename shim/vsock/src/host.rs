//! The host's part of a connection: the device's end of a socketpair, and what the guest sent that this end has not taken yet.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use tokio::sync::oneshot;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::header::Shut;
use super::scatter::Scatter;
use super::table::Id;

/// An empty buffer that has grown past this gives its memory back, bytes.
const KEEP_CAPACITY: usize = 64 * 1024;

/// The device's end of one stream.
#[derive(Debug)]
pub struct HostSide {
    socket: UnixStream,
    held: VecDeque<u8>,
    /// Waiting for the socket to take more.
    waits_for_room: bool,
    /// The other end was seen to close, or to send no more: a short read does not mean that nothing follows.
    pub saw_hangup: bool,
    /// Tells the caller of a host-initiated connection that the guest has accepted.
    pub connected: Option<oneshot::Sender<()>>,
    /// When a connection whose stream was dropped is looked at again.
    pub deadline: Option<Instant>,
    /// Bytes that went either way so far, to tell progress by.
    pub moved: u64,
}

/// What became of bytes for the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// So many bytes were taken; what was not is held.
    Took(u32),
    /// Nobody takes bytes any more; none is held.
    Refused(u32),
}

impl HostSide {
    /// `socket` is nonblocking.
    pub fn new(socket: UnixStream, connected: Option<oneshot::Sender<()>>) -> Self {
        HostSide {
            socket,
            held: VecDeque::new(),
            waits_for_room: false,
            saw_hangup: false,
            connected,
            deadline: None,
            moved: 0,
        }
    }

    /// Watches the socket under `id`, edge-triggered: a stream that has bytes, or is closed, while the guest gives no credit must not
    /// keep the thread awake.
    pub fn watch(&self, epoll: &Epoll, id: Id) -> io::Result<()> {
        epoll.ctl(ControlOperation::Add, self.socket.as_raw_fd(), EpollEvent::new(interest(self.waits_for_room), id))
    }

    /// Watches for room too, or no more. Not at all times: each read at the other end would wake the device.
    fn watch_room(&mut self, epoll: &Epoll, id: Id, room: bool) -> io::Result<()> {
        if self.waits_for_room != room {
            epoll.ctl(ControlOperation::Modify, self.socket.as_raw_fd(), EpollEvent::new(interest(room), id))?;
            self.waits_for_room = room;
        }
        Ok(())
    }

    /// Delivers a packet's payload: straight from guest memory, and what the socket does not take at once is held.
    pub fn deliver(&mut self, payload: &mut Scatter<'_>, epoll: &Epoll, id: Id) -> Delivered {
        let mut took = 0;
        if self.held.is_empty() {
            match payload.send_to(self.socket.as_fd()) {
                Ok(n) => took = n,
                Err(error) if is_retry(&error) => {}
                Err(_) => return Delivered::Refused(0),
            }
        }
        self.moved += took as u64;
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
                return self.refuse(took as u32);
            }
        }
        Delivered::Took(took as u32)
    }

    /// Delivers what is held, as far as the socket takes it.
    pub fn deliver_held(&mut self, epoll: &Epoll, id: Id) -> Delivered {
        let mut took = 0;
        while !self.held.is_empty() {
            match self.socket.write(self.held.as_slices().0) {
                Ok(n) => {
                    self.held.drain(..n);
                    took += n;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return self.refuse(took as u32),
            }
        }
        self.moved += took as u64;
        if self.held.is_empty() && self.held.capacity() > KEEP_CAPACITY {
            self.held = VecDeque::new();
        }
        if self.watch_room(epoll, id, !self.held.is_empty()).is_err() {
            return self.refuse(took as u32);
        }
        Delivered::Took(took as u32)
    }

    fn refuse(&mut self, took: u32) -> Delivered {
        self.held = VecDeque::new();
        Delivered::Refused(took)
    }

    /// Drops what is held: there is nobody to take it.
    pub fn discard(&mut self) {
        self.held = VecDeque::new();
    }

    /// Whether bytes are held that the socket has not taken.
    pub fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Reads from the socket straight into guest memory; 0 is the end of file.
    pub fn read_into(&mut self, room: &mut Scatter<'_>) -> io::Result<usize> {
        let n = room.receive_from(self.socket.as_fd())?;
        self.moved += n as u64;
        Ok(n)
    }

    /// Closes directions of the socket: SEND towards the stream's reader, RECEIVE for its writer.
    pub fn half_close(&self, shut: Shut) {
        for (flag, how) in [(Shut::SEND, std::net::Shutdown::Write), (Shut::RECEIVE, std::net::Shutdown::Read)] {
            if shut.has(flag)
                && let Err(error) = self.socket.shutdown(how)
            {
                log::debug!("vsock: shut down {how:?} of a stream: {error}");
            }
        }
    }
}

impl AsFd for HostSide {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether a call on a nonblocking socket is to be tried again later.
pub fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn interest(room: bool) -> EventSet {
    let interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room { interest | EventSet::OUT } else { interest }
}
