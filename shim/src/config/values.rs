//! Checks of single values, shared by keys and annotations. An error says what is allowed.

use std::net::Ipv4Addr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use toml::Value;

use super::names::NAMES;
use super::settings::{AllowedSocket, MAX_VCPUS, MIN_MEMORY_MIB};
use crate::host::digest::Sha256Digest;

/// Upper limit of `pool`.
const MAX_POOL: u32 = 64;
/// Upper limit of `network_spare_nics`. Each takes a slot of the machine and memory of the guest.
pub(crate) const MAX_SPARE_NICS: u32 = 8;
/// Upper limit of `extras_max_mib`: extras stay in the guest's memory, and take as much of the host's memory while the
/// VM boots.
const MAX_EXTRAS_MIB: u64 = 4096;

/// Limits of `io.husk.scratch_mib`.
const SCRATCH_MIB: std::ops::RangeInclusive<u64> = 16..=16 << 20;

/// Limits of `virtiofsd_open_files`. Each open file takes about 1.5 KiB of the host's kernel memory, which a hostile
/// guest can fill. virtiofsd needs some 600 for itself.
const OPEN_FILES: std::ops::RangeInclusive<u64> = 2048..=1_048_576;

/// Limits of `layer_cache_mib`. A smaller one has no room for usual layers.
const LAYER_CACHE_MIB: std::ops::RangeInclusive<u64> = 16..=16_777_216;

/// Limits of `tcg_cache_mib`. The most is QEMU's. With less than the least, QEMU spends its time translating the same code
/// again.
const TCG_CACHE_MIB: std::ops::RangeInclusive<u64> = 16..=2048;

/// Checks a size of the cache of translated code.
pub(crate) fn tcg_cache_mib(size: i64) -> Result<u64, String> {
    let size = u64::try_from(size).ok().filter(|size| TCG_CACHE_MIB.contains(size));
    size.ok_or_else(|| format!("must be a number of MiB from {} to {}", TCG_CACHE_MIB.start(), TCG_CACHE_MIB.end()))
}

/// Checks a limit of open files.
pub(crate) fn open_files(limit: i64) -> Result<u64, String> {
    let limit = u64::try_from(limit).ok().filter(|limit| OPEN_FILES.contains(limit));
    limit.ok_or_else(|| format!("must be a number from {} to {}", OPEN_FILES.start(), OPEN_FILES.end()))
}

/// Checks the size of all images of layers.
pub(crate) fn layer_cache_mib(size: i64) -> Result<u64, String> {
    let size = u64::try_from(size).ok().filter(|size| LAYER_CACHE_MIB.contains(size));
    size.ok_or_else(|| format!("must be a number from {} to {}", LAYER_CACHE_MIB.start(), LAYER_CACHE_MIB.end()))
}

/// Checks a number of virtual CPUs.
pub(crate) fn vcpus(count: i64) -> Result<u32, String> {
    match u32::try_from(count) {
        Ok(0) | Err(_) if count <= 0 => Err("vCPU count must be greater than zero".to_owned()),
        Ok(count) if count <= MAX_VCPUS => Ok(count),
        _ => Err(format!("a VM can have at most {MAX_VCPUS} vCPUs")),
    }
}

/// Checks a memory size.
pub(crate) fn memory_mib(size: i64) -> Result<u64, String> {
    match u64::try_from(size) {
        Ok(0) | Err(_) => Err("memory must be greater than zero".to_owned()),
        Ok(size) if size >= MIN_MEMORY_MIB => Ok(size),
        Ok(_) => Err(format!("a guest needs at least {MIN_MEMORY_MIB} MiB")),
    }
}

/// Why a guest's memory has no target.
pub(super) const NO_BALLOON: &str = "a VM whose memory consists of huge pages (hugepages) does not give memory back";

/// Checks a number of VMs that wait.
pub(crate) fn pool(count: i64) -> Result<u32, String> {
    at_most(count, MAX_POOL).ok_or_else(|| format!("must be 0 to {MAX_POOL} VMs"))
}

/// Checks a number of spare network cards.
pub(crate) fn spare_nics(count: i64) -> Result<u32, String> {
    at_most(count, MAX_SPARE_NICS).ok_or_else(|| format!("must be a number from 0 to {MAX_SPARE_NICS}"))
}

fn at_most(count: i64, most: u32) -> Option<u32> {
    u32::try_from(count).ok().filter(|count| *count <= most)
}

