//! Rewrites a container's OCI runtime spec from the host's terms to the guest's. Pure: what has to be looked up on the
//! host is asked through [`Context::inspect`].
//!
//! What cannot be meant in a guest is refused by name, all of it at once; what only makes sense on the host and loses
//! nothing by going is removed with a note.

mod host_hooks;
mod namespaces;
pub mod parse;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::host::hooks::Hooks;
use husk_protos::SHARE_PATH;
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, Mount, Spec};

/// Where the guest keeps the cgroups of containers, below its hierarchy.
const GUEST_CGROUPS: &str = "/containers";
/// Microseconds: the kernel's period for a quota that names none (cgroup-v2.rst, `cpu.max`).
const DEFAULT_CPU_PERIOD: u64 = 100_000;
/// Filesystems that need nothing from the host, so that the guest's kernel can mount them as the spec says.
const KERNEL_FILESYSTEMS: [&str; 15] = [
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "proc",
    "ramfs",
    "securityfs",
    "sysfs",
    "tmpfs",
];
/// Character devices that every kernel has under the same numbers (devices.txt of the kernel), and so the guest's.
const GUEST_DEVICES: [(i64, i64, &str); 11] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (1, 11, "/dev/kmsg"),
    (5, 0, "/dev/tty"),
    (5, 1, "/dev/console"),
    (5, 2, "/dev/ptmx"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
];

/// What is at a path on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Dir,
    /// A regular file.
    File,
    /// A character device.
    CharDevice {
        /// Its driver's number.
        major: i64,
        /// Its number within the driver.
        minor: i64,
    },
    /// A block device.
    BlockDevice,
    /// A unix socket.
    Socket,
    /// A fifo.
    Fifo,
}

/// A path of the host after its links were followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Absolute, without links.
    pub path: PathBuf,
    /// What is there.
    pub kind: Kind,
}

/// What the rewriting needs to know beside the spec.
pub struct Context<'a> {
    /// The container's id, checked before.
    pub id: &'a str,
    /// The bundle's folder: relative paths of the spec start there.
    pub bundle: &'a Path,
    /// Whether the host has cgroup v2 alone.
    pub host_is_unified: bool,
    /// Looks a path up on the host, following links.
    pub inspect: &'a dyn Fn(&Path) -> io::Result<Source>,
    /// Whether a pid is that of the init of one of the sandbox's containers, in the guest.
    pub is_init: &'a dyn Fn(u32) -> bool,
}

/// A folder or file of the host that goes beside the container's root in the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Its place in the spec's `mounts`, and its name in the share.
    pub index: usize,
    /// What is bound, without links.
    pub source: PathBuf,
    /// Whether it is a folder; otherwise it is a regular file.
    pub is_dir: bool,
    /// The guest must not be able to write to it, nor to what is mounted below it.
    pub read_only: bool,
    /// With what is mounted below it.
    pub recursive: bool,
    /// What the host mounts below the source later is to appear (slave propagation).
    pub follows_host: bool,
}

/// What the spec allows the container, as a hint for the VM's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Whole CPUs, rounded up from quota and period.
    pub cpus: Option<u32>,
}

/// A spec for the guest, and what the host has to do for it.
#[derive(Clone, Debug)]
pub struct Rewritten {
    /// For the guest.
    pub spec: Spec,
    /// What to bind, in the order of the spec's mounts.
    pub binds: Vec<Bind>,
    /// The root folder that the spec names on the host: used when containerd gives no mounts.
    pub rootfs: PathBuf,
    /// The cgroup that the spec names on the host.
    pub cgroups_path: Option<String>,
    /// What the spec allows.
    pub limits: Limits,
    /// The hooks that the host runs.
    pub hooks: Hooks,
    /// What was changed or left out, for the log.
    pub notes: Vec<String>,
}

