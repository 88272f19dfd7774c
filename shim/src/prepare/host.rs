//! What the host has to give to VMs: their kernel and initrd, QEMU, virtiofsd, the accelerator. It is looked for before anything is made, for a
//! container and for `husk check-config` alike, and all that is missing is told at once.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::artifacts::Artifacts;
use crate::config::load::{self, ConfigError};
use crate::config::names::PATH;
use crate::config::problem::Problem;
use crate::config::settings::{Accel, Config, Vsock};
use crate::guest::link::Carrier;
use crate::vm::virtiofsd;
use crate::vmm as vm;
use husk_vsock::kernel;

/// One of the two is there where KVM runs guests in hardware. `/dev/kvm` alone does not tell.
const KVM_MODULES: [&str; 2] = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"];
/// The keys that decide together where the guest's files are.
const GUEST_FILES: [&str; 3] = ["image_dir", "kernel", "initrd"];

/// What a VM is made from.
#[derive(Debug, Clone)]
pub struct Host {
    /// The guest's kernel and initrd.
    pub artifacts: Artifacts,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// virtiofsd's program.
    pub virtiofsd: PathBuf,
    /// How instructions are executed here.
    pub accel: vm::Accel,
    /// What carries guests' vsock here.
    pub carrier: Carrier,
}

/// Where to look.
#[derive(Debug, Clone)]
pub struct Places {
    /// The folder of the program that runs.
    pub beside: Option<PathBuf>,
    /// `PATH`.
    pub path: Option<OsString>,
    /// Whether KVM runs guests in hardware.
    pub kvm: bool,
    /// Whether the kernel has a vsock device for guests.
    pub vhost_vsock: bool,
}

impl Places {
    /// Those of this process on this host.
    pub fn of_process() -> Self {
        let own = std::env::current_exe().ok();
        Self {
            beside: own.as_deref().and_then(Path::parent).map(Path::to_owned),
            path: std::env::var_os("PATH"),
            kvm: KVM_MODULES.iter().any(|module| Path::new(module).exists()) && Path::new("/dev/kvm").exists(),
            vhost_vsock: Path::new(kernel::DEVICE).exists(),
        }
    }
}

/// Finds what `config` asks for, for a guest in `debug` mode or for a usual one.
///
/// # Errors
///
/// All that is missing.
pub fn find(config: &Config, places: &Places, debug: bool) -> Result<Host, Vec<Problem>> {
    let beside = places.beside.as_deref();
    let artifacts = config.artifacts(beside, debug);
    let qemu = find_qemu(&config.qemu, places.path.as_ref());
    let configured = config.virtiofsd.as_deref();
    let virtiofsd = virtiofsd::find(configured, beside, places.path.clone()).map_err(|error| Problem {
        key: "virtiofsd".to_owned(),
        value: configured.map(|path| format!("{path:?}")),
        why: error.to_string(),
    });
    let accel = accelerator(config.accel, places.kvm);
    let carrier = carrier(config.vsock, places.vhost_vsock);
    match (artifacts, qemu, virtiofsd, accel, carrier) {
        (Ok(artifacts), Ok(qemu), Ok(virtiofsd), Ok(accel), Ok(carrier)) => {
            Ok(Host { artifacts, qemu, virtiofsd, accel, carrier })
        }
        (artifacts, qemu, virtiofsd, accel, carrier) => {
            let mut missing = artifacts.err().unwrap_or_default();
            missing.extend([qemu.err(), virtiofsd.err(), accel.err(), carrier.err()].into_iter().flatten());
            Err(missing)
        }
    }
}

/// Checks a configuration file (`named`, or the one that a Create would read) as a Create does: what stands in it, and whether the host has what
/// it asks for. The file's path, and whether it is there: without one, everything is as by default.
///
/// # Errors
///
/// All that is wrong at once.
pub fn check(named: Option<&Path>, places: &Places) -> Result<(PathBuf, bool), ConfigError> {
    let (path, text) = load::read(named)?;
    let (config, mut problems) = load::understand(text.as_deref().unwrap_or_default(), &path)?;
    let wrong: Vec<String> = problems.iter().map(|problem| problem.key.clone()).collect();
    let files_unclear = wrong.iter().any(|key| GUEST_FILES.contains(&key.as_str()));
    // What a wrong key names is not known, so it is not missing either.
    let told = |key: &String| wrong.contains(key) || files_unclear && GUEST_FILES.contains(&key.as_str());
    let missing = find(&config, places, config.debug).err().unwrap_or_default();
    problems.extend(missing.into_iter().filter(|problem| !told(&problem.key)));
    if problems.is_empty() { Ok((path, text.is_some())) } else { Err(ConfigError::Invalid { path, problems }) }
}

fn find_qemu(configured: &Path, path: Option<&OsString>) -> Result<PathBuf, Problem> {
    let looked: Vec<PathBuf> = if configured.components().count() > 1 {
        vec![configured.to_owned()]
    } else {
        path.iter().flat_map(std::env::split_paths).map(|folder| folder.join(configured)).collect()
    };
    looked.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        let places: Vec<_> = looked.iter().map(|path| path.display().to_string()).collect();
        let why = format!(
            "no QEMU found; looked for {}: install it (Debian: apt-get install qemu-system-x86), or set `qemu` in {}",
            places.join(", "),
            PATH
        );
        Problem { key: "qemu".to_owned(), value: Some(format!("{configured:?}")), why }
    })
}

