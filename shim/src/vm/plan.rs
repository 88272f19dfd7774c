//! Everything that a boot needs. `prepare` makes the plan.

use std::path::PathBuf;
use std::time::Duration;

use super::cgroup::HostCgroup;
use super::open_files::OpenFiles;
use crate::config::ids::IdRange;
use crate::config::settings::TokenSettings;
use crate::config::workspace::Workspace;
use crate::guest::link::Carrier;
use crate::network::Claim;
use crate::vmm::Spec;

/// What a VM is booted from.
#[derive(Debug, Clone)]
pub struct BootPlan {
    /// The machine, and what the shim passes to its guest.
    pub spec: Spec,
    /// The user IDs that VMs may have.
    pub(crate) ids: IdRange,
    /// The groups that the machine's user needs to open devices of the host.
    pub(crate) groups: Vec<u32>,
    /// The vsock device.
    pub carrier: Carrier,
    /// Memory that the guest is to get by with unless it runs short, MiB.
    pub(crate) balloon_target_mib: Option<u64>,
    /// Use raw streams if the guest offers them.
    pub raw_streams: bool,
    /// virtiofsd's program.
    pub virtiofsd: PathBuf,
    /// How many files virtiofsd may have open.
    pub(crate) open_files: OpenFiles,
    /// The folder that the guest mounts.
    pub share: PathBuf,
    /// From the start of the VMM to the guest's hello.
    pub boot_timeout: Duration,
    /// For one call to the guest.
    pub call_timeout: Duration,
    /// For the end of a container or of everything in the guest.
    pub(crate) kill_timeout: Duration,
    /// How eagerly the host's OOM killer takes the VM's processes; without a score, as a program without one.
    pub(crate) oom_score_adj: Option<i32>,
    /// The cgroup of the VM's processes; if none, they stay in the shim's.
    pub(crate) cgroup: Option<HostCgroup>,
    /// The host's network namespace that the VM is connected to.
    pub(crate) network: Option<Claim>,
    /// NICs for links that appear in the namespace after the boot.
    pub(crate) spare_nics: u32,
    /// How the metadata service signs its tokens.
    pub tokens: TokenSettings,
    /// The workspace that the metadata service returns.
    pub(crate) workspace: Option<Workspace>,
}