/// Something in a spec that cannot be done in a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field, as a path from the spec's root.
    pub field: String,
    /// Its value, if it has one to show.
    pub value: Option<String>,
    /// What is wrong with it.
    pub why: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} {value:?}: {}", self.field, self.why),
            None => write!(f, "{}: {}", self.field, self.why),
        }
    }
}

/// All that is wrong with one spec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct Problems(pub Vec<Problem>);

/// Where the guest finds the root of container `id`.
pub fn guest_rootfs(id: &str) -> PathBuf {
    [SHARE_PATH, id, "rootfs"].iter().collect()
}

/// Where the guest finds the source of the container's mount number `index`.
pub fn guest_bind(id: &str, index: usize) -> PathBuf {
    [SHARE_PATH, id, "mounts", &index.to_string()].iter().collect()
}

/// Rewrites `spec` for the guest.
///
/// # Errors
/// All problems at once.
pub fn rewrite(spec: Spec, context: &Context<'_>) -> Result<Rewritten, Problems> {
    let mut work = Work { context, problems: Vec::new(), notes: Vec::new(), binds: Vec::new() };
    let rewritten = work.rewrite(spec);
    match (rewritten, work.problems.is_empty()) {
        (Some(rewritten), true) => Ok(Rewritten { binds: work.binds, notes: work.notes, ..rewritten }),
        _ => Err(Problems(work.problems)),
    }
}

struct Work<'a> {
    context: &'a Context<'a>,
    problems: Vec<Problem>,
    notes: Vec<String>,
    binds: Vec<Bind>,
}

