//! The `io.husk.` annotations of a sandbox: the options that a user sets, within the limits of the configuration.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Component, Path, PathBuf};

use super::extras::{self, Extras};
use super::names::{
    BALLOON_TARGET_MIB, DEBUG, DENIED_BY_DEFAULT, EXTRAS_FILES, MEMORY_MIB, NAMES, NETWORK, PATH, PORTS, PREFIX,
    PROFILE, ROOT_HASHES, ROOTFS, SCRATCH_ENCRYPTED, SCRATCH_MIB, SPARE_NICS, SUPERVISOR, VCPUS, VOLUMES, VSOCK, WATCH,
    WORKSPACE,
};
use super::ports;
use super::problem::Problem;
use super::settings::{Config, NetworkMode, Profile, RootfsMode};
use super::values::{NO_BALLOON, memory_mib, one_of, scratch_mib, spare_nics, vcpus};
use super::volumes::{self, VolumeRequest};
use super::workspace::{self, Workspace};
use crate::host::digest::Sha256Digest;
use crate::network::user::PortMapping;

/// How many destinations `io.husk.watch` may name.
const WATCHED: usize = 32;
/// How many root hashes `io.husk.root_hashes` may name: as many as a root may have mounts.
const HASHES: usize = 255;
/// An error shows at most this much of a value, bytes.
const SHOWN: usize = 200;

/// The values of the annotations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Annotations {
    pub(crate) vcpus: Option<u32>,
    /// Virtual CPUs by purpose; `vcpus` overrides it.
    pub(crate) profile: Option<Profile>,
    pub(crate) memory_mib: Option<u64>,
    /// Memory that the guest is to get by with unless it runs short, MiB.
    pub(crate) balloon_target_mib: Option<u64>,
    /// Network cards for links that appear after the boot.
    pub(crate) spare_nics: Option<u32>,
    /// Enables or disables debug mode; without it, the configuration decides.
    pub(crate) debug: Option<bool>,
    /// Containers may use AF_VSOCK.
    pub(crate) vsock: bool,
    /// The network of a sandbox whose spec names no network namespace; without it, the configuration decides.
    pub(crate) network: Option<NetworkMode>,
    /// Ports of the host that lead to the guest.
    pub(crate) ports: Vec<PortMapping>,
    /// Destinations of bind mounts whose changes by the host programs in the guest notice.
    pub(crate) watch: Vec<PathBuf>,
    /// Files of the host that become disks, which the container mounts.
    pub(crate) volumes: Vec<VolumeRequest>,
    /// The size of a disk for data that ends with the VM, MiB.
    pub(crate) scratch_mib: Option<u64>,
    /// The guest encrypts that disk.
    pub(crate) scratch_encrypted: bool,
    /// The root hashes that the layers of the container's root may have; any if there are none.
    pub(crate) root_hashes: Vec<Sha256Digest>,
    /// How the guest gets the root filesystem; without it, the configuration decides.
    pub(crate) rootfs: Option<RootfsMode>,
    /// Files for the guest itself, and whether the agent among them runs.
    pub(crate) extras: Extras,
    /// The workspace configuration that the metadata service returns, if this container boots the VM.
    pub(crate) workspace: Option<Workspace>,
}

/// Reads the annotations of a spec. `namespace` is containerd's.
///
/// # Errors
///
/// Every annotation that is unknown, not allowed or malformed, sorted by name.
pub(crate) fn read(
    annotations: &HashMap<String, String>,
    config: &Config,
    namespace: &str,
) -> Result<Annotations, Vec<Problem>> {
    let mut read = Annotations::default();
    let mut problems = Vec::new();
    let mut ours: Vec<_> = annotations.iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    ours.sort();
    for (name, value) in ours {
        if let Err(why) = check(name, config).and_then(|()| set(&mut read, name, value, config, namespace)) {
            let quoted = || format!("{:?}", &value[..value.floor_char_boundary(SHOWN)]);
            let shown = if name == WORKSPACE { workspace::shown(value) } else { quoted() };
            problems.push(Problem { key: format!("annotation {name}"), value: Some(shown), why });
        } else if name == EXTRAS_FILES {
            match extras::parse(value) {
                Ok(files) => read.extras.files = files,
                Err(found) => problems.extend(found),
            }
        }
    }
    if problems.is_empty() { Ok(read) } else { Err(problems) }
}

/// Checks that the annotation exists and is allowed.
fn check(name: &str, config: &Config) -> Result<(), String> {
    if !NAMES.contains(&name) {
        return Err(format!("unknown annotation; the annotations are {}", NAMES.join(", ")));
    }
    if !config.allowed_annotations.iter().any(|allowed| allowed == name) {
        let default = if DENIED_BY_DEFAULT.contains(&name) { ", and not allowed by default" } else { "" };
        return Err(format!("not among the allowed_annotations of husk's configuration ({PATH}){default}"));
    }
    Ok(())
}

