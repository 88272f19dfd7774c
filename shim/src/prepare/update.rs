//! UpdateSandbox: what containerd 2.4 sends when the limits of a pod's containers together change. Pure.
//!
//! The record of the sandbox has the new limits in an extension, as JSON. The kubelet writes the pod's limits to the
//! pod's cgroup on the node, and updates each container by itself, so the VM only has to be large enough.

use husk_protos::sandbox_update::UpdateSandboxRequest;
use serde_json::{Map, Value};

use crate::config::problem::Problem;
use crate::config::settings::GUEST_OVERHEAD_MIB;
use crate::prepare::size::Size;
use crate::rootfs::spec::resources::HostResources;
use crate::rootfs::spec::whole_cpus;

/// The extension's key and the last part of its type (containerd, `internal/cri/server/podsandbox/helpers.go`).
const RESOURCES: &str = "updated-resources";
const TYPE: &str = "UpdatedResources";

/// Reads an update of a sandbox whose spec is `spec` and whose VM has this size now. Returns what the host has to do.
///
/// # Errors
/// Every field that has changed and cannot be applied.
pub(super) fn read(request: &UpdateSandboxRequest, spec: &[u8], size: Size) -> Result<HostResources, Vec<Problem>> {
    let mut problems = Vec::new();
    if let Some(resources) = request.resources.as_ref() {
        let why = format!("must be in sandbox.extensions[{RESOURCES:?}]");
        problems.push(Problem::quoted("resources.type_url", &resources.type_url, why));
    }
    if let Some((name, value)) = request.annotations.iter().min() {
        problems.push(Problem::quoted(
            format!("annotations[{name:?}]"),
            value,
            "a VM's settings are fixed at its boot",
        ));
    }
    // The labels and the other extensions are containerd's own.
    let known = |field: &str| ["extensions", "labels"].contains(&field.split('.').next().unwrap_or_default());
    for (index, field) in request.fields.iter().enumerate().filter(|(_, field)| !known(field)) {
        problems.push(Problem::quoted(
            format!("fields[{index}]"),
            field,
            "a sandbox keeps it: extensions and labels can change",
        ));
    }
    let whole = request.fields.is_empty();
    if let Some(changed) = request.sandbox.spec.as_ref().filter(|changed| whole && changed.value != spec) {
        problems.push(Problem::quoted("sandbox.spec", &changed.type_url, "a sandbox keeps its spec"));
    }
    let names_resources =
        |field: &String| field == "extensions" || field.strip_prefix("extensions.") == Some(RESOURCES);
    let mut host = HostResources::default();
    if let Some(extension) =
        request.sandbox.extensions.get(RESOURCES).filter(|_| whole || request.fields.iter().any(names_resources))
    {
        let key = format!("sandbox.extensions[{RESOURCES:?}]");
        match parse(&extension.type_url, &extension.value) {
            Ok(resources) => {
                take(&resources, &format!("{key}.Resources"), &mut host, &mut problems);
                problems.extend(beyond(&resources, &format!("{key}.Resources"), size));
            }
            Err(why) => problems.push(Problem::quoted(key, &extension.type_url, why)),
        }
    }
    if problems.is_empty() { Ok(host) } else { Err(problems) }
}

/// The new limits, by the names of `LinuxContainerResources` in the Container Runtime Interface.
fn parse(type_url: &str, json: &[u8]) -> Result<Map<String, Value>, String> {
    if type_url.rsplit('/').next() != Some(TYPE) {
        return Err(format!("must be {TYPE}"));
    }
    let mut update: Map<String, Value> =
        serde_json::from_slice(json).map_err(|error| format!("is not JSON: {error}"))?;
    match update.remove("Resources") {
        Some(Value::Object(resources)) => Ok(resources),
        None | Some(Value::Null) => Ok(Map::new()),
        Some(_) => Err("Resources must be an object".to_owned()),
    }
}

