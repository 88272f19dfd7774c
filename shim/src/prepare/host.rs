//! What the host provides for VMs: the guest's kernel and initrd, the VMM, virtiofsd, the accelerator and the vsock
//! device. A container's creation and `husk check-config` search for all of it before anything is created, and report
//! everything that is missing at once.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use husk_protos::chain::Chain;
use husk_vsock::kernel;
use procfs::{Current, Meminfo};

use crate::config::artifacts::Artifacts;
use crate::config::load::{self, ConfigError};
use crate::config::names::PATH;
use crate::config::problem::Problem;
use crate::config::settings::{AccelMode, Config, VsockMode};
use crate::guest::link::Carrier;
use crate::host::open_files::FileLimits;
use crate::prepare::boot_files::{self, BootFile};
use crate::prepare::ids;
use crate::prepare::root::PlannedRoot;
use crate::prepare::size::HostSize;
use crate::state;
use crate::vm::OpenFiles;
use crate::vm::virtiofsd;
use crate::vmm::{self, factory};

/// One of them is loaded if KVM has hardware virtualization; `/dev/kvm` may exist without it.
const KVM_MODULES: [&str; 2] = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"];
/// The keys that together locate the guest's files.
const GUEST_FILES: [&str; 3] = ["image_dir", "kernel", "initrd"];

/// What VMs on this host are made from.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// The guest's kernel and initrd.
    pub(crate) artifacts: Artifacts,
    /// The VMM's program.
    pub(crate) vmm: PathBuf,
    /// virtiofsd's program.
    pub(crate) virtiofsd: PathBuf,
    /// How many files virtiofsd may have open.
    pub(crate) open_files: OpenFiles,
    /// How guest instructions are executed.
    pub(crate) accel: vmm::Accel,
    /// The vsock device.
    pub(crate) carrier: Carrier,
}

/// Where to search, and what the host's kernel supports.
#[derive(Debug, Clone)]
pub struct Places {
    /// The folder of the running program.
    pub beside: Option<PathBuf>,
    /// `PATH`.
    pub path: Option<OsString>,
    /// KVM has hardware virtualization.
    pub kvm: bool,
    /// The kernel has a vsock device for guests.
    pub vhost_vsock: bool,
    /// The folder with the state of all sandboxes, and their leases.
    pub state: PathBuf,
    /// How many files a process may have open.
    pub files: FileLimits,
    /// The folder with the host's account files.
    pub accounts: PathBuf,
}

impl Places {
    /// The places of this process on this host.
    pub fn of_process() -> Self {
        let own = std::env::current_exe().ok();
        Self {
            beside: own.as_deref().and_then(Path::parent).map(Path::to_owned),
            path: std::env::var_os("PATH"),
            kvm: KVM_MODULES.iter().any(|module| Path::new(module).exists()) && Path::new("/dev/kvm").exists(),
            vhost_vsock: Path::new(kernel::DEVICE).exists(),
            state: state::base(),
            files: FileLimits::of_process(),
            accounts: "/etc".into(),
        }
    }
}

/// Finds what `config` requires, for a guest with or without `debug` mode.
///
/// # Errors
///
/// Everything that is missing.
pub(crate) fn find(config: &Config, places: &Places, debug: bool) -> Result<Host, Vec<Problem>> {
    let beside = places.beside.as_deref();
    let artifacts = config.artifacts(beside, debug);
    let vmm = find_vmm(config, places);
    let configured = config.virtiofsd.as_deref();
    let virtiofsd = virtiofsd::find(configured, beside, places.path.clone()).map_err(|error| Problem {
        key: "virtiofsd".to_owned(),
        value: configured.map(|path| format!("{path:?}")),
        why: Chain(&error).to_string(),
    });
    let open_files = OpenFiles { limit: places.files.grant(config.open_files), configured: config.open_files };
    let accel = accelerator(config.accel, places.kvm);
    let carrier = carrier(config.vsock, places.vhost_vsock);
    let ids = ids::check(config.vm_ids, &places.accounts);
    match (artifacts, vmm, virtiofsd, accel, carrier, ids) {
        (Ok(artifacts), Ok(vmm), Ok(virtiofsd), Ok(accel), Ok(carrier), Ok(())) => {
            Ok(Host { artifacts, vmm, virtiofsd, open_files, accel, carrier })
        }
        (artifacts, vmm, virtiofsd, accel, carrier, ids) => {
            let mut missing = artifacts.err().unwrap_or_default();
            missing.extend([vmm.err(), virtiofsd.err(), accel.err(), carrier.err(), ids.err()].into_iter().flatten());
            Err(missing)
        }
    }
}

