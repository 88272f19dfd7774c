//! What of the runtime spec a container can use, as the spec's features document (features.md). Pure.

use serde_json::{Value, json};

use super::mount_options::supported_options;

/// The type URL under which containerd knows the document (containerd, core/runtime/typeurl.go).
pub(crate) const TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The points of a container's life at which husk runs hooks. It rejects `createContainer`.
const HOOKS: [&str; 5] = ["prestart", "createRuntime", "startContainer", "poststart", "poststop"];
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"];
/// The capabilities of the guest's kernel (include/uapi/linux/capability.h).
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];
/// Without SCMP_ACT_NOTIFY, whose listener would be on the host.
const SECCOMP_ACTIONS: [&str; 8] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];
const SECCOMP_OPERATORS: [&str; 7] =
    ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"];
const SECCOMP_ARCHS: [&str; 3] = ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"];
const SECCOMP_FLAGS: [&str; 3] =
    ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"];

/// The features document.
pub(crate) fn features() -> Value {
    let disabled = json!({"enabled": false});
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": HOOKS,
        "mountOptions": supported_options(),
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": CAPABILITIES,
            // The cgroups of containers are the guest's.
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": SECCOMP_ACTIONS,
                "operators": SECCOMP_OPERATORS,
                "archs": SECCOMP_ARCHS,
                "knownFlags": SECCOMP_FLAGS,
                "supportedFlags": SECCOMP_FLAGS,
            },
            "apparmor": disabled,
            "selinux": disabled,
            "intelRdt": disabled,
            // containerd's CRI plugin takes this for the support of pods with user namespaces. Mounts can be ID-mapped, but
            // such pods are rejected: their network namespaces belong to their user namespaces.
            "mountExtensions": {"idmap": disabled},
            "netDevices": disabled,
        },
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Capability, Features, LinuxNamespaceType};
    use serde::Deserialize;

    use super::*;

    #[test]
    fn the_document_has_the_form_of_the_spec_and_names_only_what_exists() {
        let document = features();
        let parsed: Features = serde_json::from_value(document.clone()).unwrap();
        let understood = serde_json::to_value(&parsed).unwrap();
        for (field, value) in document.as_object().unwrap() {
            if field != "linux" {
                assert_eq!(understood[field], *value, "{field}");
            }
        }
        for (field, value) in document["linux"].as_object().unwrap() {
            let keys = |value: &Value| value.as_object().map(|all| all.keys().cloned().collect::<Vec<_>>());
            assert_eq!(keys(&understood["linux"][field]), keys(value), "{field}");
        }
        for name in CAPABILITIES {
            assert!(Capability::deserialize(json!(name)).is_ok(), "{name}");
        }
        for name in NAMESPACES {
            assert!(LinuxNamespaceType::deserialize(json!(name)).is_ok(), "{name}");
        }
    }

    #[test]
    fn mount_options_that_a_container_cannot_use_are_missing() {
        let options = supported_options();
        for (option, expected) in [("ro", true), ("rro", true), ("tmpcopyup", true), ("idmap", true), ("loop", false)] {
            assert_eq!(options.contains(&option), expected, "{option}");
        }
        assert!(options.is_sorted(), "{options:?}");
    }
}
