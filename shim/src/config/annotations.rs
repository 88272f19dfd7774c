//! The `io.husk.` annotations of a sandbox: what a user may decide for it, as far as the configuration allows.

use std::collections::HashMap;

use super::extras::{self, Extras};
use super::names::{
    DEBUG, EXTRAS_FILES, MEMORY_MIB, NAMES, NOT_BY_DEFAULT, PATH, PREFIX, PROFILE, SUPERVISOR, VCPUS, VSOCK, WORKSPACE,
};
use super::problem::Problem;
use super::settings::{Config, Profile};
use super::values::{memory_mib, one_of, vcpus};
use super::workspace::{self, Workspace};

/// Most of a value that an error shows, bytes.
const SHOWN: usize = 200;

/// What the annotations say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Virtual CPUs.
    pub vcpus: Option<u32>,
    /// What the guest is to be good at; a number of CPUs goes before it.
    pub profile: Option<Profile>,
    /// MiB of memory.
    pub memory_mib: Option<u64>,
    /// The guest is one to look into, or is not even where the configuration says so.
    pub debug: Option<bool>,
    /// Containers may use AF_VSOCK.
    pub vsock: bool,
    /// Files for the guest itself, and whether one of them runs.
    pub extras: Extras,
    /// What the metadata service tells of the VM that is booted for this container.
    pub workspace: Option<Workspace>,
}

/// Reads the annotations of a spec.
///
/// # Errors
///
/// All that is unknown, not allowed or malformed, in the names' order.
pub fn read(annotations: &HashMap<String, String>, config: &Config) -> Result<Annotations, Vec<Problem>> {
    let mut read = Annotations::default();
    let mut problems = Vec::new();
    let mut ours: Vec<_> = annotations.iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    ours.sort();
    for (name, value) in ours {
        if let Err(why) = check(name, config).and_then(|()| set(&mut read, name, value, config)) {
            let whole = || format!("{:?}", &value[..value.floor_char_boundary(SHOWN)]);
            let shown = if name == WORKSPACE { workspace::shown(value) } else { whole() };
            problems.push(Problem { key: format!("annotation {name}"), value: Some(shown), why });
        } else if name == EXTRAS_FILES {
            match extras::parse(value) {
                Ok(files) => read.extras.files = files,
                Err(wrong) => problems.extend(wrong),
            }
        }
    }
    if problems.is_empty() { Ok(read) } else { Err(problems) }
}

/// Whether it may be given.
fn check(name: &str, config: &Config) -> Result<(), String> {
    if !NAMES.contains(&name) {
        return Err(format!("unknown; there are {}", NAMES.join(", ")));
    }
    if !config.allowed_annotations.iter().any(|allowed| allowed == name) {
        let default = if NOT_BY_DEFAULT.contains(&name) { ", nor by default" } else { "" };
        return Err(format!("not among the allowed_annotations of husk's configuration ({PATH}){default}"));
    }
    Ok(())
}

fn set(read: &mut Annotations, name: &str, value: &str, config: &Config) -> Result<(), String> {
    let number = || value.parse::<i64>().map_err(|_| "must be a whole number".to_owned());
    match name {
        VCPUS => read.vcpus = Some(vcpus(number()?)?),
        PROFILE => read.profile = Some(one_of(Some(value), &Profile::NAMES)?),
        MEMORY_MIB => read.memory_mib = Some(memory_mib(number()?)?),
        DEBUG => read.debug = Some(boolean(value)?),
        VSOCK => read.vsock = boolean(value)?,
        WORKSPACE => read.workspace = Some(Workspace::read(value, config.workspace_dir.as_deref())?),
        SUPERVISOR => read.extras.supervisor = Some(boolean(value)?),
        // The extras have more to say than one sentence.
        _ => {}
    }
    Ok(())
}

fn boolean(value: &str) -> Result<bool, String> {
    value.parse().map_err(|_| "must be true or false".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::extras::ExtraFile;

    fn read_pairs(pairs: &[(&str, &str)], config: &Config) -> Result<Annotations, Vec<String>> {
        let annotations = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        read(&annotations, config).map_err(|problems| problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_is_understood() {
        let pairs = [
            ("io.husk.vcpus", "2"),
            ("io.husk.profile", "throughput"),
            ("io.husk.memory_mib", "300"),
            ("io.husk.debug", "false"),
            ("io.husk.vsock", "true"),
            ("io.husk.extras.files", r#"{"/run/husk/supervisor": {"source": "/agent", "mode": "0755"}}"#),
            ("io.husk.supervisor", "false"),
            ("io.husk.workspace", "{}"),
            ("other", "x"),
        ];
        let profile = Some(Profile::Throughput);
        let agent = ExtraFile { destination: "/run/husk/supervisor".into(), source: "/agent".into(), mode: 0o755 };
        let extras = Extras { files: vec![agent], supervisor: Some(false) };
        let workspace = Some(Workspace::read("{}", None).unwrap());
        let expected = Annotations {
            vcpus: Some(2),
            profile,
            memory_mib: Some(300),
            debug: Some(false),
            vsock: true,
            extras,
            workspace,
        };
        let config = Config { allowed_annotations: NAMES.map(str::to_owned).to_vec(), ..Config::default() };
        assert_eq!(read_pairs(&pairs, &config), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_told_at_once_by_name_and_value() {
        let config = Config {
            allowed_annotations: [VCPUS, PROFILE, MEMORY_MIB, DEBUG, WORKSPACE, EXTRAS_FILES, SUPERVISOR]
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
            ("io.husk.workspace", "{\"password\": hunter2}"),
            ("io.husk.cpus", "1"),
        ];
        assert_eq!(
            read_pairs(&pairs, &config).unwrap_err(),
            [
                "annotation io.husk.cpus = \"1\": unknown; there are io.husk.vcpus, io.husk.profile, io.husk.memory_mib, io.husk.debug, io.husk.vsock, io.husk.workspace, io.husk.extras.files, io.husk.supervisor",
                "annotation io.husk.debug = \"1\": must be true or false",
                "annotation io.husk.extras.files[\"/dev/x\"] = {\"mode\":\"8\",\"source\":\"x\"}: the destination must be outside of /dev, which is the kernel's",
                "annotation io.husk.extras.files[\"/dev/x\"].source = \"x\": must be an absolute path of the host",
                "annotation io.husk.extras.files[\"/dev/x\"].mode = \"8\": must be permission bits as a string of octal digits, \"0777\" at most",
                "annotation io.husk.memory_mib = \"lots\": must be a whole number",
                "annotation io.husk.profile = \"fast\": must be one of \"latency\", \"low-latency\", \"throughput\"",
                "annotation io.husk.supervisor = \"yes\": must be true or false",
                "annotation io.husk.vcpus = \"0\": vCPU count must be greater than zero",
                "annotation io.husk.vsock = \"true\": not among the allowed_annotations of husk's configuration (/etc/husk/config.toml)",
                "annotation io.husk.workspace = (21 bytes): must be JSON, or the absolute path of a file: expected value at line 1 column 14",
            ]
        );
        let by_default = read_pairs(&[("io.husk.extras.files", "{}")], &Config::default()).unwrap_err();
        assert!(by_default[0].ends_with("configuration (/etc/husk/config.toml), nor by default"), "{by_default:?}");
    }
}
