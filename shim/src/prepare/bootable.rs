//! A machine that can be booted: what the configuration, the host and the size make of it. A sandbox adds its own part
//! when it boots the machine; a VM of the pool has none yet.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::Level;

use super::host::Host;
use super::size::Size;
use crate::config::extras::Extras;
use crate::config::settings::{Config, StreamMode};
use crate::config::workspace::Workspace;
use crate::network::Claim;
use crate::vm::BootPlan;
use crate::vm::cgroup::HostCgroup;
use crate::vmm::{self, Accel, Disk, GuestParams, Vmm};

/// A machine, and what boots it.
#[derive(Debug, Clone)]
pub(crate) struct Bootable {
    pub(crate) machine: vmm::Spec,
    pub(crate) host: Host,
    /// The configuration with the annotations applied.
    pub(crate) config: Config,
    /// The configuration file that the runtime's options name.
    pub(super) named_config: Option<PathBuf>,
}

/// What a machine is connected to on the host.
#[derive(Debug)]
pub struct Attachments {
    /// The folder that the guest mounts.
    pub share: PathBuf,
    /// The disk of the extras.
    pub extras: Option<Disk>,
    /// The sandbox's network namespace.
    pub(crate) network: Option<Claim>,
    /// The cgroup of the VM's processes; if none, they stay in the shim's.
    pub(crate) cgroup: Option<HostCgroup>,
}

impl Attachments {
    /// Only the folder.
    pub fn new(share: PathBuf) -> Self {
        Self { share, extras: None, network: None, cgroup: None }
    }
}

impl Bootable {
    /// The machine `name` of this size.
    pub(super) fn new(name: &str, mut config: Config, host: Host, size: Size, extras: &Extras) -> Self {
        config.log_level = config.log_level.max(if config.debug { Level::DEBUG } else { Level::ERROR });
        let machine = machine(name, &config, &host, size, extras);
        Self { machine, host, config, named_config: None }
    }

    /// The host's memory for copies of the files that are verified, bytes. A file that is missing has none: the boot
    /// reports it.
    pub(super) fn copied_files(&self) -> u64 {
        let machine = &self.machine;
        let files = [(&machine.kernel, machine.kernel_sha256), (&machine.initrd, machine.initrd_sha256)];
        let verified = files.into_iter().filter(|(_, digest)| digest.is_some());
        verified.map(|(path, _)| std::fs::metadata(path).map_or(0, |file| file.len())).fold(0, u64::saturating_add)
    }

    /// What runs the machine.
    pub(super) fn vmm(&self) -> Box<dyn Vmm> {
        vmm::factory::create(self.config.board, self.host.vmm.clone())
    }

    /// The VMM and the plan that boot the machine.
    pub(crate) fn plan(
        &self,
        attachments: Attachments,
        oom_score_adj: Option<i32>,
        workspace: Option<Workspace>,
    ) -> (Box<dyn Vmm>, BootPlan) {
        let Attachments { share, extras, network, cgroup } = attachments;
        let Self { machine, host, config, named_config: _ } = self;
        let mut spec = machine.clone();
        spec.disks.extend(extras);
        // The guest has no clock of its own. It starts with the host's time, read as late as possible.
        spec.guest.wall_clock = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        // Late as well: a longer measurement is more accurate.
        spec.tsc_khz = vmm::tsc::khz();
        let vmm = self.vmm();
        if network.is_some() && spec.user_network.is_none() {
            spec.pluggable_nics = vmm.pluggable_nics();
        }
        let plan = BootPlan {
            spec,
            ids: config.vm_ids,
            groups: groups(host.accel),
            carrier: host.carrier,
            balloon_target_mib: config.balloon_target_mib,
            raw_streams: config.streams == StreamMode::Raw,
            virtiofsd: host.virtiofsd.clone(),
            open_files: host.open_files,
            share,
            boot_timeout: config.boot_timeout,
            call_timeout: config.call_timeout,
            kill_timeout: config.kill_timeout,
            oom_score_adj,
            cgroup,
            network,
            spare_nics: config.spare_nics,
            tokens: config.tokens.clone(),
            workspace,
        };
        (vmm, plan)
    }
}

fn machine(name: &str, config: &Config, host: &Host, size: Size, extras: &Extras) -> vmm::Spec {
    let Size { vcpus, max_vcpus, memory_mib, max_memory_mib } = size;
    let guest = GuestParams {
        log_level: config.log_level,
        heartbeat: config.heartbeat,
        debug: config.debug,
        io_uring: config.io_uring,
        user_namespaces: config.user_namespaces,
        configured: config.kernel_params.clone(),
        extras: !extras.files.is_empty(),
        supervisor: extras.runs_supervisor(),
        disks: false,
        sandbox: false,
        vcpus: (max_vcpus > vcpus).then_some(vcpus),
        max_inodes: Some(host.open_files.cached_inodes()),
        hostname: None,
        held_nics: Vec::new(),
        wall_clock: None,
        ready_port: None,
    };
    vmm::Spec {
        name: format!("husk-{name}"),
        accel: host.accel,
        vcpus,
        max_vcpus,
        tsc_khz: None,
        memory_mib,
        max_memory_mib,
        code_cache_mib: config.tcg_cache_mib,
        hugepages: config.hugepages,
        kernel: host.artifacts.kernel.clone(),
        initrd: host.artifacts.initrd.clone(),
        kernel_sha256: config.kernel_sha256,
        initrd_sha256: config.initrd_sha256,
        kernel_cid: None,
        disks: Vec::new(),
        pluggable_nics: 0,
        user_network: None,
        guest,
        user: None,
    }
}

/// The groups that the machine's user needs: that of /dev/kvm, if only that group may open it.
fn groups(accel: Accel) -> Vec<u32> {
    match (accel, std::fs::metadata("/dev/kvm")) {
        (Accel::Kvm, Ok(device)) if device.mode() & 0o006 != 0o006 && device.mode() & 0o060 == 0o060 => {
            vec![device.gid()]
        }
        _ => Vec::new(),
    }
}
