//! The control side: QEMU's vhost-user requests, which describe the guest's memory and the rings. The device's thread
//! handles them between two passes over the rings, so a stopped ring is idle before QEMU gets its reply.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::ring::{RING_MAX, Ring};

/// Number of queues that QEMU leaves to the backend. QEMU handles the event queue (index 2) itself.
pub(crate) const RINGS: usize = 2;
/// Index of the queue for packets to the guest (virtio 1.2, 5.10.2).
pub(crate) const RX: usize = 0;
/// Index of the queue for packets from the guest.
pub(crate) const TX: usize = 1;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The guest's memory and rings, as QEMU has set them up.
pub(crate) struct Backend {
    epoll: Arc<Epoll>,
    /// Epoll tokens of the kicks, by ring index.
    tokens: [u64; RINGS],
    guest_cid: u64,
    /// The guest's memory.
    pub(crate) memory: GuestMemoryMmap,
    /// Indexed by [`RX`] and [`TX`].
    pub(crate) rings: [Ring; RINGS],
    /// Set when the guest's driver restarts, which ends all its connections.
    pub(crate) driver_restarted: bool,
    /// Maps QEMU's addresses to the guest's.
    regions: Vec<Region>,
}

/// A region of the guest's memory.
struct Region {
    qemu_address: u64,
    size: u64,
    guest_address: u64,
}

impl Backend {
    /// Starts without memory and rings. Adds the kicks of the rings to `epoll` with `tokens`.
    pub(crate) fn new(
        epoll: Arc<Epoll>,
        tokens: [u64; RINGS],
        guest_cid: u64,
    ) -> std::result::Result<Self, virtio_queue::Error> {
        Ok(Backend {
            epoll,
            tokens,
            guest_cid,
            memory: GuestMemoryMmap::default(),
            rings: [Ring::new()?, Ring::new()?],
            driver_restarted: false,
            regions: Vec::new(),
        })
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, address: u64) -> Result<u64> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = address.checked_sub(region.qemu_address)?;
                (offset < region.size).then(|| region.guest_address.checked_add(offset))?
            })
            .ok_or(Error::InvalidParam)
    }

    fn set_kick(&mut self, index: usize, file: Option<File>) -> Result<()> {
        let token = self.tokens.get(index).copied().ok_or(Error::InvalidParam)?;
        let ring = &mut self.rings[index];
        if let Some(old) = ring.kick.take() {
            // QEMU has the same eventfd open, so closing this descriptor would not remove it from the epoll set.
            self.epoll
                .ctl(ControlOperation::Delete, old.as_raw_fd(), EpollEvent::default())
                .map_err(Error::ReqHandlerError)?;
        }
        let Some(file) = file else { return Ok(()) };
        // QEMU sometimes clears the eventfd itself. A read that loses that race must not block the device.
        nonblocking(&file)?;
        self.epoll
            .ctl(ControlOperation::Add, file.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
            .map_err(Error::ReqHandlerError)?;
        ring.kick = Some(file);
        Ok(())
    }
}

fn nonblocking(file: &File) -> Result<()> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|errno| Error::ReqHandlerError(errno.into()))?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(file, FcntlArg::F_SETFL(flags)).map_err(|errno| Error::ReqHandlerError(errno.into()))?;
    Ok(())
}

/// Rejects memory that can shrink while it is mapped: an access beyond its end would kill the shim with SIGBUS.
fn check_sealed(file: &File) -> Result<()> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).unwrap_or(0);
    if SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        Ok(())
    } else {
        tracing::error!("the guest's memory is not a memfd with F_SEAL_SHRINK; rejecting QEMU's vsock memory table");
        Err(Error::InvalidParam)
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        for ring in &mut self.rings {
            ring.stop();
            ring.enabled = false;
        }
        self.driver_restarted = true;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::InvalidParam);
        }
        for ring in &mut self.rings {
            ring.queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            // Without protocol features the front end cannot enable rings: they start enabled (vhost-user, "Ring
            // states").
            ring.enabled |= features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            check_sealed(&file)?;
            let mapping = region.mmap_region(file)?;
            mapped
                .push(GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr)).ok_or(Error::InvalidParam)?);
        }
        self.memory = GuestMemoryMmap::from_regions(mapped)
            .map_err(|error| Error::ReqHandlerError(std::io::Error::other(error)))?;
        self.regions = regions
            .iter()
            .map(|region| Region {
                qemu_address: region.user_addr,
                size: region.memory_size,
                guest_address: region.guest_phys_addr,
            })
            .collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if size > RING_MAX {
            return Err(Error::InvalidParam);
        }
        self.ring(index)?.queue.try_set_size(size).map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let descriptor = GuestAddress(self.guest_address(descriptor)?);
        let available = GuestAddress(self.guest_address(available)?);
        let used = GuestAddress(self.guest_address(used)?);
        let ring = self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)?;
        let queue = &mut ring.queue;
        queue.try_set_desc_table_address(descriptor).map_err(|_| Error::InvalidParam)?;
        queue.try_set_avail_ring_address(available).map_err(|_| Error::InvalidParam)?;
        queue.try_set_used_ring_address(used).map_err(|_| Error::InvalidParam)?;
        // SET_VRING_BASE sets only the available index. The used index is in the ring itself.
        let next_used =
            queue.used_idx(&self.memory, std::sync::atomic::Ordering::Relaxed).map_err(|_| Error::InvalidParam)?;
        queue.set_next_used(next_used.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let ring = self.ring(index)?;
        // A paused VM resumes where its rings stopped. Any other position means that the driver has restarted.
        let restarted = ring.queue.next_avail() != base;
        ring.queue.set_next_avail(base);
        self.driver_restarted |= restarted;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let next = self.ring(index)?.stop();
        self.set_kick(index as usize, None)?;
        self.rings[index as usize].call = None;
        Ok(VhostUserVringState::new(index, u32::from(next)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let started = file.is_some();
        self.set_kick(usize::from(index), file)?;
        if started {
            self.rings[usize::from(index)].start();
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        if let Some(file) = &file {
            nonblocking(file)?;
        }
        self.ring(u32::from(index))?.call = file;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        self.ring(u32::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(RINGS as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // struct virtio_vsock_config (virtio 1.2, 5.10.4) contains only the guest's CID.
        let config = self.guest_cid.to_le_bytes();
        let end = offset.checked_add(size).ok_or(Error::InvalidParam)?;
        config.get(offset as usize..end as usize).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("the device's configuration is read-only"))
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        Err(unsupported())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(unsupported())
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(unsupported())
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(unsupported())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(unsupported())
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        Err(unsupported())
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(unsupported())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(unsupported())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(unsupported())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(unsupported())
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(unsupported())
    }
}

/// The error for a request of a protocol feature that `get_protocol_features` does not offer.
fn unsupported() -> Error {
    Error::InvalidOperation("the request needs a protocol feature that was not offered")
}