/// A valid configuration.
#[derive(Debug)]
pub struct Checked {
    /// The file.
    pub path: PathBuf,
    /// Whether it exists: without the file, defaults apply.
    pub exists: bool,
    /// The guest's kernel and initramfs.
    pub files: Vec<BootFile>,
    /// What the host lacks and VMs do without.
    pub notes: Vec<String>,
}

/// Checks a configuration file as a container's creation and a boot do: its keys, and whether the host has what they
/// require. The file is `named`, or the one that a creation would read.
///
/// # Errors
///
/// All problems at once.
pub fn check(named: Option<&Path>, places: &Places) -> Result<Checked, ConfigError> {
    let (path, text) = load::read(named)?;
    let (config, mut problems) = load::parse_valid(text.as_deref().unwrap_or_default(), &path)?;
    let wrong: Vec<String> = problems.iter().map(|problem| problem.key.clone()).collect();
    let files_unclear = wrong.iter().any(|key| GUEST_FILES.contains(&key.as_str()));
    // A file that an invalid key names is not reported as missing too.
    let reported = |key: &String| wrong.contains(key) || files_unclear && GUEST_FILES.contains(&key.as_str());
    let files = find(&config, places, config.debug).and_then(|host| boot_files::examine(&config, &host.artifacts));
    let files = files.unwrap_or_else(|missing| {
        problems.extend(missing.into_iter().filter(|problem| !reported(&problem.key)));
        Vec::new()
    });
    let (of_roots, note) = PlannedRoot::check(&config);
    problems.extend(of_roots.into_iter().filter(|problem| !reported(&problem.key)));
    match problems.is_empty() {
        true => Ok(Checked { path, exists: text.is_some(), files, notes: note.into_iter().collect() }),
        false => Err(ConfigError::Invalid { path, problems }),
    }
}

fn find_vmm(config: &Config, places: &Places) -> Result<PathBuf, Problem> {
    let programs = factory::Programs { qemu: &config.qemu };
    factory::find(config.board, programs, places.path.as_deref()).map_err(|missing| Problem {
        key: missing.key.to_owned(),
        value: Some(format!("{:?}", missing.configured)),
        why: format!("{missing}, or set `{}` in {PATH}", missing.key),
    })
}

/// Emulation is not a fallback: whoever relies on a VM's isolation would not notice that it is gone.
fn accelerator(configured: AccelMode, kvm: bool) -> Result<vmm::Accel, Problem> {
    let value = match configured {
        AccelMode::Tcg => return Ok(vmm::Accel::Tcg),
        AccelMode::Auto | AccelMode::Kvm if kvm => return Ok(vmm::Accel::Kvm),
        AccelMode::Auto => "auto",
        AccelMode::Kvm => "kvm",
    };
    let [intel, amd] = KVM_MODULES;
    let why = format!(
        "no hardware virtualization on this host (it requires /dev/kvm, and {intel} or {amd}). Without it, QEMU emulates \
         the CPU (TCG), which is slow, and which QEMU's security policy does not consider a security boundary. To run \
         VMs without that boundary, for example for tests, set accel = \"tcg\" in {PATH}"
    );
    Err(Problem::quoted("accel".to_owned(), value, why))
}

fn carrier(configured: VsockMode, vhost_vsock: bool) -> Result<Carrier, Problem> {
    match configured {
        VsockMode::Auto | VsockMode::VhostUser => Ok(Carrier::Own),
        VsockMode::Vhost if vhost_vsock => Ok(Carrier::Kernel),
        VsockMode::Vhost => {
            let why = format!(
                "no {} on this host: load the kernel's module for it (modprobe vhost_vsock), or set vsock = \"vhost-user\"",
                kernel::DEVICE
            );
            Err(Problem { key: "vsock".to_owned(), value: Some("\"vhost\"".to_owned()), why })
        }
    }
}

