//! The options of the runtime in containerd's configuration, which arrive with `start`, with Create and with `-info`.
//!
//! Clients send runc's options, or those of a runtime that containerd does not know. Each option is applied, has
//! nothing to do here, or is rejected with its value: [`FATES`].

use std::path::PathBuf;

use containerd_shim_protos::shim::oci;
use husk_protos::runtime_options;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, UnknownValueRef};

/// The name of the message with runc's options.
const RUNC: &str = "containerd.runc.v1.Options";
/// The name of the message with the options of other runtimes.
const GENERIC: &str = "runtimeoptions.v1.Options";
/// The number that `criu_path` had in runc's options until containerd 2.0.
const CRIU_PATH: u32 = 8;
/// Most characters of a value that a message shows.
const SHOWN: usize = 200;

/// What becomes of an option that is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Applied,
    /// The log says why it changes nothing.
    Ignored(&'static str),
    /// containerd uses it itself.
    Containerds,
    Rejected(&'static str),
}

/// runc's options by the names that containerd's configuration uses (containerd, api/types/runc/options/oci.proto), and
/// those of other runtimes (api/types/runtimeoptions/v1/api.proto).
const FATES: &[(&str, Fate)] = &[
    ("NoPivotRoot", Fate::Ignored("the guest can always pivot to the container's root")),
    ("NoNewKeyring", Fate::Ignored("husk creates no keyring for a container")),
    ("ShimCgroup", Fate::Applied),
    ("IoUid", Fate::Ignored("the user of a process owns its streams")),
    ("IoGid", Fate::Ignored("the user of a process owns its streams")),
    ("BinaryName", Fate::Rejected("husk does not run an OCI runtime's program")),
    ("Root", Fate::Rejected("husk keeps its state in /run/husk")),
    ("CriuPath", Fate::Rejected("husk does not support checkpoints")),
    ("SystemdCgroup", Fate::Ignored("husk creates the cgroup that the spec names, also one of systemd's, itself")),
    ("CriuImagePath", Fate::Rejected("husk does not support checkpoints")),
    ("CriuWorkPath", Fate::Rejected("husk does not support checkpoints")),
    ("TaskApiAddress", Fate::Containerds),
    ("TaskApiVersion", Fate::Containerds),
    ("TypeUrl", Fate::Ignored("husk's configuration file has only one form")),
    ("ConfigPath", Fate::Applied),
    ("ConfigBody", Fate::Applied),
];

/// The options that husk applies.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RuntimeOptions {
    /// The cgroup of the shim, which `start` moves it to.
    pub(crate) shim_cgroup: Option<String>,
    /// The configuration file that replaces the host's.
    pub(crate) config_path: Option<PathBuf>,
    /// What has nothing to do here, for the log.
    pub(crate) notes: Vec<String>,
}

/// An option that is set.
struct Given {
    name: String,
    value: String,
}

impl Given {
    fn new(name: &str, value: impl ToString) -> Self {
        Self { name: name.to_owned(), value: value.to_string() }
    }

    fn shown(&self) -> String {
        let value: String = self.value.chars().take(SHOWN).collect();
        format!("runtime option {} {value:?}", self.name)
    }
}

/// Reads options. None, or options without a type, mean no options.
///
/// # Errors
/// All problems at once.
pub(crate) fn read(options: Option<&Any>) -> Result<RuntimeOptions, Vec<String>> {
    let Some(options) = options.filter(|options| !options.type_url.is_empty() || !options.value.is_empty()) else {
        return Ok(RuntimeOptions::default());
    };
    let broken =
        |error: &dyn std::fmt::Display| vec![format!("runtime options of type {:?}: {error}", options.type_url)];
    let given = match options.type_url.rsplit('/').next().unwrap_or_default() {
        RUNC => runc(&oci::Options::parse_from_bytes(&options.value).map_err(|error| broken(&error))?),
        GENERIC => {
            let parsed = runtime_options::Options::parse_from_bytes(&options.value).map_err(|error| broken(&error))?;
            generic(parsed).map_err(|error| broken(&error))?
        }
        _ => return Err(broken(&format_args!("husk knows {RUNC} and {GENERIC}"))),
    };
    decide(&given)
}

