//! The pieces of guest memory that a descriptor chain lists, and system calls that move bytes between them and a socket
//! without a copy. A chain may have any number of pieces of any size: a header or a payload may span several.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Most pieces in one system call (Linux: `UIO_MAXIOV`). More pieces take more calls.
const PIECES_PER_CALL: usize = 1024;

/// The half of a chain that the device reads or the half that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Device-readable descriptors: packets from the guest.
    Readable,
    /// Device-writable descriptors: room for packets to the guest.
    Writable,
}

/// Pieces of guest memory, in the order of the chain.
#[derive(Debug)]
pub(crate) struct Scatter<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Scatter<'m> {
    /// Collects one side of `chain`, up to `limit` bytes. Returns `None` if a descriptor points outside the guest's
    /// memory.
    pub(crate) fn collect(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        side: Side,
        limit: usize,
    ) -> Option<Self> {
        let permissions = if side == Side::Writable { Permissions::Write } else { Permissions::Read };
        let mut scatter = Scatter { pieces: Vec::with_capacity(4), len: 0 };
        for descriptor in chain {
            let len = (descriptor.len() as usize).min(limit - scatter.len);
            if len == 0 || descriptor.is_write_only() != (side == Side::Writable) {
                continue;
            }
            for piece in GuestMemory::get_slices(memory, descriptor.addr(), len, permissions).ok()? {
                let piece = piece.ok()?;
                scatter.len += piece.len();
                scatter.pieces.push(piece);
            }
        }
        Some(scatter)
    }

    /// Total size of the pieces, bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Copies bytes from the front into `to` and removes them. Returns their number, which is smaller than `to` only if
    /// there are no more.
    pub(crate) fn read(&mut self, to: &mut [u8]) -> usize {
        self.walk(to.len(), |piece, at| {
            piece.copy_to(&mut to[at..at + piece.len()]);
        })
    }

    /// Copies `from` to the front and removes the room that it took. Returns the number of bytes, which is smaller than
    /// `from` only if there is no more room.
    pub(crate) fn write(&mut self, from: &[u8]) -> usize {
        self.walk(from.len(), |piece, at| piece.copy_from(&from[at..at + piece.len()]))
    }

    /// Removes `n` bytes from the front.
    pub(crate) fn skip(&mut self, n: usize) -> usize {
        self.walk(n, |_, _| {})
    }

    /// Removes the first `n` bytes and returns them.
    pub(crate) fn split_front(&mut self, n: usize) -> Self {
        let mut front = Scatter { pieces: Vec::with_capacity(1), len: 0 };
        front.len = self.walk(n, |piece, _| front.pieces.push(*piece));
        front
    }

    /// Keeps at most the first `n` bytes.
    pub(crate) fn truncate(&mut self, n: usize) {
        let mut left = n;
        self.pieces.retain_mut(|piece| {
            if let Ok(kept) = piece.subslice(0, piece.len().min(left)) {
                *piece = kept;
            }
            left -= piece.len().min(left);
            !piece.is_empty()
        });
        self.len = self.len.min(n);
    }

    fn walk(&mut self, n: usize, mut each: impl FnMut(&VolatileSlice<'m>, usize)) -> usize {
        let (mut done, mut whole) = (0, 0);
        for piece in &mut self.pieces {
            let take = piece.len().min(n - done);
            // Neither call fails: both offsets lie within the piece.
            let (Ok(head), Ok(rest)) = (piece.subslice(0, take), piece.offset(take)) else { break };
            each(&head, done);
            done += take;
            if !rest.is_empty() {
                *piece = rest;
                break;
            }
            whole += 1;
        }
        self.pieces.drain(..whole);
        self.len -= done;
        done
    }

    /// Sends from guest memory to a socket without blocking. Removes the bytes that the socket accepted and returns
    /// their number.
    pub(crate) fn send_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let guards: Vec<_> =
            self.pieces.iter().take(PIECES_PER_CALL).map(|piece| (piece.ptr_guard(), piece.len())).collect();
        let mut pieces: Vec<libc::iovec> = guards
            .iter()
            .map(|(guard, len)| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: *len })
            .collect();
        let message = message(&mut pieces);
        // SAFETY: every iovec lies inside the guest's memory, which stays mapped for at least 'm, and the kernel only
        // reads it. The guest may change the bytes meanwhile, which is harmless: no Rust reference points to them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        drop(guards);
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        Ok(self.skip(sent))
    }

    /// Receives from a socket into guest memory without blocking. Removes the room that was filled and returns its size
    /// in bytes, 0 at the end of file.
    pub(crate) fn receive_from(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let guards: Vec<_> =
            self.pieces.iter().take(PIECES_PER_CALL).map(|piece| (piece.ptr_guard_mut(), piece.len())).collect();
        let mut pieces: Vec<libc::iovec> =
            guards.iter().map(|(guard, len)| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: *len }).collect();
        let mut message = message(&mut pieces);
        // SAFETY: every iovec lies inside the guest's memory, which stays mapped writable for at least 'm, and no Rust
        // reference points to it.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        drop(guards);
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        Ok(self.skip(received))
    }
}

fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    message
}
