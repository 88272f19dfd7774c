//! What kind of VM is to wait.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A VM of the pool, as far as it does not follow from the configuration alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolRequest {
    /// The configuration file that the runtime's options name.
    pub config: Option<PathBuf>,
    /// Virtual CPUs.
    pub vcpus: Option<u32>,
    /// Virtual CPUs that it can have.
    pub max_vcpus: Option<u32>,
    /// Memory, MiB.
    pub memory_mib: Option<u64>,
    /// Memory that it can have, MiB.
    pub max_memory_mib: Option<u64>,
    /// Memory that the guest is to get by with, MiB.
    pub balloon_target_mib: Option<u64>,
    /// Debug mode.
    pub debug: Option<bool>,
    /// Network cards for links that appear later.
    pub spare_nics: Option<u32>,
    /// The running VM can be given disks.
    pub disks: bool,
}
