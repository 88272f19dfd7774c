//! What the CRI plugin says of a pod in the spec of the pod's sandbox container: the size of the pod, and the namespaces
//! of the node that the pod uses (containerd, `internal/cri/annotations` and `internal/cri/server/podsandbox`).

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::config::problem::Problem;
use crate::config::settings::HostPid;
use crate::rootfs::spec::{SpecLimits, propagation, whole_cpus};

/// Tells a pod's sandbox container from the others.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Names a container's pod.
pub(super) const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// The sum of the memory limits of the pod's containers, bytes. 0 means that no container has a limit.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// The sum of the CPU limits of the pod's containers, microseconds per period. 0 and -1 mean no limit.
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// The period of the quota, microseconds.
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// The namespaces that a pod can share with its node, the field of a pod that asks for it, and what the operator can do.
const OF_NODE: [(LinuxNamespaceType, &str, &str, &str); 3] = [
    (LinuxNamespaceType::Network, "network", "hostNetwork", ""),
    (
        LinuxNamespaceType::Pid,
        "processes",
        "hostPID",
        ", or set host_pid = \"pod\" in husk's configuration for a PID namespace of the pod's own",
    ),
    (LinuxNamespaceType::Ipc, "IPC objects", "hostIPC", ""),
];

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(name).map(String::as_str)
}

/// What a container is in its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The CRI plugin has not made it.
    None,
    /// The sandbox container, or the sandbox itself.
    Sandbox,
    /// A container with a program of the pod.
    Container,
}

/// What the spec's container is in its pod.
pub(super) fn role(spec: &Spec) -> Role {
    match annotation(spec, CONTAINER_TYPE) {
        None => Role::None,
        Some("sandbox") => Role::Sandbox,
        Some(_) => Role::Container,
    }
}

/// The limits of all containers of the pod together; none for a container without a pod.
///
/// # Errors
///
/// Each annotation whose value is not a number.
pub(super) fn limits(spec: &Spec) -> Result<SpecLimits, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut number = |name: &str| {
        let text = annotation(spec, name)?;
        text.parse::<i64>()
            .map_err(|_| {
                let shown = text.chars().take(40).collect::<String>();
                problems.push(Problem {
                    key: format!("annotation {name}"),
                    value: Some(format!("{shown:?}")),
                    why: "must be an integer".to_owned(),
                });
            })
            .ok()
    };
    let (memory, quota, period) = (number(MEMORY), number(CPU_QUOTA), number(CPU_PERIOD));
    if !problems.is_empty() {
        return Err(problems);
    }
    let memory = memory.and_then(|bytes| u64::try_from(bytes).ok()).filter(|&bytes| bytes > 0);
    let period = period.and_then(|period| u64::try_from(period).ok());
    Ok(SpecLimits { memory, cpus: quota.and_then(|quota| whole_cpus(quota, period)) })
}

/// The annotations that say these limits.
pub(super) fn annotations_of(memory: i64, cpu_quota: i64, cpu_period: i64) -> [(String, String); 3] {
    [(MEMORY, memory), (CPU_QUOTA, cpu_quota), (CPU_PERIOD, cpu_period)]
        .map(|(name, value)| (name.to_owned(), value.to_string()))
}

/// The annotation of a pod's sandbox container.
pub(super) fn annotation_of_sandbox() -> (String, String) {
    (CONTAINER_TYPE.to_owned(), "sandbox".to_owned())
}

/// Gives a pod that asks for its node's processes a PID namespace of its own instead, if the operator wants that: the
/// sandbox container creates it, and the other containers join it by the sandbox's PID, which their specs name anyway.
/// Returns what was changed, for the log.
pub(super) fn replace_pid_namespace_of_node(spec: &mut Spec, host_pid: HostPid) -> Option<String> {
    if host_pid != HostPid::Pod || role(spec) != Role::Sandbox {
        return None;
    }
    let linux = spec.linux_mut().as_mut()?;
    let mut namespaces = linux.namespaces_mut().take().unwrap_or_default();
    let is_missing = !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Pid);
    if is_missing {
        let mut own = LinuxNamespace::default();
        own.set_typ(LinuxNamespaceType::Pid);
        namespaces.push(own);
    }
    linux.set_namespaces(Some(namespaces));
    is_missing.then(|| {
        "linux.namespaces: added a PID namespace: the pod's containers share it instead of the node's (hostPID)"
            .to_owned()
    })
}

/// A problem per thing of the node that the pod or its container shares with it, which a VM cannot do.
pub(super) fn shares_node(spec: &Spec) -> Vec<String> {
    match annotation(spec, CONTAINER_TYPE) {
        Some("sandbox") => namespaces_of_node(spec),
        Some(_) => mounts_for_node(spec),
        None => Vec::new(),
    }
}

/// The namespaces of the node that the pod uses: its sandbox container's spec lacks them.
fn namespaces_of_node(spec: &Spec) -> Vec<String> {
    let namespaces: Vec<_> =
        spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten()).map(|n| n.typ()).collect();
    let shared = OF_NODE.iter().filter(|(namespace, ..)| !namespaces.contains(namespace));
    shared
        .map(|(_, what, field, instead)| {
            format!(
                "linux.namespaces: the pod uses the node's {what} ({field}), which a VM cannot share: set {field} to \
                 false, or use another runtime class{instead}"
            )
        })
        .collect()
}