fn set(read: &mut Annotations, name: &str, value: &str, config: &Config, namespace: &str) -> Result<(), String> {
    let number = || value.parse::<i64>().map_err(|_| "must be an integer".to_owned());
    match name {
        VCPUS => read.vcpus = Some(at_most(vcpus(number()?)?, config.max_vcpus, "max_vcpus")?),
        PROFILE => {
            let profile = one_of(Some(value), &Profile::NAMES)?;
            at_most(profile.vcpus(), config.max_vcpus, "max_vcpus")?;
            read.profile = Some(profile);
        }
        MEMORY_MIB => {
            read.memory_mib = Some(at_most(memory_mib(number()?)?, config.max_memory_mib, "max_memory_mib")?);
        }
        BALLOON_TARGET_MIB if config.hugepages => return Err(NO_BALLOON.to_owned()),
        BALLOON_TARGET_MIB => read.balloon_target_mib = Some(memory_mib(number()?)?),
        SPARE_NICS => read.spare_nics = Some(spare_nics(number()?)?),
        DEBUG => read.debug = Some(boolean(value)?),
        NETWORK => read.network = Some(one_of(Some(value), &NetworkMode::NAMES)?),
        PORTS => read.ports = ports::parse(value, config)?,
        VSOCK => read.vsock = boolean(value)?,
        WATCH => read.watch = destinations(value)?,
        VOLUMES => read.volumes = volumes::parse(value, &config.volume_dirs)?,
        ROOT_HASHES => read.root_hashes = root_hashes(value)?,
        SCRATCH_ENCRYPTED => read.scratch_encrypted = boolean(value)?,
        SCRATCH_MIB => read.scratch_mib = Some(scratch_mib(number()?)?),
        ROOTFS => read.rootfs = Some(one_of(Some(value), &RootfsMode::NAMES)?),
        WORKSPACE => read.workspace = Some(Workspace::read(value, config.workspace_dir.as_deref(), namespace)?),
        SUPERVISOR => read.extras.supervisor = Some(boolean(value)?),
        // EXTRAS_FILES may have several problems, so `read` parses it.
        _ => {}
    }
    Ok(())
}

/// Checks a value against the operator's limit.
fn at_most<T: Copy + PartialOrd + Display>(value: T, limit: Option<T>, key: &str) -> Result<T, String> {
    match limit {
        Some(limit) if value > limit => Err(format!("husk's configuration allows at most {limit} ({key})")),
        _ => Ok(value),
    }
}

fn boolean(value: &str) -> Result<bool, String> {
    value.parse().map_err(|_| "must be true or false".to_owned())
}

/// Root hashes, separated by commas.
fn root_hashes(value: &str) -> Result<Vec<Sha256Digest>, String> {
    let hashes: Vec<&str> = value.split(',').collect();
    if hashes.len() > HASHES {
        return Err(format!("must be at most {HASHES} root hashes"));
    }
    let read = hashes.into_iter().map(Sha256Digest::parse).collect::<Result<_, _>>();
    read.map_err(|_| "must be root hashes of 64 hexadecimal digits, separated by commas".to_owned())
}

