//! The keys of the configuration, in one list: each with how its value is read and checked. What follows from it is the business of those who
//! read [`Config`].

use std::path::PathBuf;
use std::time::Duration;

use toml::Value;
use tracing::Level;

use crate::config::{Accel, Config, LEAST_MEMORY_MIB, MOST_VCPUS, Profile, Vsock, kernel_params};
use crate::vmm::Board;

/// MiB of extras, in the guest's memory, beyond which they are none.
const MOST_EXTRAS_MIB: u64 = 4096;

type Set = fn(&mut Config, &Value) -> Result<(), String>;

/// A key that may be given.
pub(crate) struct Key {
    /// Its name.
    pub(crate) name: &'static str,
    set: Set,
}

const fn key(name: &'static str, set: Set) -> Key {
    Key { name, set }
}

/// All that there are. The configuration is read by this list, and a test proves an effect for each of its entries.
pub(crate) const KEYS: [Key; 24] = [
    key("vcpus", |config, value| put(&mut config.vcpus, integer(value).and_then(vcpus).map(Some))),
    key("profile", |config, value| put(&mut config.profile, choice(value, &Profile::NAMES).map(Some))),
    key("memory_mib", |config, value| put(&mut config.memory_mib, integer(value).and_then(memory_mib).map(Some))),
    key("hugepages", |config, value| put(&mut config.hugepages, boolean(value))),
    key("kernel", |config, value| put(&mut config.kernel, absolute(value).map(Some))),
    key("initrd", |config, value| put(&mut config.initrd, absolute(value).map(Some))),
    key("image_dir", |config, value| put(&mut config.image_dir, absolute(value).map(Some))),
    key("accel", |config, value| {
        let choices = [("auto", Accel::Auto), ("kvm", Accel::Kvm), ("tcg", Accel::Tcg)];
        put(&mut config.accel, choice(value, &choices))
    }),
    key("vsock", |config, value| {
        let choices = [("auto", Vsock::Auto), ("vhost-user", Vsock::VhostUser), ("vhost", Vsock::Vhost)];
        put(&mut config.vsock, choice(value, &choices))
    }),
    key("machine", |config, value| {
        put(&mut config.board, choice(value, &[("microvm", Board::Microvm), ("q35", Board::Q35)]))
    }),
    key("qemu", |config, value| put(&mut config.qemu, text(value).map(PathBuf::from))),
    key("qemu_user", |config, value| put(&mut config.qemu_user, user(value))),
    key("virtiofsd", |config, value| put(&mut config.virtiofsd, absolute(value).map(Some))),
    key("kernel_params", |config, value| {
        put(&mut config.kernel_params, list(value).and_then(|words| kernel_params::check(&words)))
    }),
    key("debug", |config, value| put(&mut config.debug, boolean(value))),
    key("log_level", |config, value| {
        let levels = [
            ("error", Level::ERROR),
            ("warn", Level::WARN),
            ("info", Level::INFO),
            ("debug", Level::DEBUG),
            ("trace", Level::TRACE),
        ];
        put(&mut config.log_level, choice(value, &levels))
    }),
    key("boot_timeout_ms", |config, value| put(&mut config.boot_timeout, milliseconds(value))),
    key("call_timeout_ms", |config, value| put(&mut config.call_timeout, milliseconds(value))),
    key("heartbeat_interval_ms", |config, value| put(&mut config.heartbeat, milliseconds(value))),
    key("extras_max_mib", |config, value| put(&mut config.extras_max_mib, integer(value).and_then(extras_max_mib))),
    key("allowed_annotations", |config, value| put(&mut config.allowed_annotations, annotations(value))),
    key("metadata_key", |config, value| put(&mut config.tokens.key, absolute(value))),
    key("token_lifetime_ms", |config, value| put(&mut config.tokens.lifetime, milliseconds(value))),
    key("workspace_dir", |config, value| put(&mut config.workspace_dir, absolute(value).map(Some))),
];

