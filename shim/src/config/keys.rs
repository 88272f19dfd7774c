//! The keys of the configuration file in one list, each with the function that checks its value and stores it in
//! [`Config`].

use std::path::PathBuf;

use toml::Value;
use tracing::Level;

use super::ids::IdRange;
use super::kernel_params;
use super::settings::{AccelMode, Config, HostPid, NetworkMode, Profile, RootfsMode, StreamMode, VsockMode};
use super::values::{
    absolute, addresses, annotations, boolean, choice, digest, extras_max_mib, folders, integer, layer_cache_mib, list,
    memory_mib, milliseconds, open_files, pool, scratch_mib, sockets, spare_nics, tcg_cache_mib, text, token_host,
    vcpus,
};
use crate::vmm::factory::boards;

type SetValue = fn(&mut Config, &Value) -> Result<(), String>;

/// A key of the configuration file.
pub(crate) struct ConfigKey {
    pub(crate) name: &'static str,
    set: SetValue,
}

const fn key(name: &'static str, set: SetValue) -> ConfigKey {
    ConfigKey { name, set }
}

/// All keys. A test in `prepare` shows an effect of each.
pub(crate) const KEYS: [ConfigKey; 53] = [
    key("vcpus", |config, value| put(&mut config.vcpus, integer(value).and_then(vcpus).map(Some))),
    key("max_vcpus", |config, value| put(&mut config.max_vcpus, integer(value).and_then(vcpus).map(Some))),
    key("profile", |config, value| put(&mut config.profile, choice(value, &Profile::NAMES).map(Some))),
    key("memory_mib", |config, value| put(&mut config.memory_mib, integer(value).and_then(memory_mib).map(Some))),
    key("max_memory_mib", |config, value| {
        put(&mut config.max_memory_mib, integer(value).and_then(memory_mib).map(Some))
    }),
    key("balloon_target_mib", |config, value| {
        put(&mut config.balloon_target_mib, integer(value).and_then(memory_mib).map(Some))
    }),
    key("hugepages", |config, value| put(&mut config.hugepages, boolean(value))),
    key("kernel", |config, value| put(&mut config.kernel, absolute(value).map(Some))),
    key("initrd", |config, value| put(&mut config.initrd, absolute(value).map(Some))),
    key("kernel_sha256", |config, value| put(&mut config.kernel_sha256, digest(value).map(Some))),
    key("initrd_sha256", |config, value| put(&mut config.initrd_sha256, digest(value).map(Some))),
    key("image_dir", |config, value| put(&mut config.image_dir, absolute(value).map(Some))),
    key("accel", |config, value| {
        let choices = [("auto", AccelMode::Auto), ("kvm", AccelMode::Kvm), ("tcg", AccelMode::Tcg)];
        put(&mut config.accel, choice(value, &choices))
    }),
    key("tcg_cache_mib", |config, value| {
        put(&mut config.tcg_cache_mib, integer(value).and_then(tcg_cache_mib).map(Some))
    }),
    key("vsock", |config, value| {
        let choices = [("auto", VsockMode::Auto), ("vhost-user", VsockMode::VhostUser), ("vhost", VsockMode::Vhost)];
        put(&mut config.vsock, choice(value, &choices))
    }),
    key("streams", |config, value| {
        put(&mut config.streams, choice(value, &[("raw", StreamMode::Raw), ("ttrpc", StreamMode::Ttrpc)]))
    }),
    key("machine", |config, value| put(&mut config.board, choice(value, &boards()))),
    key("qemu", |config, value| put(&mut config.qemu, text(value).map(PathBuf::from))),
    key("vm_ids", |config, value| put(&mut config.vm_ids, text(value).and_then(IdRange::parse))),
    key("virtiofsd", |config, value| put(&mut config.virtiofsd, absolute(value).map(Some))),
    key("virtiofsd_open_files", |config, value| put(&mut config.open_files, integer(value).and_then(open_files))),
    key("pool", |config, value| put(&mut config.pool.size, integer(value).and_then(pool))),
    key("pool_idle_ms", |config, value| put(&mut config.pool.idle, milliseconds(value))),
    key("pool_max_memory_mib", |config, value| {
        put(&mut config.pool.max_memory_mib, integer(value).and_then(memory_mib).map(Some))
    }),
    key("network_spare_nics", |config, value| put(&mut config.spare_nics, integer(value).and_then(spare_nics))),
    key("network", |config, value| put(&mut config.network, choice(value, &NetworkMode::NAMES))),
    key("port_addresses", |config, value| put(&mut config.port_addresses, addresses(value))),
    key("port_ranges", |config, value| put(&mut config.port_ranges, boolean(value))),
    key("host_pid", |config, value| {
        put(&mut config.host_pid, choice(value, &[("reject", HostPid::Reject), ("pod", HostPid::Pod)]))
    }),
    key("io_uring", |config, value| put(&mut config.io_uring, boolean(value))),
    key("user_namespaces", |config, value| put(&mut config.user_namespaces, boolean(value))),
    key("kernel_params", |config, value| {
        put(&mut config.kernel_params, list(value).and_then(|params| kernel_params::check(&params)))
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
    key("kill_timeout_ms", |config, value| put(&mut config.kill_timeout, milliseconds(value))),
    key("heartbeat_interval_ms", |config, value| put(&mut config.heartbeat, milliseconds(value))),
    key("extras_max_mib", |config, value| put(&mut config.extras_max_mib, integer(value).and_then(extras_max_mib))),
    key("allowed_annotations", |config, value| put(&mut config.allowed_annotations, annotations(value))),
    key("metadata_key", |config, value| put(&mut config.tokens.key, absolute(value))),
    key("token_lifetime_ms", |config, value| put(&mut config.tokens.lifetime, milliseconds(value))),
    key("token_host", |config, value| put(&mut config.tokens.host, text(value).and_then(token_host).map(Some))),
    key("workspace_dir", |config, value| put(&mut config.workspace_dir, absolute(value).map(Some))),
    key("volume_dirs", |config, value| put(&mut config.volume_dirs, folders(value))),
    key("direct_volume_dir", |config, value| put(&mut config.direct_volume_dir, absolute(value).map(Some))),
    key("rootfs", |config, value| put(&mut config.rootfs.mode, choice(value, &RootfsMode::NAMES))),
    key("overlay_mib", |config, value| put(&mut config.rootfs.overlay_mib, integer(value).and_then(scratch_mib))),
    key("copy_back_timeout_ms", |config, value| put(&mut config.rootfs.copy_back_timeout, milliseconds(value))),
    key("scratch_dir", |config, value| put(&mut config.scratch_dir, absolute(value))),
    key("layer_cache_dir", |config, value| put(&mut config.layer_cache_dir, absolute(value))),
    key("layer_cache_mib", |config, value| put(&mut config.layer_cache_mib, integer(value).and_then(layer_cache_mib))),
    key("sockets", |config, value| put(&mut config.sockets, sockets(value))),
];

fn put<T>(field: &mut T, checked: Result<T, String>) -> Result<(), String> {
    *field = checked?;
    Ok(())
}

/// Checks the value of the key `name` and stores it.
///
/// # Errors
///
/// The reason why the key or the value is invalid, and what is allowed.
pub(crate) fn set(config: &mut Config, name: &str, value: &Value) -> Result<(), String> {
    match KEYS.iter().find(|key| key.name == name) {
        Some(key) => (key.set)(config, value),
        None => Err(format!("unknown key; the keys are {}", names())),
    }
}

/// The names of all keys, for messages.
pub(crate) fn names() -> String {
    KEYS.map(|key| key.name).join(", ")
}