fn decide(given: &[Given]) -> Result<RuntimeOptions, Vec<String>> {
    let mut options = RuntimeOptions::default();
    let mut problems = Vec::new();
    for one in given {
        match FATES.iter().find(|(name, _)| name.eq_ignore_ascii_case(&one.name)) {
            Some((name, Fate::Applied)) => match options.apply(name, &one.value) {
                Ok(()) => {}
                Err(why) => problems.push(format!("{}: {why}", one.shown())),
            },
            Some((_, Fate::Ignored(why))) => options.notes.push(format!("{}: {why}", one.shown())),
            Some((_, Fate::Containerds)) => {}
            Some((_, Fate::Rejected(why))) => problems.push(format!("{}: {why}", one.shown())),
            None => problems
                .push(format!("{}: unknown. Name a configuration file of husk with ConfigPath instead", one.shown())),
        }
    }
    if problems.is_empty() { Ok(options) } else { Err(problems) }
}

impl RuntimeOptions {
    fn apply(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        match name {
            "ShimCgroup" => self.shim_cgroup = Some(value.to_owned()),
            "ConfigPath" if !value.starts_with('/') => return Err("must be an absolute path"),
            "ConfigPath" => self.config_path = Some(value.into()),
            _ => {}
        }
        Ok(())
    }
}

/// The options that are set, and not at their defaults.
fn runc(options: &oci::Options) -> Vec<Given> {
    let mut given = Vec::new();
    let flags = [
        ("NoPivotRoot", options.no_pivot_root),
        ("NoNewKeyring", options.no_new_keyring),
        ("SystemdCgroup", options.systemd_cgroup),
    ];
    given.extend(flags.iter().filter(|(_, set)| *set).map(|(name, set)| Given::new(name, set)));
    let numbers = [("IoUid", options.io_uid), ("IoGid", options.io_gid), ("TaskApiVersion", options.task_api_version)];
    given.extend(numbers.iter().filter(|(_, number)| *number != 0).map(|(name, number)| Given::new(name, number)));
    let texts = [
        ("ShimCgroup", &options.shim_cgroup),
        ("BinaryName", &options.binary_name),
        ("Root", &options.root),
        ("CriuImagePath", &options.criu_image_path),
        ("CriuWorkPath", &options.criu_work_path),
        ("TaskApiAddress", &options.task_api_address),
    ];
    given.extend(texts.iter().filter(|(_, text)| !text.is_empty()).map(|(name, text)| Given::new(name, text)));
    if let Some(UnknownValueRef::LengthDelimited(path)) = options.special_fields.unknown_fields().get(CRIU_PATH) {
        given.push(Given::new("CriuPath", String::from_utf8_lossy(path)));
    }
    given
}