/// The mounts whose mounts the pod expects to appear on the node.
fn mounts_for_node(spec: &Spec) -> Vec<String> {
    let mounts = spec.mounts().iter().flatten().enumerate();
    let shared = mounts.filter(|(_, mount)| matches!(propagation(mount), Some("shared" | "rshared")));
    shared
        .map(|(index, mount)| {
            format!(
                "mounts[{index}] at {}: mountPropagation Bidirectional: a mount made in a VM does not appear on the \
                 node: use HostToContainer or None, or another runtime class",
                mount.destination().display()
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(annotations: &serde_json::Value, namespaces: &[&str]) -> Spec {
        let namespaces: Vec<_> = namespaces.iter().map(|kind| json!({ "type": kind })).collect();
        let spec = json!({
            "ociVersion": "1.0.2", "annotations": annotations, "linux": { "namespaces": namespaces },
        });
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn the_limits_of_a_pod_are_those_of_its_containers_together() {
        let limits_of = |memory: &str, quota: &str, period: &str| {
            limits(&spec(&json!({ MEMORY: memory, CPU_QUOTA: quota, CPU_PERIOD: period }), &[]))
        };
        let some = |memory, cpus| Ok(SpecLimits { memory, cpus });
        assert_eq!(limits_of("1073741824", "150000", "100000"), some(Some(1 << 30), Some(2)));
        assert_eq!(limits_of("0", "0", "100000"), some(None, None));
        assert_eq!(limits_of("0", "-1", "0"), some(None, None));
        assert_eq!(limits_of("1", "400000", "0"), some(Some(1), Some(4)), "the default period");
        assert_eq!(limits(&spec(&json!({}), &[])), some(None, None));
        let wrong = limits_of("1Gi", "150000", "").unwrap_err();
        assert_eq!(
            wrong.iter().map(ToString::to_string).collect::<Vec<_>>(),
            [
                "annotation io.kubernetes.cri.sandbox-memory = \"1Gi\": must be an integer",
                "annotation io.kubernetes.cri.sandbox-cpu-period = \"\": must be an integer",
            ]
        );
    }

    #[test]
    fn a_pod_with_a_namespace_of_its_node_is_rejected_by_the_field_of_the_pod() {
        let sandbox = json!({ CONTAINER_TYPE: "sandbox" });
        assert_eq!(shares_node(&spec(&sandbox, &["network", "pid", "ipc", "uts", "mount"])), [""; 0]);
        for (missing, field) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
            let others: Vec<_> = ["network", "pid", "ipc"].into_iter().filter(|kind| *kind != missing).collect();
            let problems = shares_node(&spec(&sandbox, &others));
            assert!(problems.len() == 1 && problems[0].contains(&format!("set {field} to false")), "{problems:?}");
        }
        assert_eq!(shares_node(&spec(&json!({ CONTAINER_TYPE: "container" }), &[])), [""; 0]);
    }

    #[test]
    fn a_pod_with_the_processes_of_its_node_has_a_pid_namespace_of_its_own_if_the_operator_wants_that() {
        let kinds = |annotations: &serde_json::Value, namespaces: &[&str], host_pid| {
            let mut spec = spec(annotations, namespaces);
            let note = replace_pid_namespace_of_node(&mut spec, host_pid);
            let now = spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap().clone();
            assert!(now.iter().all(|namespace| namespace.path().is_none()));
            (now.iter().map(|namespace| namespace.typ().to_string()).collect::<Vec<_>>().join(" "), note.is_some())
        };
        let sandbox = json!({ CONTAINER_TYPE: "sandbox" });
        let others = &["network", "ipc"][..];
        let table = [
            (&sandbox, others, HostPid::Pod, ("net ipc pid", true)),
            (&sandbox, &["pid", "network", "ipc"], HostPid::Pod, ("pid net ipc", false)),
            (&sandbox, others, HostPid::Reject, ("net ipc", false)),
            // Its spec names the namespace of the sandbox container.
            (&json!({ CONTAINER_TYPE: "container" }), others, HostPid::Pod, ("net ipc", false)),
            (&json!({}), others, HostPid::Pod, ("net ipc", false)),
        ];
        for (annotations, namespaces, host_pid, (expected, changed)) in table {
            let found = kinds(annotations, namespaces, host_pid);
            assert_eq!(found, (expected.to_owned(), changed), "{annotations} {namespaces:?} {host_pid:?}");
        }
        let mut alone = spec(&sandbox, others);
        let problems = shares_node(&alone);
        assert!(problems.len() == 1 && problems[0].contains("host_pid = \"pod\""), "{problems:?}");
        replace_pid_namespace_of_node(&mut alone, HostPid::Pod);
        assert_eq!(shares_node(&alone), [""; 0]);
    }

    #[test]
    fn a_mount_of_a_pod_whose_mounts_should_appear_on_the_node_is_rejected() {
        let with = |kind: &str, options: &[&str]| {
            let mount = json!({ "destination": "/in", "type": "bind", "source": "/srv", "options": options });
            let spec = json!({ "ociVersion": "1.0.2", "annotations": { CONTAINER_TYPE: kind }, "mounts": [mount] });
            shares_node(&serde_json::from_value(spec).unwrap())
        };
        for accepted in [&["rbind"][..], &["rbind", "rslave"], &["rbind", "rshared", "rprivate"]] {
            assert_eq!(with("container", accepted), [""; 0], "{accepted:?}");
        }
        let rejected = with("container", &["rbind", "rshared", "ro"]);
        assert!(rejected.len() == 1 && rejected[0].starts_with("mounts[0] at /in: mountPropagation"), "{rejected:?}");
    }
}
