//! Reads and validates the configuration file, and reports every problem at once.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::keys;
use super::names::{PATH, PATH_ENV};
use super::problem::{Problem, join};
use super::settings::Config;
use super::values::NO_BALLOON;

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("parse {}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The place and the mistake.
        source: toml::de::Error,
    },
    /// Keys or values are invalid.
    #[error("{}: {}", path.display(), join(problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// All problems.
        problems: Vec<Problem>,
    },
}

/// Reads the configuration of this host. Without the file, defaults apply; a file that `HUSK_CONFIG` names must exist.
///
/// # Errors
///
/// When the file cannot be read or is invalid.
pub fn load() -> Result<Config, ConfigError> {
    load_named(None)
}

/// Like [`load`], from this file if one is named. That file must exist.
///
/// # Errors
///
/// When the file cannot be read or is invalid.
pub(crate) fn load_named(named: Option<&Path>) -> Result<Config, ConfigError> {
    match read(named)? {
        (path, Some(text)) => parse(&text, &path),
        (_, None) => Ok(Config::default()),
    }
}

/// The configuration file and its text: `named`, else the file that `HUSK_CONFIG` names, else the default one. Only the
/// default file may be missing.
///
/// # Errors
///
/// When the file cannot be read.
pub(crate) fn read(named: Option<&Path>) -> Result<(PathBuf, Option<String>), ConfigError> {
    let named = explicit(named);
    let path = named.clone().unwrap_or_else(|| PATH.into());
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok((path, Some(text))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => Ok((path, None)),
        Err(source) => Err(ConfigError::Read { path, source }),
    }
}

/// The configuration file that [`load_named`] reads.
pub(crate) fn path(named: Option<&Path>) -> PathBuf {
    explicit(named).unwrap_or_else(|| PATH.into())
}

/// The file that is named, here or by `HUSK_CONFIG`.
fn explicit(named: Option<&Path>) -> Option<PathBuf> {
    let from_env = || std::env::var_os(PATH_ENV).filter(|path| !path.is_empty()).map(PathBuf::from);
    named.map(Path::to_owned).or_else(from_env)
}

/// Parses and checks the text of a configuration file; `path` is for messages.
///
/// # Errors
///
/// All problems at once.
pub(crate) fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let (config, problems) = parse_valid(text, path)?;
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::Invalid { path: path.to_owned(), problems }) }
}

/// The valid part of a configuration's text, and the problems with the rest.
///
/// # Errors
///
/// When the text is not TOML.
pub(crate) fn parse_valid(text: &str, path: &Path) -> Result<(Config, Vec<Problem>), ConfigError> {
    let table: Table = text.parse().map_err(|source| ConfigError::Syntax { path: path.to_owned(), source })?;
    let mut config = Config::default();
    let mut problems = Vec::new();
    for (key, value) in &table {
        if let Err(why) = keys::set(&mut config, key, value) {
            problems.push(Problem { key: key.clone(), value: Some(value.to_string()), why });
        }
    }
    if config.image_dir.is_some() && (config.kernel.is_some() || config.initrd.is_some()) {
        let why = "excludes kernel and initrd: set either image_dir or those".to_owned();
        problems.push(Problem { key: "image_dir".into(), value: table.get("image_dir").map(Value::to_string), why });
    }
    if config.balloon_target_mib.is_some() && config.hugepages {
        let value = table.get("balloon_target_mib").map(Value::to_string);
        problems.push(Problem { key: "balloon_target_mib".into(), value, why: NO_BALLOON.to_owned() });
    }
    Ok((config, problems))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(text: &str) -> Vec<String> {
        match parse(text, Path::new("/c.toml")) {
            Err(ConfigError::Invalid { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_problem_is_reported_with_key_value_and_what_is_allowed() {
        let text = "accel = \"xen\"\nimage_dir = \"/d\"\nkernel = \"/k\"\nmemory_mib = 0\nmemroy = 1\nvcpus = -2\nballoon_target_mib = 64\nhugepages = true\n";
        assert_eq!(
            errors(text),
            [
                "accel = \"xen\": must be one of \"auto\", \"kvm\", \"tcg\"",
                "memory_mib = 0: memory must be greater than zero",
                &format!("memroy = 1: unknown key; the keys are {}", keys::names()),
                "vcpus = -2: vCPU count must be greater than zero",
                "image_dir = \"/d\": excludes kernel and initrd: set either image_dir or those",
                "balloon_target_mib = 64: a VM whose memory consists of huge pages (hugepages) does not give memory back",
            ]
        );
    }

    #[test]
    fn values_of_the_wrong_type_or_size_are_rejected() {
        let table = [
            ("vcpus = \"two\"", "must be an integer"),
            ("profile = \"fast\"", "must be one of \"latency\", \"low-latency\", \"throughput\""),
            ("vsock = \"tcp\"", "must be one of \"auto\", \"vhost-user\", \"vhost\""),
            ("vcpus = 1000", "a VM can have at most 64 vCPUs"),
            ("memory_mib = 1", "a guest needs at least 64 MiB"),
            ("hugepages = 1", "must be true or false"),
            ("debug = \"yes\"", "must be true or false"),
            ("kernel = \"vmlinux\"", "must be an absolute path"),
            ("qemu = \"\"", "must be a non-empty string"),
            ("vm_ids = \"nobody\"", "must be a string \"FIRST:COUNT\" of two numbers"),
            ("kernel_params = [\"init=/bin/sh\"]", "\"init=/bin/sh\" would replace husk's init"),
            ("kernel_params = [\"a b\"]", "\"a b\" is not a single kernel parameter"),
            ("metadata_key = \"key\"", "must be an absolute path"),
            ("token_lifetime_ms = 0", "must be a number of milliseconds greater than zero"),
            ("workspace_dir = \"../etc\"", "must be an absolute path"),
            ("boot_timeout_ms = 0", "must be a number of milliseconds greater than zero"),
            ("allowed_annotations = [\"io.husk.x\"]", "\"io.husk.x\" is not one of"),
        ];
        for (text, expected) in table {
            let errors = errors(text);
            assert!(errors.len() == 1 && errors[0].contains(expected), "{text}: {errors:?}");
        }
    }
}
