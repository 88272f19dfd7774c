//! What of a runtime spec this guest can apply, decided before anything is made. Pure.
//!
//! [`check`] names everything that cannot be applied, at once; [`adapt`] takes out what has no meaning here and works around what
//! libcontainer takes amiss.

use std::path::Path;

use husk_protos::CONTAINERS_CGROUP;
use oci_spec::runtime::{
    Capability, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources, LinuxSeccomp, LinuxSeccompAction, Mount, Process,
    Spec,
};

use super::devices::{self, Kind, Rule};
use super::executor::Workload;
use crate::error::{self, Error};

/// Refuses a spec of which something cannot be applied.
///
/// # Errors
/// Every problem, each beginning with the name of the field.
pub fn check(spec: &Spec) -> Result<(), Vec<String>> {
    let mut problems = Vec::new();
    if !spec.version().starts_with("1.") {
        problems.push(format!("ociVersion: {:?} is not 1.x", spec.version()));
    }
    match spec.process() {
        Some(process) => problems.extend(check_process(process)),
        None => problems.push("process: is missing".into()),
    }
    if spec.root().is_none() {
        problems.push("root: is missing".into());
    }
    for mount in spec.mounts().iter().flatten() {
        problems.extend(check_mount(mount));
    }
    match spec.linux() {
        Some(linux) => {
            if linux.intel_rdt().is_some() {
                problems.push("linux.intelRdt: a guest has no resctrl file system".into());
            }
            if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
                problems.push("linux.netDevices: a guest has none of the host's network devices".into());
            }
            for namespace in linux.namespaces().iter().flatten() {
                // Every process of the guest is under /proc; any other path is the host's.
                if let Some(path) = namespace.path().as_ref().filter(|path| !path.starts_with("/proc")) {
                    let kind = namespace.typ();
                    problems
                        .push(format!("linux.namespaces: {kind} by the path {} is not in the guest", path.display()));
                }
            }
            if let Some(propagation) = linux.rootfs_propagation().as_deref()
                && plain_propagation(propagation).is_none()
            {
                problems.push(format!("linux.rootfsPropagation: {propagation:?} is not a propagation"));
            }
            for device in linux.devices().iter().flatten() {
                // libcontainer makes them nowhere else.
                if !device.path().starts_with("/dev") {
                    problems.push(format!("linux.devices: {} is not below /dev", device.path().display()));
                }
            }
            problems.extend(linux.seccomp().iter().flat_map(check_seccomp));
            problems.extend(linux.resources().iter().flat_map(check_resources));
        }
        None => problems.push("linux: is missing".into()),
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// What of a process cannot be applied; for an exec too.
pub fn check_process(process: &Process) -> Vec<String> {
    let mut problems = Vec::new();
    if process.args().as_ref().is_none_or(|args| args.is_empty()) {
        problems.push("process.args: is empty".into());
    }
    if !process.cwd().is_absolute() {
        problems.push(format!("process.cwd: {:?} is not absolute", process.cwd().display().to_string()));
    }
    problems
}

/// Refuses a process that says one thing about its terminal while the call that it came with says another.
///
/// # Errors
/// InvalidArgument.
pub fn check_terminal(process: Option<&Process>, asked: bool) -> Result<(), Error> {
    let wanted = process.and_then(|process| process.terminal()).unwrap_or(false);
    if wanted == asked {
        return Ok(());
    }
    let text = format!("process.terminal: is {wanted} in the spec, {asked} in the request");
    Err(Error::new(error::Kind::InvalidArgument, text))
}

fn check_mount(mount: &Mount) -> Option<String> {
    let by_option = mount.options().iter().flatten().any(|option| option == "idmap" || option == "ridmap");
    let by_mapping = mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
    (by_option || by_mapping)
        .then(|| format!("mounts: {} cannot be id-mapped on a share", mount.destination().display()))
}

/// The name that libcontainer knows it by. It sets that of all mounts at once, so the recursive names mean the same; clients send both.
fn plain_propagation(name: &str) -> Option<&'static str> {
    match name {
        "private" | "rprivate" => Some("private"),
        "shared" | "rshared" => Some("shared"),
        "slave" | "rslave" => Some("slave"),
        "unbindable" | "runbindable" => Some("unbindable"),
        _ => None,
    }
}

fn check_seccomp(seccomp: &LinuxSeccomp) -> Vec<String> {
    let mut problems = Vec::new();
    let notifies = seccomp.syscalls().iter().flatten().any(|one| one.action() == LinuxSeccompAction::ScmpActNotify);
    if notifies || seccomp.default_action() == LinuxSeccompAction::ScmpActNotify {
        problems.push("linux.seccomp: SCMP_ACT_NOTIFY needs a listener, which is on the host".into());
    }
    if seccomp.listener_path().is_some() {
        problems.push("linux.seccomp.listenerPath: is on the host".into());
    }
    problems
}

