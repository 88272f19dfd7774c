//! `/etc/husk/config.toml` (or the file that `HUSK_CONFIG` names): what a host's operator decides for all sandboxes. Reading and checking;
//! every error is told at once. Which keys there are is in `keys`; what the host has of what they name, in [`crate::prepare::host`].

pub mod annotations;
pub mod artifacts;
pub mod kernel_params;
pub mod keys;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

pub use artifacts::Artifacts;
#[cfg(test)]
pub(crate) use keys::KEYS;
pub(crate) use keys::{memory_mib, one_of, vcpus};

/// Where the configuration is, unless `HUSK_CONFIG` names another file.
pub const PATH: &str = "/etc/husk/config.toml";
const PATH_ENV: &str = "HUSK_CONFIG";
/// MiB of a guest whose size nothing else decides.
const DEFAULT_MEMORY_MIB: u64 = 512;
/// MiB that a guest needs beside what its containers may use: kernel, init, page tables.
pub const GUEST_OVERHEAD_MIB: u64 = 128;
/// Where the host's key for tokens is, unless `metadata_key` names another file.
const METADATA_KEY: &str = "/etc/husk/metadata.key";
/// How long a token is good for, by default.
const TOKEN_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// Less does not boot.
pub const LEAST_MEMORY_MIB: u64 = 64;
/// What the guest's kernel is built for (CONFIG_NR_CPUS in kernel-config/base.config); it would leave the others idle. QEMU's microvm takes 288.
pub const MOST_VCPUS: u32 = 64;

/// How guest instructions are to be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// KVM where it works, else TCG.
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Software, even where KVM works.
    Tcg,
}

/// What carries the connections between guests and their shims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vsock {
    /// The shim's own device: nothing of the machine is shared by it, and each shim is its VM's metadata service. The kernel's, where it is there,
    /// has to be asked for.
    Auto,
    /// The shim's own device.
    VhostUser,
    /// The kernel's, or an error.
    Vhost,
}

/// What a guest is to be good at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Up soon: one virtual CPU, so that the guest's kernel has no others to start and nothing to keep in step.
    Latency,
    /// Much at a time: four virtual CPUs.
    Throughput,
}

impl Profile {
    /// All, as they are written.
    pub(crate) const NAMES: [(&str, Self); 3] =
        [("latency", Self::Latency), ("low-latency", Self::Latency), ("throughput", Self::Throughput)];

    fn vcpus(self) -> u32 {
        match self {
            Self::Latency => 1,
            Self::Throughput => 4,
        }
    }
}

/// The configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Virtual CPUs of a guest; follows the profile, else the spec's limits, if none.
    pub vcpus: Option<u32>,
    /// What guests are to be good at.
    pub profile: Option<Profile>,
    /// Memory of a guest, MiB; follows the spec's limits if none.
    pub memory_mib: Option<u64>,
    /// Guests' memory comes out of the host's huge pages.
    pub hugepages: bool,
    /// The guest's kernel, if not one of the usual places.
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs, if not one of the usual places.
    pub initrd: Option<PathBuf>,
    /// A folder with `vmlinux` and `initrd.img`, and for debug mode `initrd-debug.img`.
    pub image_dir: Option<PathBuf>,
    /// How instructions are executed.
    pub accel: Accel,
    /// What carries guests' vsock.
    pub vsock: Vsock,
    /// The board: microvm or q35.
    pub board: crate::vmm::Board,
    /// QEMU's program; searched in PATH if it has no slash.
    pub qemu: PathBuf,
    /// Who QEMU runs as (uid, gid).
    pub qemu_user: (u32, u32),
    /// virtiofsd's program, if not one of the usual places.
    pub virtiofsd: Option<PathBuf>,
    /// Parameters of the guest's kernel beside husk's own, of those that may be given.
    pub kernel_params: Vec<String>,
    /// Guests are ones to look into: a shell on the console, processes in the VM itself, verbose logs.
    pub debug: bool,
    /// Least severe level of the guest's init that comes to the shim's log.
    pub log_level: tracing::Level,
    /// From QEMU's start to the guest's hello.
    pub boot_timeout: Duration,
    /// For one call to the guest.
    pub call_timeout: Duration,
    /// How often a guest tells that it turns. One that misses three is killed.
    pub heartbeat: Duration,
    /// MiB that a sandbox's extras may have together.
    pub extras_max_mib: u64,
    /// The `io.husk.` annotations that a sandbox may use.
    pub allowed_annotations: Vec<String>,
    /// How the metadata service signs.
    pub tokens: crate::metadata::Settings,
    /// The folder whose files may be workspaces; none may if none.
    pub workspace_dir: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vcpus: None,
            profile: None,
            memory_mib: None,
            hugepages: false,
            kernel: None,
            initrd: None,
            image_dir: None,
            accel: Accel::Auto,
            vsock: Vsock::Auto,
            board: crate::vmm::Board::Microvm,
            qemu: "qemu-system-x86_64".into(),
            // nobody and nogroup, by their numbers on every Linux distribution.
            qemu_user: (65534, 65534),
            virtiofsd: None,
            kernel_params: Vec::new(),
            debug: false,
            log_level: tracing::Level::WARN,
            boot_timeout: Duration::from_secs(60),
            call_timeout: Duration::from_secs(60),
            heartbeat: Duration::from_secs(10),
            extras_max_mib: 64,
            allowed_annotations: crate::config::annotations::NAMES
                .into_iter()
                .filter(|name| !crate::config::annotations::NOT_BY_DEFAULT.contains(name))
                .map(str::to_owned)
                .collect(),
            tokens: crate::metadata::Settings { key: METADATA_KEY.into(), lifetime: TOKEN_LIFETIME },
            workspace_dir: None,
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key.
    pub key: String,
    /// Its value, as it was written; none if there is none to show.
    pub value: Option<String>,
    /// What is wrong with it, or what is allowed.
    pub why: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} = {value}: {}", self.key, self.why),
            None => write!(f, "{}: {}", self.key, self.why),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{}: {source}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: toml::de::Error,
    },
    /// Keys or values are wrong; all of them.
    #[error("{}: {}", path.display(), join(problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problems: Vec<Problem>,
    },
}