/// Checks the size limit of extras.
pub(crate) fn extras_max_mib(size: i64) -> Result<u64, String> {
    let size = u64::try_from(size).ok().filter(|size| *size <= MAX_EXTRAS_MIB);
    size.ok_or_else(|| format!("must be a number of MiB from 0 to {MAX_EXTRAS_MIB}"))
}

/// Checks the size of a scratch disk. mke2fs makes no journal on smaller ones.
pub(crate) fn scratch_mib(size: i64) -> Result<u64, String> {
    let size = u64::try_from(size).ok().filter(|size| SCRATCH_MIB.contains(size));
    size.ok_or_else(|| format!("must be a number of MiB from {} to {}", SCRATCH_MIB.start(), SCRATCH_MIB.end()))
}

/// A list of folders.
pub(crate) fn folders(value: &Value) -> Result<Vec<PathBuf>, String> {
    let folder = |text: &str| {
        let path = PathBuf::from(text);
        if path.is_absolute() { Ok(path) } else { Err(format!("{text:?} is not an absolute path")) }
    };
    list(value)?.into_iter().map(folder).collect()
}

pub(crate) fn integer(value: &Value) -> Result<i64, String> {
    value.as_integer().ok_or_else(|| "must be an integer".to_owned())
}

pub(crate) fn boolean(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| "must be true or false".to_owned())
}

pub(crate) fn text(value: &Value) -> Result<&str, String> {
    value.as_str().filter(|text| !text.is_empty()).ok_or_else(|| "must be a non-empty string".to_owned())
}

/// Checks the name of a host in tokens. No DNS name is longer.
pub(crate) fn token_host(name: &str) -> Result<String, String> {
    let valid = name.len() <= 253 && !name.contains(char::is_control);
    valid.then(|| name.to_owned()).ok_or_else(|| "must have at most 253 bytes and no control characters".to_owned())
}

pub(crate) fn absolute(value: &Value) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(value)?);
    if path.is_absolute() { Ok(path) } else { Err("must be an absolute path".to_owned()) }
}

pub(crate) fn digest(value: &Value) -> Result<Sha256Digest, String> {
    Sha256Digest::parse(value.as_str().unwrap_or_default())
}

pub(crate) fn choice<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Result<T, String> {
    one_of(value.as_str(), choices)
}

/// The choice that `text` names.
pub(crate) fn one_of<T: Copy>(text: Option<&str>, choices: &[(&str, T)]) -> Result<T, String> {
    let found = text.and_then(|text| choices.iter().find(|(name, _)| *name == text));
    found.map(|(_, chosen)| *chosen).ok_or_else(|| {
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
        format!("must be one of {}", names.join(", "))
    })
}

pub(crate) fn milliseconds(value: &Value) -> Result<Duration, String> {
    match integer(value).map(u64::try_from)? {
        Ok(ms @ 1..) => Ok(Duration::from_millis(ms)),
        _ => Err("must be a number of milliseconds greater than zero".to_owned()),
    }
}

pub(crate) fn list(value: &Value) -> Result<Vec<&str>, String> {
    let items = value.as_array().and_then(|items| items.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    items.ok_or_else(|| "must be a list of strings".to_owned())
}

/// A list of husk's annotations.
pub(crate) fn annotations(value: &Value) -> Result<Vec<String>, String> {
    let names = list(value)?;
    match names.iter().find(|name| !NAMES.contains(name)) {
        Some(name) => Err(format!("{name:?} is not one of {}", NAMES.join(", "))),
        None => Ok(names.into_iter().map(str::to_owned).collect()),
    }
}

/// A list of IPv4 addresses.
pub(crate) fn addresses(value: &Value) -> Result<Vec<Ipv4Addr>, String> {
    let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is not an IPv4 address"));
    list(value)?.into_iter().map(parse).collect()
}

/// A list of sockets, and of folders of sockets, which end with a slash.
pub(crate) fn sockets(value: &Value) -> Result<Vec<AllowedSocket>, String> {
    let socket = |text: &str| {
        let path = Path::new(text);
        if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
            return Err(format!("{text:?} is not an absolute path without \"..\""));
        }
        let path = path.to_owned();
        Ok(if text.ends_with('/') { AllowedSocket::Below(path) } else { AllowedSocket::File(path) })
    };
    list(value)?.into_iter().map(socket).collect()
}