/// What libcgroups would leave out in silence. What it knows, it applies or fails by name.
fn check_resources(resources: &LinuxResources) -> Vec<String> {
    let mut problems = Vec::new();
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        problems.push("linux.resources.rdma: the guest has no rdma controller".into());
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some() || network.priorities().as_ref().is_some_and(|all| !all.is_empty()))
    {
        problems.push("linux.resources.network: cgroup v2 has no network controller".into());
    }
    if let Some(memory) = resources.memory() {
        if memory.kernel().is_some_and(|limit| limit > 0) || memory.kernel_tcp().is_some_and(|limit| limit > 0) {
            problems.push("linux.resources.memory.kernel: cgroup v2 has no limit of its own for it".into());
        }
        if memory.swappiness().is_some() {
            problems.push("linux.resources.memory.swappiness: cgroup v2 has none".into());
        }
        if memory.disable_oom_killer().unwrap_or(false) {
            problems.push("linux.resources.memory.disableOOMKiller: cgroup v2 cannot".into());
        }
    }
    for rule in resources.devices().iter().flatten() {
        problems.extend(device_rule(rule).err());
    }
    problems
}

/// What of an update cannot be applied to the container that was made from `spec`. Clients send all of its resources again with those that
/// they change: what cannot change, but is as it was, is no problem.
pub fn check_update(spec: &Spec, resources: &LinuxResources) -> Vec<String> {
    let before = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    let mut problems = check_resources(resources);
    if resources.devices().as_ref().is_some_and(|rules| !rules.is_empty()) && resources.devices() != before.devices() {
        problems.push("linux.resources.devices: cannot change while the container is there".into());
    }
    if resources.block_io().is_some() && resources.block_io() != before.block_io() {
        problems.push("linux.resources.blockIO: the host's devices are not the guest's".into());
    }
    problems
}

/// Makes the spec one that libcontainer applies as it is meant. Answers whether anything changed, and what was left out without
/// changing what the container may do.
pub fn adapt(spec: &mut Spec, id: &str) -> (bool, Vec<String>) {
    let mut changed = false;
    let mut ignored = Vec::new();
    if let Some(process) = spec.process_mut() {
        changed |= adapt_process(process, &mut ignored);
    }
    if let Some(linux) = spec.linux_mut() {
        if linux.mount_label().is_some() {
            ignored.push("linux.mountLabel: no SELinux in the guest".into());
            linux.set_mount_label(None);
            changed = true;
        }
        let propagation = linux.rootfs_propagation().as_deref().and_then(plain_propagation).map(str::to_owned);
        if *linux.rootfs_propagation() != propagation {
            linux.set_rootfs_propagation(propagation);
            changed = true;
        }
        // Where the init looks for the container's cgroup. The host's path has no meaning here.
        let path = Path::new(CONTAINERS_CGROUP).join(id);
        if linux.cgroups_path().as_ref() != Some(&path) {
            linux.set_cgroups_path(Some(path));
            changed = true;
        }
    }
    (changed, ignored)
}

fn adapt_process(process: &mut Process, ignored: &mut Vec<String>) -> bool {
    let before = ignored.len();
    // libcontainer refuses a profile where AppArmor is off, and knows no SELinux.
    if process.apparmor_profile().as_ref().is_some_and(|profile| !profile.is_empty()) {
        ignored.push("process.apparmorProfile: no AppArmor in the guest".into());
    }
    if process.selinux_label().as_ref().is_some_and(|label| !label.is_empty()) {
        ignored.push("process.selinuxLabel: no SELinux in the guest".into());
    }
    let labelled = process.apparmor_profile().is_some() || process.selinux_label().is_some();
    process.set_apparmor_profile(None).set_selinux_label(None);
    // libcontainer applies a filter as the unprivileged process if the field is there at all, and the kernel refuses that
    // unless it is true.
    let explicit_false = process.no_new_privileges() == Some(false);
    if explicit_false {
        process.set_no_new_privileges(None);
    }
    labelled || explicit_false || ignored.len() > before
}

