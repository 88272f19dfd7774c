//! A guest's vsock device.
//!
//! The device is a vhost-user backend (virtio 1.2, 5.10; stream sockets) inside the shim's process. It occupies no CID
//! and no port of the host and leaves nothing on disk: each connection is a socket pair with one end in the device.
//! Alternatively the kernel's vhost-vsock device carries the connections.
//!
//! | file            | content                                                               |
//! |-----------------|-----------------------------------------------------------------------|
//! | `device.rs`     | [`Device`] and [`Listener`], the handles that the shim uses           |
//! | `worker.rs`     | the device's thread: an epoll loop that drives the files below        |
//! | `forwarder.rs`  | moves packets between the virtqueues and the host's sockets           |
//! | `table.rs`      | all connections of the guest, RSTs and round-robin scheduling (pure)  |
//! | `connection.rs` | the state machine of one connection (pure)                            |
//! | `credit.rs`     | flow control arithmetic (pure)                                        |
//! | `header.rs`     | the packet header (pure)                                              |
//! | `limits.rs`     | what the connections of one guest may occupy                          |
//! | `backend.rs`    | QEMU's vhost-user requests                                            |
//! | `ring.rs`       | a virtqueue and its notifications                                     |
//! | `scatter.rs`    | pieces of guest memory, and system calls on them                      |
//! | `host_end.rs`   | the device's end of a socket pair                                     |
//! | `shared.rs`     | state shared by the handles and the device's thread                   |
//! | `kernel.rs`     | the kernel's vhost-vsock device                                       |
//! | `stream.rs`     | a connection over either device                                       |
//! | `error.rs`      | [`VsockError`]                                                        |
//! | `lock.rs`       | locking without poison                                                |
//!
//! Imports run in one direction: device → worker → forwarder → host_end → table → connection → credit, header, limits. The pure
//! files make the decisions and are tested as tables; `tests/` runs them in random order and feeds the device hostile
//! virtqueues.

mod backend;
mod connection;
mod credit;
mod device;
mod error;
mod forwarder;
mod header;
mod host_end;
pub mod kernel;
mod limits;
mod lock;
mod ring;
mod scatter;
mod shared;
mod stream;
mod table;
mod worker;

pub use device::{Device, Listener};
pub use error::VsockError;
pub use limits::WINDOW;
pub use stream::Stream;

/// Internals for the integration tests. Not part of the API.
#[doc(hidden)]
pub mod testing {
    pub use crate::connection::{Connection, NextSend};
    pub use crate::forwarder::{Forwarder, LINGER, Progress};
    pub use crate::header::{HEADER_LEN, HOST_CID, Header, Op, Shut, TYPE_STREAM};
    pub use crate::limits::Limits;
    pub use crate::ring::Ring;
    pub use crate::shared::Shared;
    pub use crate::table::{ConnectionId, Entry, NextPacket, Outcome, Table};
    use std::io;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use tokio::sync::mpsc;
    use virtio_queue::QueueT;
    use vm_memory::GuestAddress;
    use vmm_sys_util::epoll::{Epoll, EpollEvent};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use crate::error::VsockError;

    /// The packet path of a guest with this CID, its epoll set, and the connections to a listener on `port`.
    ///
    /// # Errors
    ///
    /// [`VsockError::Setup`].
    pub fn forwarder(cid: u64, port: u32) -> Result<(Forwarder, Arc<Epoll>, mpsc::Receiver<UnixStream>), VsockError> {
        let epoll = Arc::new(Epoll::new().map_err(VsockError::Setup)?);
        let shared = Arc::new(Shared::new(EventFd::new(EFD_NONBLOCK).map_err(VsockError::Setup)?));
        let (queue, incoming) = mpsc::channel(8);
        shared.listen(port, queue)?;
        Ok((Forwarder::new(cid, epoll.clone(), shared), epoll, incoming))
    }

    /// Handles the events of the host's sockets that are due.
    ///
    /// # Errors
    ///
    /// Those of epoll_wait(2).
    pub fn serve_host(forwarder: &mut Forwarder, epoll: &Epoll) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 16];
        let count = epoll.wait(0, &mut events)?;
        for event in &events[..count] {
            forwarder.host_event(event.data(), event.event_set());
        }
        Ok(())
    }

    /// A running ring of `size` descriptors with its parts 16 KiB apart, from `base` on: table, avail and used ring.
    ///
    /// # Errors
    ///
    /// The size or an address is none that a ring can have.
    pub fn ring(base: u64, size: u16) -> Result<Ring, virtio_queue::Error> {
        let mut ring = Ring::new()?;
        ring.queue.set_size(size);
        ring.queue.try_set_desc_table_address(GuestAddress(base))?;
        ring.queue.try_set_avail_ring_address(GuestAddress(base + 0x4000))?;
        ring.queue.try_set_used_ring_address(GuestAddress(base + 0x8000))?;
        ring.enabled = true;
        ring.start();
        Ok(ring)
    }
}