/// The options of a runtime that containerd does not know. If they name no file, they are the TOML of the options in
/// containerd's configuration: operators copy runc's there.
fn generic(options: runtime_options::Options) -> Result<Vec<Given>, toml::de::Error> {
    let mut given = Vec::new();
    for (name, text) in [("TypeUrl", options.type_url), ("ConfigPath", options.config_path)] {
        if !text.is_empty() {
            given.push(Given::new(name, text));
        }
    }
    let body: toml::Table = toml::from_str(&String::from_utf8_lossy(&options.config_body))?;
    for (name, value) in body {
        match value {
            toml::Value::Boolean(false) | toml::Value::Integer(0) => {}
            toml::Value::String(text) if text.is_empty() => {}
            toml::Value::String(text) => given.push(Given::new(&name, text)),
            other => given.push(Given::new(&name, other)),
        }
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, message: &impl Message) -> Any {
        Any { type_url: type_url.into(), value: message.write_to_bytes().unwrap(), ..Default::default() }
    }

    fn read_runc(options: oci::Options) -> Result<RuntimeOptions, Vec<String>> {
        read(Some(&any(RUNC, &options)))
    }

    fn read_body(body: &str) -> Result<RuntimeOptions, Vec<String>> {
        let options = runtime_options::Options { config_body: body.into(), ..Default::default() };
        read(Some(&any("types.containerd.io/runtimeoptions.v1.Options", &options)))
    }

    #[test]
    fn every_option_of_runc_is_decided() {
        use protobuf::MessageFull;
        for message in [oci::Options::descriptor(), runtime_options::Options::descriptor()] {
            for field in message.fields() {
                let name = field.name().replace('_', "");
                assert!(FATES.iter().any(|(known, _)| known.eq_ignore_ascii_case(&name)), "{name}");
            }
        }
        let mut full = oci::Options {
            no_pivot_root: true,
            no_new_keyring: true,
            shim_cgroup: "/shims".into(),
            io_uid: 7,
            io_gid: 8,
            systemd_cgroup: true,
            task_api_address: "unix:///a".into(),
            task_api_version: 3,
            ..Default::default()
        };
        let options = read_runc(full.clone()).unwrap();
        assert_eq!((options.shim_cgroup.as_deref(), options.notes.len()), (Some("/shims"), 5), "{options:?}");
        assert!(
            options.notes.contains(&"runtime option IoUid \"7\": the user of a process owns its streams".to_owned())
        );
        full.binary_name = "crun".into();
        full.root = "/run/runc".into();
        full.criu_image_path = "/i".into();
        full.criu_work_path = "/w".into();
        full.special_fields.mut_unknown_fields().add_length_delimited(CRIU_PATH, b"/usr/sbin/criu".to_vec());
        let problems = read_runc(full).unwrap_err();
        assert_eq!(problems.len(), 5, "{problems:?}");
        for expected in ["BinaryName \"crun\": ", "Root \"/run/runc\": ", "CriuPath \"/usr/sbin/criu\": "] {
            assert!(problems.iter().any(|problem| problem.contains(expected)), "{expected} in {problems:?}");
        }
    }

    #[test]
    fn options_are_found_by_their_type_and_other_types_are_rejected() {
        assert_eq!(read(None), Ok(RuntimeOptions::default()));
        assert_eq!(read(Some(&Any::new())), Ok(RuntimeOptions::default()));
        assert_eq!(read_runc(oci::Options::new()), Ok(RuntimeOptions::default()));
        let unknown = read(Some(&Any { type_url: "x/kata.Options".into(), ..Default::default() })).unwrap_err();
        assert!(unknown[0].starts_with("runtime options of type \"x/kata.Options\": husk knows "), "{unknown:?}");
        let broken = read(Some(&Any { type_url: RUNC.into(), value: vec![0xff; 3], ..Default::default() }));
        assert!(broken.unwrap_err()[0].starts_with("runtime options of type \"containerd.runc.v1.Options\": "));
    }

    #[test]
    fn a_configuration_file_or_runcs_options_in_toml_are_read() {
        let named = |path: &str| {
            let options = runtime_options::Options { config_path: path.into(), ..Default::default() };
            read(Some(&any(GENERIC, &options)))
        };
        assert_eq!(named("/etc/husk/large.toml").unwrap().config_path, Some("/etc/husk/large.toml".into()));
        assert_eq!(
            named("large.toml").unwrap_err(),
            ["runtime option ConfigPath \"large.toml\": must be an absolute path"]
        );
        let copied = read_body("SystemdCgroup = true\nNoPivotRoot = false\nBinaryName = \"\"\n").unwrap();
        assert_eq!(copied.notes.len(), 1, "{copied:?}");
        let problems = read_body("BinaryName = \"/usr/bin/crun\"\nmemory_mib = 100\n").unwrap_err();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems.iter().any(|problem| problem.contains("memory_mib \"100\": unknown")), "{problems:?}");
        assert!(read_body("= 1").unwrap_err()[0].starts_with("runtime options of type "));
    }
}
