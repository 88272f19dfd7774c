//! What the connections of one guest may occupy on the host.

/// Receive window of a connection, bytes: the most that the guest may have sent and the host not yet read. Four times
/// the default of Linux's own vsock sockets (`VIRTIO_VSOCK_DEFAULT_BUF_SIZE`): each announcement of room wakes the
/// guest, and without KVM, switching to the waiting process takes QEMU as long as moving 30 KiB.
pub const WINDOW: u32 = 1024 * 1024;

/// The limits of every guest. With stalled readers, the device holds at most 192 MiB: 64 MiB for the first 64
/// connections and 32 KiB for each further one. That window is slower, but it has room for the largest message of a
/// stream.
///
/// Each connection takes two of the process's descriptors, of which there are about a thousand, and a relayed one takes
/// three. With as many as the guest may open, 128 of them relayed, there are enough left for everything else.
pub(crate) const LIMITS: Limits =
    Limits { connections: 4096, by_guest: 256, window: WINDOW, windows: 64 * WINDOW as u64, small_window: 32 * 1024 };

/// What the connections of one guest may take of the host.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most connections at a time, both directions together.
    pub connections: usize,
    /// Most connections at a time that the guest has opened. The others are left to the host.
    pub by_guest: usize,
    /// Receive window of a connection, bytes.
    pub window: u32,
    /// Windows of this size take at most this many bytes together; later connections get the small window.
    pub windows: u64,
    /// Receive window of a connection beyond that, bytes.
    pub small_window: u32,
}