fn accelerator(wanted: Accel, kvm: bool) -> Result<vm::Accel, Problem> {
    match wanted {
        Accel::Tcg => Ok(vm::Accel::Tcg),
        Accel::Auto | Accel::Kvm if kvm => Ok(vm::Accel::Kvm),
        Accel::Kvm => {
            let [intel, amd] = KVM_MODULES;
            let why = format!(
                "no hardware virtualisation here (it takes /dev/kvm, and {intel} or {amd}); set accel = \"tcg\" to do without"
            );
            Err(Problem { key: "accel".to_owned(), value: Some("\"kvm\"".to_owned()), why })
        }
        Accel::Auto => {
            tracing::warn!("no hardware virtualisation (kvm_intel or kvm_amd): VMs run in software (TCG), and slowly");
            Ok(vm::Accel::Tcg)
        }
    }
}

fn carrier(wanted: Vsock, vhost_vsock: bool) -> Result<Carrier, Problem> {
    match wanted {
        Vsock::Auto | Vsock::VhostUser => Ok(Carrier::Own),
        Vsock::Vhost if vhost_vsock => Ok(Carrier::Kernel),
        Vsock::Vhost => {
            let why = format!(
                "no {} here: load the kernel's module for it (modprobe vhost_vsock), or set vsock = \"vhost-user\"",
                kernel::DEVICE
            );
            Err(Problem { key: "vsock".to_owned(), value: Some("\"vhost\"".to_owned()), why })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        let places = Places { beside: None, path: Some("/no/such/folder".into()), kvm: false, vhost_vsock: false };
        match check(Some(file.path()), &places) {
            Err(ConfigError::Invalid { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_missing_is_told_by_its_key_along_with_what_is_wrong() {
        let text = "kernel = \"/k\"\ninitrd = \"/i\"\nqemu = \"/q\"\nvirtiofsd = \"/v\"\naccel = \"kvm\"\nvcpus = 0\nvsock = \"vhost\"\n";
        let beginnings = [
            "vcpus = 0: vCPU count must be greater than zero",
            "kernel = \"/k\": kernel path or restore snapshot is required; looked for /k: ",
            "initrd = \"/i\": no initrd found; looked for /i: ",
            "qemu = \"/q\": no QEMU found; looked for /q: ",
            "virtiofsd = \"/v\": no virtiofsd found; looked for /v: ",
            "accel = \"kvm\": no hardware virtualisation here",
            "vsock = \"vhost\": no /dev/vhost-vsock here: load the kernel's module for it (modprobe vhost_vsock), or set vsock = \"vhost-user\"",
        ];
        let problems = problems(text);
        assert_eq!(problems.len(), beginnings.len(), "{problems:?}");
        for (problem, beginning) in problems.iter().zip(beginnings) {
            assert!(problem.starts_with(beginning), "{problem}");
        }
    }

    #[test]
    fn what_a_wrong_key_would_name_is_not_told_to_be_missing() {
        let text = "image_dir = \"relative\"\nqemu = 1\nvirtiofsd = \"\"\naccel = \"xen\"\n";
        let problems = problems(text);
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert!(problems.iter().all(|problem| problem.contains("must be ")), "{problems:?}");
    }

    #[test]
    fn the_processors_virtualisation_is_used_where_it_is_and_nobody_forbids_it() {
        let table = [
            (Accel::Auto, true, Some(vm::Accel::Kvm)),
            (Accel::Auto, false, Some(vm::Accel::Tcg)),
            (Accel::Kvm, true, Some(vm::Accel::Kvm)),
            (Accel::Kvm, false, None),
            (Accel::Tcg, true, Some(vm::Accel::Tcg)),
            (Accel::Tcg, false, Some(vm::Accel::Tcg)),
        ];
        for (wanted, kvm, expected) in table {
            assert_eq!(accelerator(wanted, kvm).ok(), expected, "{wanted:?} {kvm}");
        }
    }

    #[test]
    fn the_kernels_vsock_is_used_where_it_is_and_somebody_asks_for_it() {
        let table = [
            (Vsock::Auto, true, Some(Carrier::Own)),
            (Vsock::Auto, false, Some(Carrier::Own)),
            (Vsock::VhostUser, true, Some(Carrier::Own)),
            (Vsock::Vhost, true, Some(Carrier::Kernel)),
            (Vsock::Vhost, false, None),
        ];
        for (wanted, there, expected) in table {
            assert_eq!(carrier(wanted, there).ok(), expected, "{wanted:?} {there}");
        }
    }

    #[test]
    fn a_file_that_is_named_has_to_be_there() {
        let places = Places { beside: None, path: None, kvm: false, vhost_vsock: false };
        let error = check(Some(Path::new("/no/such/config.toml")), &places).unwrap_err().to_string();
        assert!(error.starts_with("read /no/such/config.toml: No such file"), "{error}");
    }
}
