//! The parts of a sandbox's status that only a running shim knows: what its VM uses of the host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A disk of the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskStatus {
    /// By which the guest finds it.
    pub serial: String,
    /// The image on the host.
    pub path: PathBuf,
    /// The guest cannot write.
    pub read_only: bool,
    /// Its size as the guest sees it.
    pub bytes: u64,
    /// `mounted`, or `attached` if it is used as a device.
    pub state: String,
    /// `verified` or `encrypted`; none of other disks.
    pub protection: Option<String>,
    /// The containers that use it.
    pub containers: Vec<String>,
}

/// How the VM gets the root filesystem of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RootStatus {
    /// The container.
    pub container: String,
    /// `virtiofs`, `overlay`, `erofs` or `disks`.
    pub kind: String,
    /// Why.
    pub reason: String,
}

/// The sources whose changes by the host reach programs in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchStatus {
    /// The sources.
    pub volumes: Vec<WatchedVolume>,
    /// How often the kernel's queue of changes has overflowed.
    pub overflows: u64,
}

/// A source whose changes by the host reach programs in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchedVolume {
    /// Its path on the host, without symbolic links.
    pub path: PathBuf,
    /// Why it is not watched. Absent from the JSON if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Changes that the guest was told of.
    pub reported: u64,
    /// Changes that it was not told of.
    pub lost: u64,
}

/// The guest's memory on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStatus {
    /// What it takes of the host's memory, MiB; `None` if that cannot be determined.
    pub on_host_mib: Option<u64>,
    /// What the guest is to get by with unless it runs short, MiB. Absent from the JSON if that is all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon_target_mib: Option<u64>,
    /// What it has given back for that, MiB; `None` without a balloon, or if that is not known.
    pub balloon_mib: Option<u64>,
}

/// The files that virtiofsd has open for the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FilesStatus {
    /// How many; `None` if that cannot be determined.
    pub open: Option<u64>,
    /// How many there may be.
    pub limit: u64,
    /// The configured limit, which the host may not allow.
    pub configured: u64,
    /// Why virtiofsd does not serve the share. Absent from the JSON if it does, as far as is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}