/// Like [`adapt`], for an exec's process. libcontainer leaves execs without the container's filter, so the workload applies it: as the
/// process that it will be, or with the one capability that this takes, which it then drops.
pub fn adapt_exec(process: &mut Process, seccomp: Option<LinuxSeccomp>, ignored: &mut Vec<String>) -> (bool, Workload) {
    let mut changed = adapt_process(process, ignored);
    let Some(seccomp) = seccomp else { return (changed, Workload::default()) };
    let mut lent = false;
    if process.no_new_privileges() != Some(true)
        && let Some(mut capabilities) = process.capabilities().clone()
    {
        let mut effective = capabilities.effective().clone().unwrap_or_default();
        let mut permitted = capabilities.permitted().clone().unwrap_or_default();
        lent = effective.insert(Capability::SysAdmin) | permitted.insert(Capability::SysAdmin);
        capabilities.set_effective(Some(effective)).set_permitted(Some(permitted));
        process.set_capabilities(Some(capabilities));
        changed |= lent;
    }
    (changed, Workload::with_seccomp(seccomp, lent))
}

/// The container's device rules, with the ones that every container has. Rules that mean nothing were refused by [`check`].
pub fn device_rules(spec: &Spec) -> Vec<Rule> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let own = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    own.iter().filter_map(|rule| device_rule(rule).ok()).flatten().chain(devices::DEFAULT).collect()
}