impl Work<'_> {
    fn refuse(&mut self, field: impl Into<String>, value: Option<&str>, why: impl Into<String>) {
        self.problems.push(Problem { field: field.into(), value: value.map(Into::into), why: why.into() });
    }

    fn refuse_path(&mut self, field: impl Into<String>, value: &Path, why: impl Into<String>) {
        self.refuse(field, Some(&value.to_string_lossy()), why);
    }

    fn rewrite(&mut self, mut spec: Spec) -> Option<Rewritten> {
        let other_systems = [
            ("windows", spec.windows().is_some()),
            ("solaris", spec.solaris().is_some()),
            ("zos", spec.zos().is_some()),
        ];
        for (field, _) in other_systems.iter().filter(|(_, present)| *present) {
            self.refuse(*field, None, "only Linux containers can be run");
        }
        if spec.vm().is_some() {
            self.refuse("vm", None, "the VM is configured by husk's own file and annotations, not by the spec");
        }
        let hooks = self.host_hooks(&mut spec);
        self.process(&mut spec);
        let mut mounts = spec.mounts_mut().take().unwrap_or_default();
        for (index, mount) in mounts.iter_mut().enumerate() {
            self.mount(index, mount);
        }
        let has_cgroup_mount = mounts.iter().any(|m| matches!(m.typ().as_deref(), Some("cgroup" | "cgroup2")));
        spec.set_mounts(Some(mounts));

        let rootfs = match spec.root_mut() {
            Some(root) => {
                let host = self.context.bundle.join(root.path());
                root.set_path(guest_rootfs(self.context.id));
                Some(host)
            }
            None => {
                self.refuse("root", None, "is missing");
                None
            }
        };
        let Some(linux) = spec.linux_mut() else {
            self.refuse("linux", None, "is missing");
            return None;
        };
        let limits = limits_of(linux);
        let cgroups_path = linux.cgroups_path().as_ref().map(|path| path.to_string_lossy().into_owned());
        self.linux(linux, has_cgroup_mount);
        let rootfs = rootfs?;
        Some(Rewritten { spec, rootfs, cgroups_path, limits, hooks, binds: Vec::new(), notes: Vec::new() })
    }

    fn process(&mut self, spec: &mut Spec) {
        let Some(process) = spec.process_mut() else {
            self.refuse("process", None, "is missing");
            return;
        };
        // The guest's kernel has neither, and the host's could not see into the VM: nothing is protected by them that the
        // VM does not protect better.
        if let Some(profile) = process.apparmor_profile().clone() {
            process.set_apparmor_profile(None);
            self.notes.push(format!("process.apparmorProfile {profile:?}: left out, the VM is the confinement"));
        }
        if let Some(label) = process.selinux_label().clone() {
            process.set_selinux_label(None);
            self.notes.push(format!("process.selinuxLabel {label:?}: left out, the VM is the confinement"));
        }
    }

    fn mount(&mut self, index: usize, mount: &mut Mount) {
        if is_bind(mount) {
            self.bind(index, mount);
            return;
        }
        let field = format!("mounts[{index}].type");
        match mount.typ().as_deref() {
            Some(kind) if KERNEL_FILESYSTEMS.contains(&kind) => {}
            Some(kind) => {
                let known = KERNEL_FILESYSTEMS.join(", ");
                self.refuse(field, Some(kind), format!("in a VM, a mount is a bind or one of {known}"));
            }
            None => self.refuse(field, None, "is missing, and the options are not those of a bind mount"),
        }
    }

    fn bind(&mut self, index: usize, mount: &mut Mount) {
        let field = format!("mounts[{index}].source");
        let Some(source) = mount.source().clone() else {
            self.refuse(field, None, "is missing");
            return;
        };
        let found = match (self.context.inspect)(&self.context.bundle.join(&source)) {
            Ok(found) => found,
            Err(e) => return self.refuse_path(field, &source, format!("on the host: {e}")),
        };
        let is_dir = match found.kind {
            Kind::Dir => true,
            Kind::File => false,
            Kind::CharDevice { major, minor } => {
                match GUEST_DEVICES.iter().find(|(a, b, _)| (*a, *b) == (major, minor)) {
                    Some((_, _, path)) => {
                        mount.set_source(Some(path.into()));
                    }
                    None => self.refuse_path(field, &source, "a device of the host cannot be used in a VM"),
                }
                return;
            }
            Kind::BlockDevice => {
                return self.refuse_path(field, &source, "a device of the host cannot be used in a VM");
            }
            Kind::Socket | Kind::Fifo => {
                let what = if found.kind == Kind::Socket { "socket" } else { "fifo" };
                let why = format!(
                    "a {what} of the host has nobody at its other end in a VM; bind the folder of a file instead"
                );
                return self.refuse_path(field, &source, why);
            }
        };
        let options = mount.options().as_deref().unwrap_or_default();
        let last_of = |names: &[&str]| options.iter().rfind(|o| names.contains(&o.as_str())).map(String::as_str);
        let propagation =
            last_of(&["private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"]);
        if let Some(shared @ ("shared" | "rshared")) = propagation {
            self.notes.push(format!(
                "mounts[{index}].options {shared:?}: the host's later mounts appear in the container, its own stay in the VM"
            ));
        }
        self.binds.push(Bind {
            index,
            source: found.path,
            is_dir,
            read_only: matches!(last_of(&["ro", "rw"]), Some("ro")) || matches!(last_of(&["rro", "rrw"]), Some("rro")),
            recursive: !options.iter().any(|o| o == "bind") || options.iter().any(|o| o == "rbind"),
            follows_host: matches!(propagation, Some("slave" | "rslave" | "shared" | "rshared")),
        });
        mount.set_source(Some(guest_bind(self.context.id, index)));
    }

    fn linux(&mut self, linux: &mut Linux, has_cgroup_mount: bool) {
        linux.set_cgroups_path(Some([GUEST_CGROUPS, self.context.id].iter().collect()));
        if let Some(label) = linux.mount_label_mut().take() {
            self.notes.push(format!("linux.mountLabel {label:?}: left out, the VM is the confinement"));
        }
        if linux.intel_rdt().is_some() {
            self.refuse(
                "linux.intelRdt",
                None,
                "the host's cache and memory bandwidth cannot be divided from inside a VM",
            );
        }
        for name in linux.net_devices().iter().flat_map(|devices| devices.keys()) {
            self.refuse("linux.netDevices", Some(name), "a network device of the host cannot be moved into a VM");
        }
        let mut namespaces = linux.namespaces_mut().take().unwrap_or_default();
        for namespace in &mut namespaces {
            // As good as none, and some clients write it.
            if namespace.path().as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
                namespace.set_path(None);
            }
        }
        for (index, namespace) in namespaces.iter().enumerate() {
            let Some(path) = namespace.path() else { continue };
            if let Some(why) = namespaces::problem(namespace.typ(), path, self.context.is_init) {
                self.refuse_path(format!("linux.namespaces[{index}].path"), path, why);
            }
        }
        // On v1, a container without a cgroup namespace is shown its own part of each hierarchy. The guest has v2,
        // where only the namespace does that: without it, the mount would show the whole guest's cgroups.
        let has_cgroup_namespace = namespaces.iter().any(|ns| ns.typ() == LinuxNamespaceType::Cgroup);
        if has_cgroup_mount && !has_cgroup_namespace && !self.context.host_is_unified {
            let mut namespace = LinuxNamespace::default();
            namespace.set_typ(LinuxNamespaceType::Cgroup);
            namespaces.push(namespace);
            self.notes
                .push("linux.namespaces: a cgroup namespace was added, for a view of cgroups as on cgroup v1".into());
        }
        linux.set_namespaces(Some(namespaces));
        self.devices(linux);
    }

    fn devices(&mut self, linux: &mut Linux) {
        // Clients give a privileged container all of the host's devices. The guest's own are what it can have.
        let privileged = linux.resources().as_ref().and_then(|r| r.devices().as_ref()).is_some_and(|rules| {
            rules.last().is_some_and(|rule| {
                let any_kind = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
                rule.allow() && any_kind && rule.major().is_none_or(|n| n < 0) && rule.minor().is_none_or(|n| n < 0)
            })
        });
        let Some(devices) = linux.devices_mut().take() else { return };
        let (kept, others): (Vec<_>, Vec<_>) = devices.into_iter().enumerate().partition(|(_, d)| is_guests(d));
        if privileged && !others.is_empty() {
            self.notes
                .push(format!("linux.devices: {} devices of the host left out, the VM has not got them", others.len()));
        } else {
            for (index, device) in &others {
                let why = format!(
                    "device {} {}:{} of the host cannot be used in a VM",
                    device.typ().as_str(),
                    device.major(),
                    device.minor()
                );
                self.refuse_path(format!("linux.devices[{index}].path"), device.path(), why);
            }
        }
        linux.set_devices(Some(kept.into_iter().map(|(_, device)| device).collect()));
    }
}

/// A fifo among `devices` is made anew in the container, so it is never the host's.
fn is_guests(device: &LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => {
            GUEST_DEVICES.iter().any(|(major, minor, _)| (*major, *minor) == (device.major(), device.minor()))
        }
        LinuxDeviceType::A | LinuxDeviceType::B => false,
    }
}

/// As runc and the guest's libcontainer tell a bind mount.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

fn limits_of(linux: &Linux) -> Limits {
    let Some(resources) = linux.resources() else { return Limits::default() };
    let memory = resources.memory().and_then(|memory| memory.limit());
    let cpus = resources.cpu().as_ref().and_then(|cpu| {
        let quota = u64::try_from(cpu.quota()?).ok().filter(|&quota| quota > 0)?;
        let period = cpu.period().filter(|&period| period > 0).unwrap_or(DEFAULT_CPU_PERIOD);
        u32::try_from(quota.div_ceil(period)).ok()
    });
    // Zero and -1 mean no limit.
    Limits { memory: memory.and_then(|limit| u64::try_from(limit).ok()).filter(|&limit| limit > 0), cpus }
}

#[cfg(test)]
mod tests;
