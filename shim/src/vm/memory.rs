//! The memory of a running VM: the machine offers more, and a driver of the guest takes it, block by block; another driver
//! gives back what the guest does not need.

use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::system::InfoRequest;

use super::running::Vm;
use crate::guest::client::GuestError;
use crate::host::usage;
use crate::state::status::MemoryStatus;
use crate::vmm::VmmError;

/// How long a status waits for the VMM: it is also that of a VM that hangs.
const QUERY: Duration = Duration::from_secs(2);

/// Why a VM has not got more memory.
#[derive(Debug, thiserror::Error)]
pub enum GrowthError {
    /// The VMM does not change the size, or does not report it.
    #[error("offer the VM {mib} MiB of memory")]
    Offer {
        /// The VM's memory with the offer.
        mib: u64,
        /// The cause.
        source: VmmError,
    },
    /// The guest's kernel does not use the memory in time.
    #[error("wait until the VM's guest uses {mib} MiB of memory")]
    Unused {
        /// The VM's memory with the offer.
        mib: u64,
        /// The guest's reply.
        source: GuestError,
    },
    /// The guest reports more memory than it has taken.
    #[error("the VM's guest has taken {taken} MiB of the {mib} MiB of memory that it may have")]
    NotTaken {
        /// What it has taken, as the VMM counts it.
        taken: u64,
        /// The VM's memory with the offer.
        mib: u64,
    },
}

impl Vm {
    /// Has the guest get by with its target, if it has one. For the start of a container: all but the first do nothing.
    pub(crate) async fn set_memory_target(&self) {
        let Some(mib) = self.memory_target.claim() else { return };
        if let Err(error) = self.machine.set_memory_target(mib).await {
            tracing::warn!(mib, error = %Chain(&error), "failed to set the target of the VM's memory");
        }
    }

    /// The guest's memory on the host, as far as it is known.
    pub(crate) async fn memory_status(&self) -> MemoryStatus {
        let balloon_mib = match tokio::time::timeout(QUERY, self.machine.balloon_mib()).await {
            Ok(Ok(mib)) => mib,
            Ok(Err(error)) => {
                tracing::debug!(error = %Chain(&error), "failed to query the balloon");
                None
            }
            Err(_) => None,
        };
        MemoryStatus {
            on_host_mib: usage::shared_memory(self.machine.process()).ok().map(|bytes| bytes >> 20),
            balloon_target_mib: self.memory_target.mib(),
            balloon_mib,
        }
    }

    /// Offers the guest `mib` MiB of memory in all, and waits until its kernel uses them. If it fails, the guest may have
    /// taken a part: see [`Vm::keep_memory`].
    ///
    /// # Errors
    ///
    /// The VMM rejects the size, or the guest does not use the memory within the deadline of a call.
    pub(crate) async fn grow_memory(&self, mib: u64) -> Result<(), GrowthError> {
        let failed = |source| GrowthError::Offer { mib, source };
        let unused = |source: GuestError| GrowthError::Unused { mib, source };
        let taken = self.machine.memory_mib().await.map_err(failed)?;
        let used = self.await_memory(0).await.map_err(unused)?;
        self.machine.offer_memory(mib).await.map_err(failed)?;
        // The guest's kernel counts less than the VM has, but all of what is added.
        let added = mib.saturating_sub(taken).saturating_mul(1 << 20);
        self.await_memory(used.saturating_add(added)).await.map_err(unused)?;
        // The guest is not trusted with the answer.
        let taken = self.machine.memory_mib().await.map_err(failed)?;
        if taken < mib { Err(GrowthError::NotTaken { taken, mib }) } else { Ok(()) }
    }

    /// After a failed growth: lets the guest keep what it has taken, rounded up by `round`, and takes the rest of the offer
    /// back. Returns the VM's memory, MiB.
    ///
    /// # Errors
    ///
    /// The VMM does not answer.
    pub(crate) async fn keep_memory(&self, round: impl Fn(u64) -> u64 + Send) -> Result<u64, VmmError> {
        let mib = round(self.machine.memory_mib().await?);
        self.machine.offer_memory(mib).await?;
        Ok(mib)
    }

    /// Waits until the guest's kernel uses so many bytes, and returns how many it uses.
    async fn await_memory(&self, bytes: u64) -> Result<u64, GuestError> {
        let request = InfoRequest { await_memory_bytes: bytes, ..Default::default() };
        Ok(self.guest.system.info(self.guest.context(), &request).await?.memory_total_bytes)
    }
}