/// All of them in one line.
pub fn join(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Reads the configuration of this host. Without a file, everything is as by default; a file that `HUSK_CONFIG` names must be there.
///
/// # Errors
///
/// When it cannot be read, or is wrong.
pub fn load() -> Result<Config, Error> {
    match read(None)? {
        (path, Some(text)) => parse(&text, &path),
        (_, None) => Ok(Config::default()),
    }
}

/// The configuration's file and its text: `named`, else what `HUSK_CONFIG` names, else the usual one, which alone need not be there.
///
/// # Errors
///
/// When it cannot be read.
pub(crate) fn read(named: Option<&Path>) -> Result<(PathBuf, Option<String>), Error> {
    let from_env = || std::env::var_os(PATH_ENV).filter(|path| !path.is_empty()).map(PathBuf::from);
    let named = named.map(Path::to_owned).or_else(from_env);
    let path = named.clone().unwrap_or_else(|| PATH.into());
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok((path, Some(text))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => Ok((path, None)),
        Err(source) => Err(Error::Read { path, source }),
    }
}

/// Reads and checks the text of a configuration file; `path` is for messages.
///
/// # Errors
///
/// All that is wrong at once.
pub fn parse(text: &str, path: &Path) -> Result<Config, Error> {
    let (config, problems) = understand(text, path)?;
    if problems.is_empty() { Ok(config) } else { Err(Error::Invalid { path: path.to_owned(), problems }) }
}

/// What is understood of a configuration's text, and what is wrong with the rest of it.
///
/// # Errors
///
/// When it is no TOML, so that nothing is understood.
pub(crate) fn understand(text: &str, path: &Path) -> Result<(Config, Vec<Problem>), Error> {
    let table: Table = text.parse().map_err(|source| Error::Syntax { path: path.to_owned(), source })?;
    let mut config = Config::default();
    let mut problems = Vec::new();
    for (key, value) in &table {
        if let Err(why) = keys::set(&mut config, key, value) {
            problems.push(Problem { key: key.clone(), value: Some(value.to_string()), why });
        }
    }
    if config.image_dir.is_some() && (config.kernel.is_some() || config.initrd.is_some()) {
        let why = "image_dir stands for both kernel and initrd: give either it or them".to_owned();
        problems.push(Problem { key: "image_dir".into(), value: table.get("image_dir").map(Value::to_string), why });
    }
    Ok((config, problems))
}

impl Config {
    /// Virtual CPUs and MiB of a guest. A number that an annotation says, else one of the configuration; else, for the CPUs, those of the profile, the
    /// annotation's again before the configuration's; else what the spec's limits need; else the default.
    pub fn size(
        &self,
        wanted: &crate::config::annotations::Annotations,
        limits: crate::rootfs::spec::Limits,
    ) -> (u32, u64) {
        let profile = wanted.profile.or(self.profile).map(Profile::vcpus);
        let vcpus = wanted.vcpus.or(self.vcpus).or(profile).or(limits.cpus).unwrap_or(1).clamp(1, MOST_VCPUS);
        let for_limit = |bytes: u64| bytes.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB).max(DEFAULT_MEMORY_MIB);
        let memory = wanted.memory_mib.or(self.memory_mib).or(limits.memory.map(for_limit));
        (vcpus, memory.unwrap_or(DEFAULT_MEMORY_MIB))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::annotations::Annotations;
    use crate::rootfs::spec::Limits;

    fn errors(text: &str) -> Vec<String> {
        match parse(text, Path::new("/c.toml")) {
            Err(Error::Invalid { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_errors_are_told_at_once_with_key_value_and_what_is_allowed() {
        let text = "accel = \"xen\"\nimage_dir = \"/d\"\nkernel = \"/k\"\nmemory_mib = 0\nmemroy = 1\nvcpus = -2\n";
        assert_eq!(
            errors(text),
            [
                "accel = \"xen\": must be one of \"auto\", \"kvm\", \"tcg\"",
                "memory_mib = 0: memory must be greater than zero",
                &format!("memroy = 1: unknown key; there are {}", keys::names()),
                "vcpus = -2: vCPU count must be greater than zero",
                "image_dir = \"/d\": image_dir stands for both kernel and initrd: give either it or them",
            ]
        );
    }

    #[test]
    fn values_of_the_wrong_kind_or_size_are_refused() {
        let table = [
            ("vcpus = \"two\"", "must be a whole number"),
            ("profile = \"fast\"", "must be one of \"latency\", \"low-latency\", \"throughput\""),
            ("vsock = \"tcp\"", "must be one of \"auto\", \"vhost-user\", \"vhost\""),
            ("vcpus = 1000", "at most 64 vCPUs are possible"),
            ("memory_mib = 1", "a guest needs at least 64 MiB"),
            ("hugepages = 1", "must be true or false"),
            ("debug = \"yes\"", "must be true or false"),
            ("kernel = \"vmlinux\"", "must be an absolute path"),
            ("qemu = \"\"", "must be a string, and not an empty one"),
            ("qemu_user = \"nobody\"", "must be a string UID:GID, both numbers"),
            ("kernel_params = [\"init=/bin/sh\"]", "\"init=/bin/sh\" would start something else than husk's init"),
            ("kernel_params = [\"a b\"]", "\"a b\" is not one kernel parameter"),
            ("metadata_key = \"key\"", "must be an absolute path"),
            ("token_lifetime_ms = 0", "must be a number of milliseconds greater than zero"),
            ("workspace_dir = \"../etc\"", "must be an absolute path"),
            ("boot_timeout_ms = 0", "must be a number of milliseconds greater than zero"),
            ("allowed_annotations = [\"io.husk.x\"]", "\"io.husk.x\" is none of"),
        ];
        for (text, expected) in table {
            let errors = errors(text);
            assert!(errors.len() == 1 && errors[0].contains(expected), "{text}: {errors:?}");
        }
    }

    #[test]
    fn memory_follows_annotation_configuration_limits_and_default_in_that_order() {
        let limit = |bytes| Limits { memory: bytes, cpus: None };
        let table = [
            (Some(100), Some(200), Some(1 << 30), 100),
            (None, Some(200), Some(1 << 30), 200),
            (None, None, Some(1 << 30), 1024 + 128),
            (None, None, Some(1 << 20), 512),
            (None, None, None, 512),
        ];
        for (annotation, memory_mib, bytes, expected) in table {
            let config = Config { memory_mib, ..Config::default() };
            let wanted = Annotations { memory_mib: annotation, ..Default::default() };
            assert_eq!(config.size(&wanted, limit(bytes)).1, expected, "{annotation:?} {memory_mib:?} {bytes:?}");
        }
    }

    #[test]
    fn cpus_follow_a_count_then_a_profile_then_limits_and_the_sandbox_comes_before_the_host() {
        use Profile::{Latency, Throughput};
        // (annotation, configuration) of the count and of the profile, the spec's limit, and what comes of it.
        type Row = ((Option<u32>, Option<u32>), (Option<Profile>, Option<Profile>), Option<u32>, u32);
        let table: &[Row] = &[
            ((Some(5), Some(3)), (Some(Latency), Some(Throughput)), Some(2), 5),
            ((None, Some(3)), (Some(Latency), Some(Throughput)), Some(2), 3),
            ((None, None), (Some(Latency), Some(Throughput)), Some(2), 1),
            ((None, None), (Some(Throughput), Some(Latency)), Some(2), 4),
            ((None, None), (None, Some(Throughput)), Some(2), 4),
            ((None, None), (None, Some(Latency)), Some(2), 1),
            ((None, None), (None, None), Some(2), 2),
            ((None, None), (None, None), Some(1000), MOST_VCPUS),
            ((None, None), (None, None), None, 1),
        ];
        for row in table {
            let ((annotation, vcpus), (profile_annotation, profile), cpus, expected) = *row;
            let config = Config { vcpus, profile, ..Config::default() };
            let wanted = Annotations { vcpus: annotation, profile: profile_annotation, ..Default::default() };
            assert_eq!(config.size(&wanted, Limits { memory: None, cpus }).0, expected, "{row:?}");
        }
    }
}
