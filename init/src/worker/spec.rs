//! Checks a runtime spec before anything is created, and adapts it to this guest and to libcontainer. Pure.
//!
//! [`check`] reports everything that the guest cannot apply; [`adapt`] removes what has no meaning here and works
//! around libcontainer's limitations.

use std::path::Path;

use husk_protos::CONTAINERS_CGROUP;
use oci_spec::runtime::{
    Capability, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources, LinuxSeccomp, LinuxSeccompAction, Process, Spec,
};

use super::devices::{self, DeviceRule, DeviceType};
use super::executor::Workload;
use super::id_map;
use crate::error::{CallError, FailureKind};

/// Checks that the guest can apply a spec. Returns every problem, each beginning with the name of the field.
pub(super) fn check(spec: &Spec) -> Result<(), Vec<String>> {
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
        problems.extend(id_map::problem(mount));
    }
    match spec.linux() {
        Some(linux) => {
            if linux.intel_rdt().is_some() {
                problems.push("linux.intelRdt: the guest has no resctrl filesystem".into());
            }
            if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
                problems.push("linux.netDevices: the guest has no access to the host's network devices".into());
            }
            for namespace in linux.namespaces().iter().flatten() {
                // The guest's processes are in /proc; any other path is one of the host.
                if let Some(path) = namespace.path().as_ref().filter(|path| !path.starts_with("/proc")) {
                    let kind = namespace.typ();
                    problems.push(format!("linux.namespaces: {kind}: {} is not in the guest", path.display()));
                }
            }
            if let Some(propagation) = linux.rootfs_propagation().as_deref()
                && plain_propagation(propagation).is_none()
            {
                problems.push(format!("linux.rootfsPropagation: unknown propagation {propagation:?}"));
            }
            for device in linux.devices().iter().flatten() {
                // libcontainer creates devices nowhere else.
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

/// Returns the problems of a process, also for an exec.
pub(super) fn check_process(process: &Process) -> Vec<String> {
    let mut problems = Vec::new();
    if process.args().as_ref().is_none_or(|args| args.is_empty()) {
        problems.push("process.args: is empty".into());
    }
    for (index, entry) in process.env().iter().flatten().enumerate() {
        // The entry itself may be a secret.
        match entry.find('=') {
            None => problems.push(format!("process.env[{index}]: has no '='")),
            Some(0) => problems.push(format!("process.env[{index}]: has no name before the '='")),
            Some(_) => {}
        }
    }
    if !process.cwd().is_absolute() {
        problems.push(format!("process.cwd: {:?} is not absolute", process.cwd().display().to_string()));
    }
    problems
}

/// Checks that the spec and the request agree on whether the process has a terminal.
pub(super) fn check_terminal(process: Option<&Process>, requested: bool) -> Result<(), CallError> {
    let in_spec = process.and_then(|process| process.terminal()).unwrap_or(false);
    if in_spec == requested {
        return Ok(());
    }
    let what = format!("process.terminal: is {in_spec} in the spec, but {requested} in the request");
    Err(CallError::new(FailureKind::InvalidArgument, what))
}

/// libcontainer's name of a propagation. libcontainer sets the propagation of all mounts, so the recursive names mean
/// the same. Clients send both.
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
        problems.push("linux.seccomp: SCMP_ACT_NOTIFY needs a listener, which would be on the host".into());
    }
    if seccomp.listener_path().is_some() {
        problems.push("linux.seccomp.listenerPath: the path is on the host".into());
    }
    problems
}

/// Returns the device rules that cannot be applied. The host sends no other resources than those that libcgroups applies.
fn check_resources(resources: &LinuxResources) -> Vec<String> {
    resources.devices().iter().flatten().filter_map(|rule| device_rule(rule).err()).collect()
}

/// Returns the problems of an update for the container that was created from `spec`. Clients repeat the unchanged
/// resources, so a resource that cannot change is a problem only if it differs.
pub(super) fn check_update(spec: &Spec, resources: &LinuxResources) -> Vec<String> {
    let before = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    let mut problems = check_resources(resources);
    if resources.devices().as_ref().is_some_and(|rules| !rules.is_empty()) && resources.devices() != before.devices() {
        problems.push("linux.resources.devices: cannot change after the container's creation".into());
    }
    problems
}