/// Looks at every field that is set.
fn take(resources: &Map<String, Value>, key: &str, host: &mut HostResources, problems: &mut Vec<Problem>) {
    for (name, value) in resources.iter().filter(|(_, value)| !is_empty(value)) {
        let key = format!("{key}.{name}");
        let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match (name.as_str(), value) {
            ("cpuset_cpus", Value::String(cpus)) => host.cpus = Some(cpus.clone()),
            ("cpuset_mems", Value::String(mems)) => host.mems = Some(mems.clone()),
            ("cpu_period" | "cpu_quota" | "cpu_shares" | "memory_limit_in_bytes", value) if value.is_i64() => {}
            // A VM has no swap.
            ("memory_swap_limit_in_bytes", value) if value.is_i64() => {}
            ("cpuset_cpus" | "cpuset_mems", _) => problems.push(Problem::quoted(key, &shown, "must be a string")),
            ("cpu_period" | "cpu_quota" | "cpu_shares" | "memory_limit_in_bytes" | "memory_swap_limit_in_bytes", _) => {
                problems.push(Problem::quoted(key, &shown, "must be an integer"));
            }
            _ => problems.push(Problem::quoted(key, &shown, "cannot change for a VM as a whole")),
        }
    }
}

/// Whether a field is as good as absent.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) => false,
    }
}

/// The limits that are larger than the VM.
fn beyond(resources: &Map<String, Value>, key: &str, size: Size) -> Vec<Problem> {
    let number = |name: &str| resources.get(name).and_then(Value::as_i64);
    let mut problems = Vec::new();
    let memory = number("memory_limit_in_bytes").and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default();
    if memory.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB) > size.max_memory_mib.max(GUEST_OVERHEAD_MIB) {
        let most = if size.max_memory_mib > size.memory_mib {
            format!("can have at most {} MiB", size.max_memory_mib)
        } else {
            "keeps its size".to_owned()
        };
        let why = format!(
            "the pod's VM has {} MiB and {most}; {GUEST_OVERHEAD_MIB} MiB are the guest's own: start a new pod \
             with this limit",
            size.memory_mib
        );
        problems.push(Problem::quoted(format!("{key}.memory_limit_in_bytes"), &memory.to_string(), why));
    }
    let period = number("cpu_period").and_then(|period| u64::try_from(period).ok());
    // Too many to count are too many.
    let too_many = |quota: &i64| *quota > 0 && whole_cpus(*quota, period).is_none_or(|cpus| cpus > size.max_vcpus);
    if let Some(quota) = number("cpu_quota").filter(too_many) {
        let why = format!("the pod's VM has {} vCPUs at most: start a new pod with this limit", size.max_vcpus);
        problems.push(Problem::quoted(format!("{key}.cpu_quota"), &quota.to_string(), why));
    }
    problems
}

#[cfg(test)]
mod tests {
    use husk_protos::sandbox_update::{SandboxRecord, Typed};
    use serde_json::json;

    use super::*;

    const SIZE: Size = Size { vcpus: 1, max_vcpus: 2, memory_mib: 828, max_memory_mib: 828 };

    fn typed(type_url: &str, value: &[u8]) -> Typed {
        Typed { type_url: type_url.to_owned(), value: value.to_owned(), ..Default::default() }
    }

    fn with(resources: &Value) -> UpdateSandboxRequest {
        let json = json!({"Overhead": {"memory_limit_in_bytes": 1_u64 << 40}, "Resources": resources}).to_string();
        let extensions = [
            (RESOURCES.to_owned(), typed("io.containerd.cri.v1/UpdatedResources", json.as_bytes())),
            ("metadata".to_owned(), typed("github.com/containerd/cri/pkg/store/sandbox/Metadata", b"{}")),
        ];
        let record = SandboxRecord {
            spec: Some(typed("spec", b"{}")).into(),
            extensions: extensions.into(),
            ..Default::default()
        };
        UpdateSandboxRequest {
            sandbox: Some(record).into(),
            fields: vec!["extensions".to_owned()],
            ..Default::default()
        }
    }

