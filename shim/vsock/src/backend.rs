//! The control side: what QEMU tells a vhost-user backend about memory and rings. The device thread handles these requests itself, between
//! two looks at the rings, so a ring that is stopped is at rest by the time that QEMU has its answer.

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

use super::ring::{RING_MAX, Ring};

/// Queues that QEMU leaves to the backend; it keeps the event queue (index 2) to itself.
pub const RINGS: usize = 2;
/// Index of the queue with packets to the guest (virtio 1.2, 5.10.2).
pub const RX: usize = 0;
/// Index of the queue with packets from the guest.
pub const TX: usize = 1;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What QEMU has set up.
pub struct Backend {
    epoll: Arc<Epoll>,
    /// Epoll token of a ring's kick, by index.
    tokens: [u64; RINGS],
    guest_cid: u64,
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// The receive and the transmit queue.
    pub rings: [Ring; RINGS],
    /// Set when the guest's driver starts over: its connections are gone.
    pub driver_is_new: bool,
    /// QEMU's addresses of the memory regions: (its address, length, the guest's address).
    regions: Vec<(u64, u64, u64)>,
}

impl Backend {
    /// Nothing set up yet. The rings' kicks are added to `epoll` under `tokens`.
    pub fn new(
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
            driver_is_new: false,
            regions: Vec::new(),
        })
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, address: u64) -> Result<u64> {
        self.regions
            .iter()
            .find_map(|&(base, len, guest)| {
                let offset = address.checked_sub(base)?;
                (offset < len).then(|| guest.checked_add(offset))?
            })
            .ok_or(Error::InvalidParam)
    }

    fn set_kick(&mut self, index: usize, file: Option<File>) -> Result<()> {
        let token = self.tokens.get(index).copied().ok_or(Error::InvalidParam)?;
        let ring = &mut self.rings[index];
        if let Some(old) = ring.kick.take() {
            // QEMU has the same eventfd open: closing ours would not take it off the epoll set.
            self.epoll
                .ctl(ControlOperation::Delete, old.as_raw_fd(), EpollEvent::default())
                .map_err(Error::ReqHandlerError)?;
        }
        let Some(file) = file else { return Ok(()) };
        // QEMU clears the eventfd itself at times; a read that lost that race must not block the device.
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

/// Refuses memory that could become shorter under our mapping: touching it then would be a SIGBUS for the whole shim.
fn check_sealed(file: &File) -> Result<()> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).unwrap_or(0);
    if SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        Ok(())
    } else {
        log::error!("vsock: the guest's memory is not a memfd that is sealed against shrinking");
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
        self.driver_is_new = true;
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
            // A front end that can't enable rings wants them enabled from the start (vhost-user, "ring states").
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
        self.regions =
            regions.iter().map(|region| (region.user_addr, region.memory_size, region.guest_phys_addr)).collect();
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
        // SET_VRING_BASE only brings the available index; where the used ring stands is in the ring itself.
        let next_used =
            queue.used_idx(&self.memory, std::sync::atomic::Ordering::Relaxed).map_err(|_| Error::InvalidParam)?;
        queue.set_next_used(next_used.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let ring = self.ring(index)?;
        // A VM that was paused goes on where its rings stopped. Any other position is that of a driver that started over.
        let starts_over = ring.queue.next_avail() != base;
        ring.queue.set_next_avail(base);
        self.driver_is_new |= starts_over;
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
        // struct virtio_vsock_config (virtio 1.2, 5.10.4): the guest's CID, and nothing else.
        let config = self.guest_cid.to_le_bytes();
        let end = offset.checked_add(size).ok_or(Error::InvalidParam)?;
        config.get(offset as usize..end as usize).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("the device's configuration is read-only"))
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        Err(not_offered())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(not_offered())
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(not_offered())
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(not_offered())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(not_offered())
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        Err(not_offered())
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(not_offered())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(not_offered())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(not_offered())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(not_offered())
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(not_offered())
    }
}

/// A request of a protocol feature that `get_protocol_features` does not offer.
fn not_offered() -> Error {
    Error::InvalidOperation("not among the features that were offered")
}
