//! The `io.husk.` annotations of a sandbox: what a user may decide for it, as far as the configuration allows.

use std::collections::HashMap;

use crate::config::{Config, Problem, Profile, memory_mib, one_of, vcpus};
use crate::metadata::workspace::{self, Workspace};

const PREFIX: &str = "io.husk.";
const VCPUS: &str = "io.husk.vcpus";
const PROFILE: &str = "io.husk.profile";
const MEMORY_MIB: &str = "io.husk.memory_mib";
/// Read by the guest: lets a container use AF_VSOCK.
const VSOCK: &str = "io.husk.vsock";
/// May hold secrets, or name a file that does: it is for the metadata service alone.
pub const WORKSPACE: &str = "io.husk.workspace";

/// All that there are.
pub const NAMES: [&str; 5] = [VCPUS, PROFILE, MEMORY_MIB, VSOCK, WORKSPACE];

/// What the annotations say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Virtual CPUs.
    pub vcpus: Option<u32>,
    /// What the guest is to be good at; a number of CPUs goes before it.
    pub profile: Option<Profile>,
    /// MiB of memory.
    pub memory_mib: Option<u64>,
    /// Containers may use AF_VSOCK.
    pub vsock: bool,
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
        if let Err(why) = set(&mut read, name, value, config) {
            let shown = if name == WORKSPACE { workspace::shown(value) } else { format!("{value:?}") };
            problems.push(Problem { key: format!("annotation {name}"), value: Some(shown), why });
        }
    }
    if problems.is_empty() { Ok(read) } else { Err(problems) }
}

fn set(read: &mut Annotations, name: &str, value: &str, config: &Config) -> Result<(), String> {
    if !NAMES.contains(&name) {
        return Err(format!("unknown; there are {}", NAMES.join(", ")));
    }
    if !config.allowed_annotations.iter().any(|allowed| allowed == name) {
        return Err("not among the allowed_annotations of husk's configuration".to_owned());
    }
    let number = || value.parse::<i64>().map_err(|_| "must be a whole number".to_owned());
    match name {
        VCPUS => read.vcpus = Some(vcpus(number()?)?),
        PROFILE => read.profile = Some(one_of(Some(value), &Profile::NAMES)?),
        MEMORY_MIB => read.memory_mib = Some(memory_mib(number()?)?),
        WORKSPACE => read.workspace = Some(Workspace::read(value, config.workspace_dir.as_deref())?),
        _ => read.vsock = value.parse().map_err(|_| "must be true or false".to_owned())?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
            ("io.husk.vsock", "true"),
            ("io.husk.workspace", "{}"),
            ("other", "x"),
        ];
        let profile = Some(Profile::Throughput);
        let workspace = Some(Workspace::read("{}", None).unwrap());
        let expected = Annotations { vcpus: Some(2), profile, memory_mib: Some(300), vsock: true, workspace };
        assert_eq!(read_pairs(&pairs, &Config::default()), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_told_at_once_by_name_and_value() {
        let config = Config {
            allowed_annotations: [VCPUS, PROFILE, MEMORY_MIB, WORKSPACE].map(str::to_owned).to_vec(),
            ..Config::default()
        };
        let pairs = [
            ("io.husk.vcpus", "0"),
            ("io.husk.profile", "fast"),
            ("io.husk.memory_mib", "lots"),
            ("io.husk.vsock", "true"),
            ("io.husk.workspace", "{\"password\": hunter2}"),
            ("io.husk.cpus", "1"),
        ];
        assert_eq!(
            read_pairs(&pairs, &config).unwrap_err(),
            [
                "annotation io.husk.cpus = \"1\": unknown; there are io.husk.vcpus, io.husk.profile, io.husk.memory_mib, io.husk.vsock, io.husk.workspace",
                "annotation io.husk.memory_mib = \"lots\": must be a whole number",
                "annotation io.husk.profile = \"fast\": must be one of \"latency\", \"low-latency\", \"throughput\"",
                "annotation io.husk.vcpus = \"0\": vCPU count must be greater than zero",
                "annotation io.husk.vsock = \"true\": not among the allowed_annotations of husk's configuration",
                "annotation io.husk.workspace = (21 bytes): must be JSON, or the absolute path of a file: expected value at line 1 column 14",
            ]
        );
    }
}