/// Changes the spec so that libcontainer applies it as intended. Returns whether anything changed, and which parts were
/// ignored without effect on what the container may do.
pub(super) fn adapt(spec: &mut Spec, id: &str) -> (bool, Vec<String>) {
    let mut changed = false;
    let mut ignored = Vec::new();
    if let Some(process) = spec.process_mut() {
        changed |= adapt_process(process, &mut ignored);
    }
    if let Some(linux) = spec.linux_mut() {
        if linux.mount_label().is_some() {
            ignored.push("linux.mountLabel: the guest has no SELinux".into());
            linux.set_mount_label(None);
            changed = true;
        }
        let propagation = linux.rootfs_propagation().as_deref().and_then(plain_propagation).map(str::to_owned);
        if *linux.rootfs_propagation() != propagation {
            linux.set_rootfs_propagation(propagation);
            changed = true;
        }
        // The host's path has no meaning in the guest.
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
    // libcontainer rejects a profile if AppArmor is off, and does not support SELinux.
    if process.apparmor_profile().as_ref().is_some_and(|profile| !profile.is_empty()) {
        ignored.push("process.apparmorProfile: the guest has no AppArmor".into());
    }
    if process.selinux_label().as_ref().is_some_and(|label| !label.is_empty()) {
        ignored.push("process.selinuxLabel: the guest has no SELinux".into());
    }
    let labelled = process.apparmor_profile().is_some() || process.selinux_label().is_some();
    process.set_apparmor_profile(None).set_selinux_label(None);
    // If the field is present, even as false, libcontainer applies the seccomp filter after dropping privileges. The
    // kernel allows that only if the field is true.
    let explicit_false = process.no_new_privileges() == Some(false);
    if explicit_false {
        process.set_no_new_privileges(None);
    }
    labelled || explicit_false || ignored.len() > before
}

/// Like [`adapt`], for an exec's process. libcontainer does not apply the container's seccomp filter to execs, so the
/// workload does. Without no_new_privs this takes CAP_SYS_ADMIN, which the process receives and then drops.
pub(super) fn adapt_exec(
    process: &mut Process,
    seccomp: Option<LinuxSeccomp>,
    ignored: &mut Vec<String>,
) -> (bool, Workload) {
    let mut changed = adapt_process(process, ignored);
    let Some(seccomp) = seccomp else { return (changed, Workload::default()) };
    let mut lends_admin = false;
    if process.no_new_privileges() != Some(true)
        && let Some(mut capabilities) = process.capabilities().clone()
    {
        let mut effective = capabilities.effective().clone().unwrap_or_default();
        let mut permitted = capabilities.permitted().clone().unwrap_or_default();
        lends_admin = effective.insert(Capability::SysAdmin) | permitted.insert(Capability::SysAdmin);
        capabilities.set_effective(Some(effective)).set_permitted(Some(permitted));
        process.set_capabilities(Some(capabilities));
        changed |= lends_admin;
    }
    (changed, Workload::with_seccomp(seccomp, lends_admin))
}

/// The container's device rules, followed by the default ones. [`check`] has rejected invalid rules.
pub(super) fn device_rules(spec: &Spec) -> Vec<DeviceRule> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let own = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    own.iter().filter_map(|rule| device_rule(rule).ok()).flatten().chain(devices::DEFAULT).collect()
}