/// None for a rule about fifos, which no cgroup ever decided on.
fn device_rule(rule: &LinuxDeviceCgroup) -> Result<Option<Rule>, String> {
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(Kind::Block),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(Kind::Char),
        Some(LinuxDeviceType::P) => return Ok(None),
    };
    let number = |name: &str, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => match u32::try_from(value) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(format!("linux.resources.devices: {name} {value} is not a device number")),
        },
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => devices::READ,
            'w' => devices::WRITE,
            'm' => devices::MKNOD,
            other => return Err(format!("linux.resources.devices: {other:?} is not an access")),
        };
    }
    // "a" stands for all devices, whatever the numbers beside it (config-linux.md follows the cgroup v1 files, where it does).
    let numbered = kind.is_some();
    let major = number("major", rule.major())?.filter(|_| numbered);
    let minor = number("minor", rule.minor())?.filter(|_| numbered);
    Ok(Some(Rule { allow: rule.allow(), kind, major, minor, access }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// What containerd 1.6 to 2.x generate for `ctr run`, as far as this guest looks at it.
    fn default_spec() -> Value {
        json!({
            "ociVersion": "1.0.2-dev",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/", "noNewPrivileges": true,
                "env": ["PATH=/usr/bin:/bin"],
                "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]}
            ],
            "linux": {
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "cgroupsPath": "/default/x",
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
                "maskedPaths": ["/proc/keys"], "readonlyPaths": ["/proc/sys"]
            }
        })
    }

    fn with(pointer: &str, value: Value) -> Spec {
        let mut spec = default_spec();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn what_containerd_generates_passes() {
        let spec: Spec = serde_json::from_value(default_spec()).unwrap();
        assert_eq!(check(&spec), Ok(()));
    }

    #[test]
    fn what_cannot_be_applied_is_refused_by_name() {
        let cases = [
            ("/ociVersion", json!("2.0.0"), "ociVersion: \"2.0.0\" is not 1.x"),
            ("/process/args", json!([]), "process.args: is empty"),
            ("/process/cwd", json!("tmp"), "process.cwd: \"tmp\" is not absolute"),
            ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt: a guest has no resctrl file system"),
            ("/linux/rootfsPropagation", json!("rsalve"), "linux.rootfsPropagation: \"rsalve\" is not a propagation"),
            (
                "/linux/devices",
                json!([{"path": "/run/zero", "type": "c", "major": 1, "minor": 5}]),
                "linux.devices: /run/zero is not below /dev",
            ),
            (
                "/linux/namespaces",
                json!([{"type": "network", "path": "/var/run/netns/cni-1"}]),
                "linux.namespaces: net by the path /var/run/netns/cni-1 is not in the guest",
            ),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}),
                "linux.seccomp: SCMP_ACT_NOTIFY needs a listener, which is on the host",
            ),
            (
                "/linux/resources/rdma",
                json!({"mlx5_1": {"hcaHandles": 3}}),
                "linux.resources.rdma: the guest has no rdma controller",
            ),
            (
                "/linux/resources/network",
                json!({"classID": 7}),
                "linux.resources.network: cgroup v2 has no network controller",
            ),
            (
                "/linux/resources/memory",
                json!({"swappiness": 10}),
                "linux.resources.memory.swappiness: cgroup v2 has none",
            ),
            (
                "/linux/resources/devices",
                json!([{"allow": true, "type": "c", "major": 5_000_000_000i64, "access": "r"}]),
                "linux.resources.devices: major 5000000000 is not a device number",
            ),
            (
                "/linux/resources/devices",
                json!([{"allow": true, "access": "rx"}]),
                "linux.resources.devices: 'x' is not an access",
            ),
            (
                "/mounts",
                json!([{"destination": "/data", "type": "bind", "source": "/x", "options": ["bind", "idmap"]}]),
                "mounts: /data cannot be id-mapped on a share",
            ),
        ];
        for (pointer, value, want) in cases {
            assert_eq!(check(&with(pointer, value)), Err(vec![want.to_owned()]), "{pointer}");
        }
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let mut spec = default_spec();
        spec["process"] = Value::Null;
        spec["root"] = Value::Null;
        spec["linux"] = Value::Null;
        let spec: Spec = serde_json::from_value(spec).unwrap();
        assert_eq!(check(&spec).unwrap_err(), ["process: is missing", "root: is missing", "linux: is missing"]);
    }

    #[test]
    fn what_libcontainer_takes_amiss_is_taken_out() {
        let mut spec = default_spec();
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["process"]["apparmorProfile"] = json!("cri-containerd.apparmor.d");
        spec["linux"]["mountLabel"] = json!("system_u:object_r:svirt_t");
        spec["linux"]["rootfsPropagation"] = json!("rslave");
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let (changed, ignored) = adapt(&mut spec, "x");
        let process = spec.process().as_ref().unwrap();
        assert!(changed);
        assert_eq!(ignored.len(), 2, "{ignored:?}");
        assert_eq!((process.no_new_privileges(), process.apparmor_profile()), (None, &None));
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/containers/x")));
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("slave"));
        assert_eq!(adapt(&mut spec, "x"), (false, vec![]), "once is enough");
    }

    #[test]
    fn an_exec_gets_the_filter_and_only_as_long_as_needed_the_right_to_apply_it() {
        let seccomp: LinuxSeccomp = serde_json::from_value(json!({"defaultAction": "SCMP_ACT_ALLOW"})).unwrap();
        let process = |spec: Value| -> Process { serde_json::from_value(spec["process"].clone()).unwrap() };
        let admin = |process: &Process| {
            let capabilities = process.capabilities().as_ref().unwrap();
            capabilities.effective().as_ref().unwrap().contains(&Capability::SysAdmin)
        };

        let mut unprivileged = process(default_spec());
        let (changed, workload) = adapt_exec(&mut unprivileged, Some(seccomp.clone()), &mut vec![]);
        assert!(!changed && workload.seccomp.is_some() && !workload.drop_admin && !admin(&unprivileged));

        let mut spec = default_spec();
        spec["process"]["noNewPrivileges"] = json!(false);
        let mut privileged = process(spec);
        let (changed, workload) = adapt_exec(&mut privileged, Some(seccomp), &mut vec![]);
        assert!(changed && workload.drop_admin && admin(&privileged));

        let (_, workload) = adapt_exec(&mut process(default_spec()), None, &mut vec![]);
        assert!(workload.seccomp.is_none() && !workload.drop_admin);
    }

    #[test]
    fn an_update_may_repeat_what_cannot_change() {
        let spec = with(
            "/linux/resources",
            json!({"devices": [{"allow": false, "access": "rwm"}], "blockIO": {"weight": 10}}),
        );
        let check = |resources: Value| check_update(&spec, &serde_json::from_value(resources).unwrap());
        assert_eq!(check(json!({"devices": [{"allow": false, "access": "rwm"}], "blockIO": {"weight": 10}})), [""; 0]);
        assert_eq!(check(json!({"devices": []})), [""; 0]);
        let changed =
            json!({"devices": [{"allow": true, "access": "r"}], "blockIO": {"weight": 9}, "network": {"classID": 1}});
        let problems = check(changed);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[1].starts_with("linux.resources.devices: "), "{problems:?}");
    }

    #[test]
    fn device_rules_mean_what_they_say() {
        let rule = |value| device_rule(&serde_json::from_value(value).unwrap()).unwrap();
        let all = Rule { allow: false, kind: None, major: None, minor: None, access: devices::ALL };
        assert_eq!(rule(json!({"allow": false, "access": "rwm"})), Some(all));
        assert_eq!(rule(json!({"allow": false})), Some(all));
        assert_eq!(rule(json!({"allow": false, "type": "a", "major": 8, "minor": 1})), Some(all));
        assert_eq!(
            rule(json!({"allow": true, "type": "b", "major": 8, "minor": -1, "access": "r"})),
            Some(Rule { allow: true, kind: Some(Kind::Block), major: Some(8), minor: None, access: devices::READ })
        );
        assert_eq!(rule(json!({"allow": true, "type": "p", "major": 1, "minor": 1})), None);
    }
}