/// The host's CPUs that this process may use, and its memory. A size that cannot be read limits nothing.
pub(super) fn size() -> HostSize {
    let cpus = std::thread::available_parallelism();
    HostSize {
        cpus: cpus.map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
        memory_mib: Meminfo::current().map_or(u64::MAX, |meminfo| meminfo.mem_total >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: FileLimits = FileLimits { hard: 20_000, max: 1_000_000, raisable: false };

    fn problems(text: &str) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        let places = Places {
            beside: None,
            path: Some("/no/such/folder".into()),
            kvm: false,
            vhost_vsock: false,
            state: PathBuf::new(),
            files: FILES,
            accounts: PathBuf::new(),
        };
        match check(Some(file.path()), &places) {
            Err(ConfigError::Invalid { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn missing_files_are_reported_under_their_keys_together_with_wrong_values() {
        let text = "kernel = \"/k\"\ninitrd = \"/i\"\nqemu = \"/q\"\nvirtiofsd = \"/v\"\naccel = \"kvm\"\nvcpus = 0\nvsock = \"vhost\"\n";
        let beginnings = [
            "vcpus = 0: vCPU count must be greater than zero",
            "kernel = \"/k\": kernel path or restore snapshot is required; looked for /k: ",
            "initrd = \"/i\": no initrd found; looked for /i: ",
            "qemu = \"/q\": no QEMU found; looked for /q: ",
            "virtiofsd = \"/v\": no virtiofsd found; looked for /v: ",
            "accel = \"kvm\": no hardware virtualization on this host",
            "vsock = \"vhost\": no /dev/vhost-vsock on this host: load the kernel's module for it (modprobe vhost_vsock), or set vsock = \"vhost-user\"",
        ];
        let problems = problems(text);
        assert_eq!(problems.len(), beginnings.len(), "{problems:?}");
        for (problem, beginning) in problems.iter().zip(beginnings) {
            assert!(problem.starts_with(beginning), "{problem}");
        }
    }

    #[test]
    fn a_file_that_an_invalid_key_names_is_not_reported_as_missing() {
        let text = "image_dir = \"relative\"\nqemu = 1\nvirtiofsd = \"\"\naccel = \"xen\"\n";
        let problems = problems(text);
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert!(problems.iter().all(|problem| problem.contains("must be ")), "{problems:?}");
    }

    #[test]
    fn without_kvm_only_a_configuration_that_accepts_emulation_is_valid() {
        let table = [
            (AccelMode::Auto, true, Some(vmm::Accel::Kvm)),
            (AccelMode::Auto, false, None),
            (AccelMode::Kvm, true, Some(vmm::Accel::Kvm)),
            (AccelMode::Kvm, false, None),
            (AccelMode::Tcg, true, Some(vmm::Accel::Tcg)),
            (AccelMode::Tcg, false, Some(vmm::Accel::Tcg)),
        ];
        for (configured, kvm, expected) in table {
            assert_eq!(accelerator(configured, kvm).ok(), expected, "{configured:?} {kvm}");
        }
        for (configured, value) in [(AccelMode::Auto, "auto"), (AccelMode::Kvm, "kvm")] {
            let message = accelerator(configured, false).unwrap_err().to_string();
            let parts =
                ["QEMU's security policy does not consider a security boundary", "set accel = \"tcg\" in /etc/husk"];
            assert!(message.starts_with(&format!("accel = \"{value}\": no hardware virtualization")), "{message}");
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn the_kernels_vsock_device_is_used_only_on_request() {
        let table = [
            (VsockMode::Auto, true, Some(Carrier::Own)),
            (VsockMode::Auto, false, Some(Carrier::Own)),
            (VsockMode::VhostUser, true, Some(Carrier::Own)),
            (VsockMode::Vhost, true, Some(Carrier::Kernel)),
            (VsockMode::Vhost, false, None),
        ];
        for (configured, exists, expected) in table {
            assert_eq!(carrier(configured, exists).ok(), expected, "{configured:?} {exists}");
        }
    }

    #[test]
    fn a_named_configuration_file_must_exist() {
        let places = Places {
            beside: None,
            path: None,
            kvm: false,
            vhost_vsock: false,
            state: PathBuf::new(),
            files: FILES,
            accounts: PathBuf::new(),
        };
        let error = Chain(&check(Some(Path::new("/no/such/config.toml")), &places).unwrap_err()).to_string();
        assert!(error.starts_with("read /no/such/config.toml: No such file"), "{error}");
    }
}