/// Absolute paths, separated by commas.
fn destinations(value: &str) -> Result<Vec<PathBuf>, String> {
    let paths: Vec<PathBuf> = value.split(',').map(PathBuf::from).collect();
    let is_plain = |path: &Path| {
        path.is_absolute() && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
    };
    match paths.iter().find(|path| !is_plain(path)) {
        Some(path) => Err(format!("{path:?}: must be absolute paths of the container without .., separated by commas")),
        None if paths.len() > WATCHED => Err(format!("must be at most {WATCHED} paths")),
        None => Ok(paths),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::extras::ExtraFile;

    fn read_pairs(pairs: &[(&str, &str)], config: &Config) -> Result<Annotations, Vec<String>> {
        let annotations = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        read(&annotations, config, "ns").map_err(|problems| problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn every_annotation_is_read() {
        let pairs = [
            ("io.husk.vcpus", "2"),
            ("io.husk.profile", "throughput"),
            ("io.husk.memory_mib", "300"),
            ("io.husk.balloon_target_mib", "200"),
            ("io.husk.network_spare_nics", "3"),
            ("io.husk.debug", "false"),
            ("io.husk.vsock", "true"),
            ("io.husk.network", "user"),
            ("io.husk.ports", "tcp:18080:80"),
            ("io.husk.watch", "/data,/etc/app.conf"),
            ("io.husk.volumes", "[]"),
            ("io.husk.scratch_mib", "64"),
            ("io.husk.scratch_encrypted", "true"),
            ("io.husk.root_hashes", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            ("io.husk.rootfs", "auto"),
            ("io.husk.extras.files", r#"{"/run/husk/supervisor": {"source": "/agent", "mode": "0755"}}"#),
            ("io.husk.supervisor", "false"),
            ("io.husk.workspace", "{}"),
            ("other", "x"),
        ];
        let profile = Some(Profile::Throughput);
        let agent = ExtraFile { destination: "/run/husk/supervisor".into(), source: "/agent".into(), mode: 0o755 };
        let extras = Extras { files: vec![agent], supervisor: Some(false) };
        let workspace = Some(Workspace::read("{}", None, "ns").unwrap());
        let expected = Annotations {
            vcpus: Some(2),
            profile,
            memory_mib: Some(300),
            balloon_target_mib: Some(200),
            spare_nics: Some(3),
            debug: Some(false),
            vsock: true,
            network: Some(NetworkMode::User),
            ports: ports::parse("tcp:18080:80", &Config::default()).unwrap(),
            watch: vec!["/data".into(), "/etc/app.conf".into()],
            volumes: Vec::new(),
            scratch_mib: Some(64),
            scratch_encrypted: true,
            root_hashes: root_hashes("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855").unwrap(),
            rootfs: Some(RootfsMode::Auto),
            extras,
            workspace,
        };
        let config = Config { allowed_annotations: NAMES.map(str::to_owned).to_vec(), ..Config::default() };
        assert_eq!(read_pairs(&pairs, &config), Ok(expected));
    }

    #[test]
    fn every_problem_is_reported_with_name_and_value() {
        let config = Config {
            allowed_annotations: [
                VCPUS,
                PROFILE,
                MEMORY_MIB,
                DEBUG,
                NETWORK,
                PORTS,
                WATCH,
                WORKSPACE,
                EXTRAS_FILES,
                SUPERVISOR,
            ]
            .map(str::to_owned)
            .to_vec(),
            ..Config::default()
        };
        let extras = r#"{"/dev/x": {"source": "x", "mode": "8"}}"#;
        let pairs = [
            ("io.husk.extras.files", extras),
            ("io.husk.supervisor", "yes"),
            ("io.husk.vcpus", "0"),
            ("io.husk.profile", "fast"),
            ("io.husk.memory_mib", "lots"),
            ("io.husk.debug", "1"),
            ("io.husk.vsock", "true"),
            ("io.husk.network", "host"),
            ("io.husk.ports", "tcp:80"),
            ("io.husk.watch", "/data,etc"),
            ("io.husk.workspace", "{\"password\": hunter2}"),
            ("io.husk.cpus", "1"),
        ];
        assert_eq!(
            read_pairs(&pairs, &config).unwrap_err(),
            [
                "annotation io.husk.cpus = \"1\": unknown annotation; the annotations are io.husk.vcpus, io.husk.profile, io.husk.memory_mib, io.husk.balloon_target_mib, io.husk.network_spare_nics, io.husk.debug, io.husk.vsock, io.husk.network, io.husk.ports, io.husk.watch, io.husk.volumes, io.husk.scratch_mib, io.husk.scratch_encrypted, io.husk.root_hashes, io.husk.rootfs, io.husk.workspace, io.husk.extras.files, io.husk.supervisor",
                "annotation io.husk.debug = \"1\": must be true or false",
                "annotation io.husk.extras.files[\"/dev/x\"] = {\"mode\":\"8\",\"source\":\"x\"}: the destination must be outside of /dev, which belongs to the kernel",
                "annotation io.husk.extras.files[\"/dev/x\"].source = \"x\": must be an absolute path on the host",
                "annotation io.husk.extras.files[\"/dev/x\"].mode = \"8\": must be permission bits as a string of octal digits, at most \"0777\"",
                "annotation io.husk.memory_mib = \"lots\": must be an integer",
                "annotation io.husk.network = \"host\": must be one of \"none\", \"user\"",
                "annotation io.husk.ports = \"tcp:80\": \"tcp:80\": must be PROTOCOL:[ADDRESS:]HOST_PORT:GUEST_PORT",
                "annotation io.husk.profile = \"fast\": must be one of \"latency\", \"low-latency\", \"throughput\"",
                "annotation io.husk.supervisor = \"yes\": must be true or false",
                "annotation io.husk.vcpus = \"0\": vCPU count must be greater than zero",
                "annotation io.husk.vsock = \"true\": not among the allowed_annotations of husk's configuration (/etc/husk/config.toml)",
                "annotation io.husk.watch = \"/data,etc\": \"etc\": must be absolute paths of the container without .., separated by commas",
                "annotation io.husk.workspace = (21 bytes): must be JSON, or the absolute path of a file: expected value at line 1 column 14",
            ]
        );
        let limited = Config { max_vcpus: Some(2), max_memory_mib: Some(256), ..config };
        let within = [("io.husk.vcpus", "2"), ("io.husk.profile", "latency"), ("io.husk.memory_mib", "256")];
        assert!(read_pairs(&within, &limited).is_ok());
        let beyond = [("io.husk.vcpus", "3"), ("io.husk.profile", "throughput"), ("io.husk.memory_mib", "257")];
        assert_eq!(
            read_pairs(&beyond, &limited).unwrap_err(),
            [
                "annotation io.husk.memory_mib = \"257\": husk's configuration allows at most 256 (max_memory_mib)",
                "annotation io.husk.profile = \"throughput\": husk's configuration allows at most 2 (max_vcpus)",
                "annotation io.husk.vcpus = \"3\": husk's configuration allows at most 2 (max_vcpus)",
            ]
        );
        let by_default = read_pairs(&[("io.husk.extras.files", "{}")], &Config::default()).unwrap_err();
        assert!(
            by_default[0].ends_with("configuration (/etc/husk/config.toml), and not allowed by default"),
            "{by_default:?}"
        );
    }
}
