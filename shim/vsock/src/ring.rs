//! One virtqueue as this device uses it: taking chains, giving them back, and telling the other side no more often than it wants to be told.
//! What is in the chains is `worker.rs`'s business.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Largest ring that is accepted, entries. QEMU's vsock device has 128.
pub const RING_MAX: u16 = 1024;

/// A virtqueue and its two eventfds.
#[derive(Debug)]
pub struct Ring {
    /// Addresses and positions, set by the front end.
    pub queue: Queue,
    /// Readable when the guest has added buffers.
    pub kick: Option<File>,
    /// Written when the guest should look at the used ring.
    pub call: Option<File>,
    /// Whether the front end lets us work on the ring.
    pub enabled: bool,
    /// The guest has put nonsense in the ring itself. Nothing is taken from it until the front end sets it up anew.
    broken: bool,
    /// Entries were used since the last call.
    used: bool,
    /// What the driver knew before the ring was (re)started is unknown: the first call is made in any case.
    call_anyway: bool,
}

impl Ring {
    /// A ring that is not set up.
    pub fn new() -> Result<Self, virtio_queue::Error> {
        Ok(Ring {
            queue: Queue::new(RING_MAX)?,
            kick: None,
            call: None,
            enabled: false,
            broken: false,
            used: false,
            call_anyway: true,
        })
    }

    /// Lets chains be taken from now on; called when the front end has set the ring up.
    pub fn start(&mut self) {
        self.queue.set_ready(true);
        self.broken = false;
        self.call_anyway = true;
    }

    /// No chain is taken or given back from now on; every one that was taken has been given back. Answers where to go on.
    pub fn stop(&mut self) -> u16 {
        self.queue.set_ready(false);
        self.queue.next_avail()
    }

    /// Whether chains may be taken.
    pub fn is_running(&self) -> bool {
        self.enabled && self.queue.ready() && !self.broken
    }

    /// Clears the kick's eventfd.
    pub fn clear_kick(&mut self) -> io::Result<()> {
        let Some(kick) = &mut self.kick else { return Ok(()) };
        match kick.read(&mut [0; 8]) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The next chain that the guest has made available.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Option<DescriptorChain<&'m GuestMemoryMmap>> {
        if !self.is_running() {
            return None;
        }
        match self.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(error) => {
                self.give_up("take a chain from", &error);
                None
            }
        }
    }

    /// Puts the chain that was just taken back, as if it had not been.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the guest, with `len` bytes written to it.
    pub fn push(&mut self, memory: &GuestMemoryMmap, head: u16, len: usize) {
        self.used = true;
        // A chain holds less than 4 GiB (virtio-queue ends longer ones).
        if let Err(error) = self.queue.add_used(memory, head, u32::try_from(len).unwrap_or(u32::MAX)) {
            self.give_up("give a chain back to", &error);
        }
    }

    /// Asks to be kicked for the next chain. True when there is one already: then take it instead of waiting.
    pub fn wait_for_kick(&mut self, memory: &GuestMemoryMmap) -> bool {
        if !self.is_running() {
            return false;
        }
        match self.queue.enable_notification(memory) {
            Ok(more) => more,
            Err(error) => {
                self.give_up("ask for a kick of", &error);
                false
            }
        }
    }

    /// Spares the guest kicks while we are at the ring anyway.
    pub fn mute_kicks(&mut self, memory: &GuestMemoryMmap) {
        if self.is_running()
            && let Err(error) = self.queue.disable_notification(memory)
        {
            self.give_up("mute the kicks of", &error);
        }
    }

    /// Tells the guest about what was given back since the last call, if it wants to know.
    pub fn call(&mut self, memory: &GuestMemoryMmap) -> io::Result<()> {
        if !std::mem::take(&mut self.used) || !self.is_running() {
            return Ok(());
        }
        let wanted = match self.queue.needs_notification(memory) {
            Ok(wanted) => wanted && !self.is_call_unwanted(memory),
            Err(error) => {
                self.give_up("see whether to call for", &error);
                return Ok(());
            }
        };
        if !wanted && !std::mem::take(&mut self.call_anyway) {
            return Ok(());
        }
        match self.call.as_mut().map(|call| call.write(&1u64.to_ne_bytes())) {
            // A full counter is a call that the other side has not seen yet.
            Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Without EVENT_IDX the driver says with a flag that it needs no calls (virtio 1.2, 2.7.7.2). virtio-queue leaves that to us.
    fn is_call_unwanted(&self, memory: &GuestMemoryMmap) -> bool {
        !self.queue.event_idx_enabled()
            && memory
                .load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }

    fn give_up(&mut self, what: &str, error: &virtio_queue::Error) {
        log::warn!("vsock: cannot {what} a queue, its driver is at fault; it rests until it is set up anew: {error}");
        self.broken = true;
    }
}
