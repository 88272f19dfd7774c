//! VMs of the pool: what one is booted with, and which sandbox it may serve.
//!
//! A VM serves a sandbox only if that sandbox would have booted the same one, and in the same place: the key covers the
//! whole configuration, the machine, the files that it is booted from, the shim itself and its namespaces. Nobody
//! compares parts of it, so that nothing is left out.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::host::{self, Places};
use super::{Bootable, PrepareError, Prepared, all, size};
use crate::config::annotations::Annotations;
use crate::config::extras::Extras;
use crate::config::load;
use crate::guest::link::Carrier;
use crate::host::digest::Sha256Digest;
use crate::pool::request::PoolRequest;
use crate::rootfs::spec::SpecLimits;

/// Hexadecimal digits of a key: a VM of another key is not mistaken for this one's.
const DIGITS: usize = 24;
/// The namespaces of a shim that its sandbox's processes share or that its paths depend on.
const NAMESPACES: [&str; 7] = ["mnt", "pid", "net", "ipc", "uts", "user", "cgroup"];

impl Prepared {
    /// The key of the VMs that this sandbox could take from the pool. None if it needs one of its own, or if the key
    /// cannot be computed: then its boot reports why.
    pub(crate) fn pool_key(&self) -> Option<String> {
        if !self.extras.files.is_empty() || self.boot.machine.guest.sandbox {
            return None;
        }
        self.boot.key()
    }

    /// How many VMs are to wait.
    pub(crate) fn pool_size(&self) -> u32 {
        self.boot.config.pool.size
    }
}

impl Bootable {
    /// The machine of a VM that waits. Reads the configuration and looks at the host, as for a sandbox.
    ///
    /// # Errors
    ///
    /// All problems at once.
    pub(crate) fn for_pool(name: &str, request: &PoolRequest) -> Result<Self, PrepareError> {
        let mut config = load::load_named(request.config.as_deref()).map_err(|error| PrepareError::one(&error))?;
        config.debug = request.debug.unwrap_or(config.debug);
        config.balloon_target_mib = request.balloon_target_mib.or(config.balloon_target_mib);
        config.spare_nics = request.spare_nics.unwrap_or(config.spare_nics);
        let host = host::find(&config, &Places::of_process(), config.debug).map_err(all)?;
        let of_limits = SpecLimits::default();
        let usual = size::size(&config, &Annotations::default(), of_limits, of_limits, host::size());
        let size = size::Size {
            vcpus: request.vcpus.unwrap_or(usual.vcpus),
            max_vcpus: request.max_vcpus.unwrap_or(usual.max_vcpus),
            memory_mib: request.memory_mib.unwrap_or(usual.memory_mib),
            max_memory_mib: request.max_memory_mib.unwrap_or(usual.max_memory_mib),
        };
        let mut boot = Self::new(name, config, host, size, &Extras::default());
        boot.named_config.clone_from(&request.config);
        boot.machine.guest.disks = request.disks;
        Ok(boot)
    }

    /// What makes another process boot the same VM for the pool.
    pub(crate) fn pool_request(&self) -> PoolRequest {
        PoolRequest {
            config: self.named_config.clone(),
            vcpus: Some(self.machine.vcpus),
            max_vcpus: Some(self.machine.max_vcpus),
            memory_mib: Some(self.machine.memory_mib),
            max_memory_mib: Some(self.machine.max_memory_mib),
            balloon_target_mib: self.config.balloon_target_mib,
            debug: Some(self.config.debug),
            spare_nics: Some(self.config.spare_nics),
            disks: self.machine.guest.disks,
        }
    }

    /// The key of this VM in the pool. None if no VM of the pool can be the same.
    pub(crate) fn key(&self) -> Option<String> {
        // The kernel's vsock device knows a VM by the sandbox that it was booted for, and a VM in user mode has its ports.
        if self.host.carrier != Carrier::Own || self.machine.user_network.is_some() {
            return None;
        }
        match self.everything() {
            Ok(text) => Some(shortened(Sha256Digest::finish(Sha256::new_with_prefix(text)))),
            Err(error) => {
                tracing::debug!(%error, "no key for the pool");
                None
            }
        }
    }

    /// Everything that a VM is booted with, as text.
    fn everything(&self) -> io::Result<String> {
        let Self { machine, host, config, named_config } = self;
        let mut machine = machine.clone();
        machine.name = String::new();
        let config_file = load::path(named_config.as_deref());
        let own = std::env::current_exe()?;
        let files = [&own, &machine.kernel, &machine.initrd, &host.vmm, &host.virtiofsd];
        let files = files.into_iter().map(|path| identity(path)).collect::<io::Result<Vec<_>>>()?;
        let namespaces = NAMESPACES.map(|name| fs::metadata(Path::new("/proc/self/ns").join(name)).map(|ns| ns.ino()));
        let namespaces = namespaces.into_iter().collect::<io::Result<Vec<_>>>()?;
        Ok(format!("{config_file:?} {config:?} {machine:?} {host:?} {files:?} {namespaces:?}"))
    }
}

/// Which file is at a path, and which version of it.
fn identity(path: &Path) -> io::Result<(PathBuf, [u64; 3], [i64; 2])> {
    let file = fs::metadata(path)?;
    Ok((path.to_owned(), [file.dev(), file.ino(), file.size()], [file.mtime(), file.mtime_nsec()]))
}

fn shortened(digest: Sha256Digest) -> String {
    let mut digits = digest.to_string();
    digits.truncate(DIGITS);
    digits
}