/// Returns `None` for a rule about FIFOs, which cgroups do not control.
fn device_rule(rule: &LinuxDeviceCgroup) -> Result<Option<DeviceRule>, String> {
    let device_type = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(DeviceType::Block),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(DeviceType::Char),
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
            other => return Err(format!("linux.resources.devices: {other:?} is not a kind of access")),
        };
    }
    // Type "a" covers all devices and ignores the numbers, as in the files of cgroup v1, which config-linux.md follows.
    let numbered = device_type.is_some();
    let major = number("major", rule.major())?.filter(|_| numbered);
    let minor = number("minor", rule.minor())?.filter(|_| numbered);
    Ok(Some(DeviceRule { allow: rule.allow(), device_type, major, minor, access }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The parts that this guest evaluates of the spec that containerd 1.6 to 2.x generates for `ctr run`.
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
                {
                    "destination": "/run", "type": "tmpfs", "source": "tmpfs",
                    "options": ["nosuid", "mode=755", "size=65536k"]
                }
            ],
            "linux": {
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "cgroupsPath": "/default/x",
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}
                ],
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
    fn the_spec_of_ctr_run_is_accepted() {
        let spec: Spec = serde_json::from_value(default_spec()).unwrap();
        assert_eq!(check(&spec), Ok(()));
    }

    #[test]
    fn each_unsupported_field_is_rejected_by_name() {
        let cases = [
            ("/ociVersion", json!("2.0.0"), "ociVersion: \"2.0.0\" is not 1.x"),
            ("/process/args", json!([]), "process.args: is empty"),
            ("/process/cwd", json!("tmp"), "process.cwd: \"tmp\" is not absolute"),
            ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt: the guest has no resctrl filesystem"),
            ("/linux/rootfsPropagation", json!("rsalve"), "linux.rootfsPropagation: unknown propagation \"rsalve\""),
            (
                "/linux/devices",
                json!([{"path": "/run/zero", "type": "c", "major": 1, "minor": 5}]),
                "linux.devices: /run/zero is not below /dev",
            ),
            (
                "/linux/namespaces",
                json!([{"type": "network", "path": "/var/run/netns/cni-1"}]),
                "linux.namespaces: net: /var/run/netns/cni-1 is not in the guest",
            ),
            (
                "/linux/seccomp",
                json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]
                }),
                "linux.seccomp: SCMP_ACT_NOTIFY needs a listener, which would be on the host",
            ),
            (
                "/linux/resources/devices",
                json!([{"allow": true, "type": "c", "major": 5_000_000_000i64, "access": "r"}]),
                "linux.resources.devices: major 5000000000 is not a device number",
            ),
            (
                "/linux/resources/devices",
                json!([{"allow": true, "access": "rx"}]),
                "linux.resources.devices: 'x' is not a kind of access",
            ),
            (
                "/mounts",
                json!([{"destination": "/data", "type": "bind", "source": "/x", "options": ["bind", "idmap"]}]),
                "mounts: /data cannot be ID-mapped: it is not on a disk",
            ),
        ];
        for (pointer, value, expected) in cases {
            assert_eq!(check(&with(pointer, value)), Err(vec![expected.to_owned()]), "{pointer}");
        }
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let mut spec = default_spec();
        spec["process"] = Value::Null;
        spec["root"] = Value::Null;
        spec["linux"] = Value::Null;
        let spec: Spec = serde_json::from_value(spec).unwrap();
        assert_eq!(check(&spec).unwrap_err(), ["process: is missing", "root: is missing", "linux: is missing"]);
    }

    #[test]
    fn fields_that_libcontainer_mishandles_are_adapted() {
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
        assert_eq!(adapt(&mut spec, "x"), (false, vec![]), "an adapted spec changed again");
    }

    #[test]
    fn an_exec_receives_the_filter_and_drops_cap_sys_admin_after_applying_it() {
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
    fn an_update_may_repeat_unchanged_resources() {
        let same = json!({"devices": [{"allow": false, "access": "rwm"}]});
        let spec = with("/linux/resources", same.clone());
        let check = |resources: Value| check_update(&spec, &serde_json::from_value(resources).unwrap());
        assert_eq!(check(same), [""; 0]);
        assert_eq!(check(json!({"devices": []})), [""; 0]);
        let problems = check(json!({"devices": [{"allow": true, "access": "r"}]}));
        assert_eq!(problems, ["linux.resources.devices: cannot change after the container's creation"]);
    }

    #[test]
    fn device_rules_are_converted_with_their_wildcards() {
        let rule = |value| device_rule(&serde_json::from_value(value).unwrap()).unwrap();
        let all = DeviceRule { allow: false, device_type: None, major: None, minor: None, access: devices::ALL };
        assert_eq!(rule(json!({"allow": false, "access": "rwm"})), Some(all));
        assert_eq!(rule(json!({"allow": false})), Some(all));
        assert_eq!(rule(json!({"allow": false, "type": "a", "major": 8, "minor": 1})), Some(all));
        assert_eq!(
            rule(json!({"allow": true, "type": "b", "major": 8, "minor": -1, "access": "r"})),
            Some(DeviceRule {
                allow: true,
                device_type: Some(DeviceType::Block),
                major: Some(8),
                minor: None,
                access: devices::READ
            })
        );
        assert_eq!(rule(json!({"allow": true, "type": "p", "major": 1, "minor": 1})), None);
    }
}