    fn problems(request: &UpdateSandboxRequest) -> Vec<String> {
        let problems = read(request, b"{}", SIZE).unwrap_err();
        problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn limits_within_the_vms_size_are_accepted_and_host_resources_are_the_hosts() {
        let limits = json!({
            "cpu_period": 100_000, "cpu_quota": 200_000, "cpu_shares": 512, "memory_limit_in_bytes": 700 << 20,
            "memory_swap_limit_in_bytes": 700 << 20, "cpuset_cpus": "0-1", "oom_score_adj": 0, "unified": {},
        });
        let expected = HostResources { cpus: Some("0-1".into()), mems: None };
        assert_eq!(read(&with(&limits), b"{}", SIZE).unwrap(), expected);
        for none in [json!({}), json!(null), json!({"cpu_quota": -1, "memory_limit_in_bytes": 0})] {
            assert_eq!(read(&with(&none), b"{}", SIZE).unwrap(), HostResources::default(), "{none}");
        }
        // Only what has changed counts.
        let mut labels = with(&json!({"memory_limit_in_bytes": 1_u64 << 40}));
        labels.fields = vec!["labels.name".into(), "extensions.metadata".into()];
        assert_eq!(read(&labels, b"{}", SIZE).unwrap(), HostResources::default());
        let mut whole = with(&limits);
        whole.fields.clear();
        assert_eq!(read(&whole, b"{}", SIZE).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_applied_is_rejected_by_field_with_the_vms_size() {
        let prefix = "sandbox.extensions[\"updated-resources\"].Resources";
        for (limits, expected) in [
            (
                json!({"memory_limit_in_bytes": 701 << 20}),
                "memory_limit_in_bytes = \"735051776\": the pod's VM has 828 MiB",
            ),
            (json!({"cpu_quota": 200_001, "cpu_period": 100_000}), "cpu_quota = \"200001\": the pod's VM has 2 vCPUs"),
            (
                json!({"cpu_quota": i64::MAX, "cpu_period": 1}),
                "cpu_quota = \"9223372036854775807\": the pod's VM has 2",
            ),
            (json!({"unified": {"memory.high": "1"}}), "unified = \"{\\\"memory.high\\\":\\\"1\\\"}\": cannot change"),
            (json!({"oom_score_adj": 5}), "oom_score_adj = \"5\": cannot change"),
            (json!({"cpuset_mems": 5}), "cpuset_mems = \"5\": must be a string"),
            (json!({"cpu_shares": "5"}), "cpu_shares = \"5\": must be an integer"),
        ] {
            let problems = problems(&with(&limits));
            assert!(problems.len() == 1 && problems[0].starts_with(&format!("{prefix}.{expected}")), "{problems:?}");
        }
        let mut others = with(&json!({}));
        others.fields = vec!["extensions".into(), "runtime.name".into()];
        others.resources = Some(typed("x/y", b"")).into();
        others.annotations.insert("io.husk.debug".into(), "true".into());
        let found = problems(&others);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[2].starts_with("fields[1] = \"runtime.name\": a sandbox keeps it"), "{found:?}");
        let mut whole = with(&json!({}));
        whole.fields.clear();
        let found = read(&whole, b"{\"other\":1}", SIZE).unwrap_err()[0].to_string();
        assert_eq!(found, "sandbox.spec = \"spec\": a sandbox keeps its spec");
    }

    #[test]
    fn memory_that_the_vm_can_still_get_is_accepted_and_more_is_rejected_with_both_sizes() {
        let size = Size { max_memory_mib: 1084, ..SIZE };
        let limit = |mib: u64| with(&json!({"memory_limit_in_bytes": mib << 20}));
        assert_eq!(read(&limit(956), b"{}", size).unwrap(), HostResources::default());
        let problem = read(&limit(957), b"{}", size).unwrap_err()[0].to_string();
        assert!(problem.contains("has 828 MiB and can have at most 1084 MiB; 128 MiB are"), "{problem}");
    }

    #[test]
    fn limits_that_cannot_be_read_are_rejected() {
        for (type_url, json, why) in [
            ("x/Other", "{}", "must be UpdatedResources"),
            ("x/UpdatedResources", "{", "is not JSON"),
            ("x/UpdatedResources", r#"{"Resources": 1}"#, "Resources must be an object"),
        ] {
            let mut request = with(&json!({}));
            let extensions = &mut request.sandbox.mut_or_insert_default().extensions;
            extensions.insert(RESOURCES.to_owned(), typed(type_url, json.as_bytes()));
            let found = problems(&request);
            assert!(found.len() == 1 && found[0].contains(why), "{found:?}");
        }
    }
}
