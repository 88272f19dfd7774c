//! A virtqueue: takes chains, returns them, and notifies the guest only as often as it asks for. `forwarder.rs` handles
//! the content of the chains.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Most entries of a ring. QEMU's vsock device has 128.
pub(crate) const RING_MAX: u16 = 1024;

/// A virtqueue with its two eventfds.
#[derive(Debug)]
pub struct Ring {
    /// Addresses and positions, as QEMU sets them.
    pub queue: Queue,
    /// Readable when the guest has added buffers.
    pub(crate) kick: Option<File>,
    /// Written to notify the guest of used buffers.
    pub(crate) call: Option<File>,
    /// Whether QEMU has enabled the ring.
    pub enabled: bool,
    /// The guest's driver has corrupted the ring. It stays idle until QEMU sets it up again.
    broken: bool,
    /// Chains were returned since the last notification.
    used: bool,
    /// The ring was (re)started, and what the driver saw before is unknown: the first notification is unconditional.
    notify_always: bool,
}

impl Ring {
    /// Creates a ring without addresses.
    ///
    /// # Errors
    ///
    /// None in practice: the maximum size is a constant.
    pub fn new() -> Result<Self, virtio_queue::Error> {
        Ok(Ring {
            queue: Queue::new(RING_MAX)?,
            kick: None,
            call: None,
            enabled: false,
            broken: false,
            used: false,
            notify_always: true,
        })
    }

    /// Starts the ring, which QEMU has set up.
    pub fn start(&mut self) {
        self.queue.set_ready(true);
        self.broken = false;
        self.notify_always = true;
    }

    /// Stops the ring. Every chain taken from it has been returned. Returns the position at which it continues.
    pub(crate) fn stop(&mut self) -> u16 {
        self.queue.set_ready(false);
        self.queue.next_avail()
    }

    /// Whether chains may be taken.
    pub fn is_running(&self) -> bool {
        self.enabled && self.queue.ready() && !self.broken
    }

    /// Clears the eventfd of the kick.
    pub(crate) fn clear_kick(&mut self) -> io::Result<()> {
        let Some(kick) = &mut self.kick else { return Ok(()) };
        match kick.read(&mut [0; 8]) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes the next chain that the guest has made available.
    pub(crate) fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Option<DescriptorChain<&'m GuestMemoryMmap>> {
        if !self.is_running() {
            return None;
        }
        match self.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(error) => {
                self.disable("take a chain", &error);
                None
            }
        }
    }

    /// Makes the chain that was just taken available again.
    pub(crate) fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the guest, with `len` bytes written to it.
    pub(crate) fn push(&mut self, memory: &GuestMemoryMmap, head: u16, len: usize) {
        self.used = true;
        // A chain has less than 4 GiB: virtio-queue cuts off longer ones.
        if let Err(error) = self.queue.add_used(memory, head, u32::try_from(len).unwrap_or(u32::MAX)) {
            self.disable("return a chain", &error);
        }
    }

    /// Enables kicks for the next chain. Returns true if a chain is already available: take it instead of waiting.
    pub(crate) fn wait_for_kick(&mut self, memory: &GuestMemoryMmap) -> bool {
        if !self.is_running() {
            return false;
        }
        match self.queue.enable_notification(memory) {
            Ok(more) => more,
            Err(error) => {
                self.disable("enable kicks", &error);
                false
            }
        }
    }

    /// Disables kicks, which the guest can save while the device works on the ring anyway.
    pub(crate) fn mute_kicks(&mut self, memory: &GuestMemoryMmap) {
        if self.is_running()
            && let Err(error) = self.queue.disable_notification(memory)
        {
            self.disable("disable kicks", &error);
        }
    }

    /// Notifies the guest of the chains returned since the last notification, if it asks for that.
    pub(crate) fn notify(&mut self, memory: &GuestMemoryMmap) -> io::Result<()> {
        if !std::mem::take(&mut self.used) || !self.is_running() {
            return Ok(());
        }
        let requested = match self.queue.needs_notification(memory) {
            Ok(requested) => requested && !self.is_notification_suppressed(memory),
            Err(error) => {
                self.disable("read the notification settings", &error);
                return Ok(());
            }
        };
        if !requested && !std::mem::take(&mut self.notify_always) {
            return Ok(());
        }
        match self.call.as_mut().map(|call| call.write(&1u64.to_ne_bytes())) {
            // A full counter is a notification that the guest has not seen yet.
            Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Without EVENT_IDX the driver suppresses notifications with a flag (virtio 1.2, 2.7.7.2), which virtio-queue
    /// ignores.
    fn is_notification_suppressed(&self, memory: &GuestMemoryMmap) -> bool {
        !self.queue.event_idx_enabled()
            && memory
                .load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }

    fn disable(&mut self, action: &str, error: &virtio_queue::Error) {
        tracing::warn!(action, %error, "disabled a vsock ring that the guest's driver has corrupted");
        self.broken = true;
    }
}