fn put<T>(place: &mut T, read: Result<T, String>) -> Result<(), String> {
    *place = read?;
    Ok(())
}

/// Reads the value of the key `name` into its place.
///
/// # Errors
///
/// What is wrong with it, or what is allowed.
pub(crate) fn set(config: &mut Config, name: &str, value: &Value) -> Result<(), String> {
    match KEYS.iter().find(|key| key.name == name) {
        Some(key) => (key.set)(config, value),
        None => Err(format!("unknown key; there are {}", names())),
    }
}

/// The names of all, for messages.
pub(crate) fn names() -> String {
    KEYS.map(|key| key.name).join(", ")
}

/// Checks a count of virtual CPUs.
pub(crate) fn vcpus(count: i64) -> Result<u32, String> {
    match u32::try_from(count) {
        Ok(0) | Err(_) if count <= 0 => Err("vCPU count must be greater than zero".to_owned()),
        Ok(count) if count <= MOST_VCPUS => Ok(count),
        _ => Err(format!("at most {MOST_VCPUS} vCPUs are possible")),
    }
}

/// Checks a size of memory.
pub(crate) fn memory_mib(size: i64) -> Result<u64, String> {
    match u64::try_from(size) {
        Ok(0) | Err(_) => Err("memory must be greater than zero".to_owned()),
        Ok(size) if size >= LEAST_MEMORY_MIB => Ok(size),
        Ok(_) => Err(format!("a guest needs at least {LEAST_MEMORY_MIB} MiB")),
    }
}

/// Checks what extras may have. As much again of the host's memory is taken while a VM boots.
fn extras_max_mib(size: i64) -> Result<u64, String> {
    let size = u64::try_from(size).ok().filter(|size| *size <= MOST_EXTRAS_MIB);
    size.ok_or_else(|| format!("must be a number of MiB, {MOST_EXTRAS_MIB} at most"))
}

fn integer(value: &Value) -> Result<i64, String> {
    value.as_integer().ok_or_else(|| "must be a whole number".to_owned())
}

fn boolean(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| "must be true or false".to_owned())
}

fn text(value: &Value) -> Result<&str, String> {
    value.as_str().filter(|text| !text.is_empty()).ok_or_else(|| "must be a string, and not an empty one".to_owned())
}

fn absolute(value: &Value) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(value)?);
    if path.is_absolute() { Ok(path) } else { Err("must be an absolute path".to_owned()) }
}

fn choice<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Result<T, String> {
    one_of(value.as_str(), choices)
}

/// Checks a word of which there are few.
pub(crate) fn one_of<T: Copy>(text: Option<&str>, choices: &[(&str, T)]) -> Result<T, String> {
    let found = text.and_then(|text| choices.iter().find(|(name, _)| *name == text));
    found.map(|(_, chosen)| *chosen).ok_or_else(|| {
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
        format!("must be one of {}", names.join(", "))
    })
}

fn milliseconds(value: &Value) -> Result<Duration, String> {
    match integer(value).map(u64::try_from)? {
        Ok(ms @ 1..) => Ok(Duration::from_millis(ms)),
        _ => Err("must be a number of milliseconds greater than zero".to_owned()),
    }
}

fn list(value: &Value) -> Result<Vec<&str>, String> {
    let items = value.as_array().and_then(|items| items.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    items.ok_or_else(|| "must be a list of strings".to_owned())
}

fn annotations(value: &Value) -> Result<Vec<String>, String> {
    let names = list(value)?;
    match names.iter().find(|name| !crate::config::annotations::NAMES.contains(name)) {
        Some(name) => Err(format!("{name:?} is none of {}", crate::config::annotations::NAMES.join(", "))),
        None => Ok(names.into_iter().map(str::to_owned).collect()),
    }
}

fn user(value: &Value) -> Result<(u32, u32), String> {
    let ids = text(value)?.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    ids.ok_or_else(|| "must be a string UID:GID, both numbers".to_owned())
}
