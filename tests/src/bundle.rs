//! Bundles as containerd writes them. The spec is the default of containerd's clients; each test modifies it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use containerd_shim_protos::api::Mount;
use serde_json::{Value, json};

use crate::containerd::{Containerd, NAMESPACE};
use crate::fifo;

/// Capabilities of containerd's default spec (containerd, oci/spec.go, `defaultUnixCaps`).
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// The process part of a spec, for a container's init or an exec.
pub fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": true,
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
    })
}

/// The default spec of a container that runs `args`.
pub fn spec(id: &str, args: &[&str]) -> Value {
    let device = |kind: &str, major: i64, minor: Option<i64>| json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": "rwm"});
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.0.2",
        "process": process(args),
        "root": {"path": "rootfs"},
        "hostname": "husk-test",
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/run", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["ro", "nosuid", "noexec", "nodev"]},
        ],
        "linux": {
            "cgroupsPath": format!("/{NAMESPACE}/{id}"),
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                device("c", 1, Some(3)), device("c", 1, Some(8)), device("c", 1, Some(7)), device("c", 5, Some(0)),
                device("c", 1, Some(5)), device("c", 1, Some(9)), device("c", 5, Some(1)), device("c", 136, None),
                device("c", 5, Some(2)),
            ]},
        },
    })
}

/// Appends to a list of a spec, which must exist.
pub fn append(spec: &mut Value, pointer: &str, values: impl IntoIterator<Item = Value>) {
    match spec.pointer_mut(pointer).and_then(Value::as_array_mut) {
        Some(list) => list.extend(values),
        None => panic!("the spec has no list {pointer}"),
    }
}

/// A bundle directory in a containerd's private `/run`, and its rootfs mounts.
pub struct Bundle {
    /// Container id.
    pub id: String,
    /// Path as the shim sees it.
    pub path: PathBuf,
    /// Path as the test sees it.
    pub outside: PathBuf,
    /// The shim's log: containerd creates this fifo in each bundle.
    pub log: fifo::Reader,
    /// The `rootfs` of the Create request: an overlay over the test image, as containerd's default snapshotter makes
    /// it.
    pub rootfs: Vec<Mount>,
}

impl Bundle {
    /// Writes the bundle directory with its `config.json`.
    pub fn write(containerd: &Containerd, id: &str, spec: &Value) -> Result<Self> {
        let path = Path::new("/run/bundles").join(id);
        let outside = containerd.path(&path);
        for folder in ["rootfs", "upper", "work"] {
            fs::create_dir_all(outside.join(folder)).with_context(|| format!("bundle folder {}", outside.display()))?;
        }
        fs::write(outside.join("config.json"), serde_json::to_vec_pretty(spec)?)?;
        let log = fifo::Reader::make(&outside.join("log"))?;
        let lower = containerd.unpacked_image()?;
        let rootfs = Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("lowerdir={lower}"),
                format!("upperdir={}", path.join("upper").display()),
                format!("workdir={}", path.join("work").display()),
            ],
            ..Default::default()
        };
        Ok(Self { id: id.to_owned(), path, outside, log, rootfs: vec![rootfs] })
    }
}
