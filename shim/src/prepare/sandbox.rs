//! A sandbox that containerd's Sandbox API creates: its VM boots for no container, so what the first container's spec says
//! otherwise comes from the request and from the pod's configuration.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use husk_protos::cri::{LinuxPodSandboxConfig, NamespaceOption, PodSandboxConfig};
use husk_protos::param;
use oci_spec::runtime::Spec;
use protobuf::Message;
use serde_json::{Value, json};

use super::pod_files::{Node, PodFile, RESOLV_CONF};
use super::{pod, pod_files, sysctls};
use crate::config::problem::Problem;

/// The pod's configuration, as a type URL of containerd.
const POD: &str = "runtime.v1.PodSandboxConfig";
/// `NamespaceMode.NODE` of the Container Runtime Interface.
const NODE: i32 = 2;
/// The prefix of the annotations that only containerd may set.
const OF_CONTAINERD: &str = "io.kubernetes.cri.";

/// What is requested for a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SandboxRequest {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// What a container of the sandbox's own would have as its spec: no files, but namespaces and annotations.
    pub(crate) spec: Spec,
    /// The host name: the pod's, or that of its node.
    pub(super) hostname: Option<String>,
    /// The files that a pod's containers find in `/etc`.
    pub(crate) files: Vec<PodFile>,
    /// Whether the pod says what is in its `resolv.conf`.
    pub(super) has_dns: bool,
    /// The pod's sysctls, by names with dots.
    pub(crate) sysctls: HashMap<String, String>,
}

impl SandboxRequest {
    /// Reads and checks a request.
    ///
    /// # Errors
    /// Every field that a VM cannot have.
    pub(super) fn read(request: &CreateSandboxRequest, node: &Node) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        if let Some(mount) = request.rootfs.first() {
            problems.push(Problem::quoted("rootfs[0].type", &mount.type_, "a VM has no root filesystem of its own"));
        }
        let pod = match request.options.as_ref() {
            None => None,
            Some(options) if options.type_url.rsplit('/').next() == Some(POD) => {
                match PodSandboxConfig::parse_from_bytes(&options.value) {
                    Ok(pod) => Some(pod),
                    Err(error) => {
                        problems.push(Problem::quoted("options.value", "", format!("is not a {POD}: {error}")));
                        None
                    }
                }
            }
            Some(options) => {
                problems.push(Problem::quoted("options.type_url", &options.type_url, format!("must be {POD}")));
                None
            }
        };
        let linux = pod.as_ref().map(|pod| pod.linux.clone().unwrap_or_default()).unwrap_or_default();
        let sysctls = pod.as_ref().map(|_| sysctls::of_pod(&linux.sysctls)).transpose();
        let sysctls = sysctls.map_err(|found| problems.extend(found)).ok().flatten().unwrap_or_default();
        let hostname = pod.as_ref().map(|pod| pod.hostname.clone()).filter(|name| !name.is_empty());
        if let Some(name) = hostname.as_ref().filter(|name| !param::is_hostname(name)) {
            problems.push(Problem::quoted("hostname", name, "must be at most 64 letters, digits, dots and hyphens"));
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let of_node = || pod.as_ref().map(|_| node.hostname.clone()).filter(|name| param::is_hostname(name));
        let hostname = hostname.or_else(of_node);
        let dns = pod.as_ref().and_then(|pod| pod.dns_config.as_ref());
        let resolv_conf = dns.map_or_else(|| node.resolv_conf.clone(), pod_files::resolv_conf);
        let files = pod.as_ref().map(|_| pod_files::of_pod(hostname.as_deref().unwrap_or_default(), node, resolv_conf));
        let spec = serde_json::from_value(spec(request, pod.as_ref(), &linux));
        let spec =
            spec.map_err(|error| vec![Problem::quoted("options", "", format!("the sandbox's spec: {error}"))])?;
        Ok(Self {
            id: request.sandbox_id.clone(),
            bundle: request.bundle_path.clone().into(),
            spec,
            hostname,
            files: files.unwrap_or_default(),
            has_dns: dns.is_some(),
            sysctls,
        })
    }

    /// Replaces the content of the pod's `resolv.conf`.
    pub(super) fn set_resolv_conf(&mut self, content: Vec<u8>) {
        if let Some(file) = self.files.iter_mut().find(|file| file.destination == RESOLV_CONF) {
            file.content = content;
        }
    }
}

/// The spec of a container of the sandbox's own, which is never created.
fn spec(request: &CreateSandboxRequest, pod: Option<&PodSandboxConfig>, linux: &LinuxPodSandboxConfig) -> Value {
    let mut annotations: HashMap<String, String> =
        pod.map(|pod| pod.annotations.clone()).unwrap_or_default().into_iter().collect();
    annotations.retain(|name, _| !name.starts_with(OF_CONTAINERD));
    annotations.extend(request.annotations.clone());
    if let Some(resources) = linux.resources.as_ref() {
        annotations.extend(pod::annotations_of(
            resources.memory_limit_in_bytes,
            resources.cpu_quota,
            resources.cpu_period,
        ));
    }
    annotations.extend(pod.is_some().then(pod::annotation_of_sandbox));
    let shared = linux.security_context.as_ref().and_then(|context| context.namespace_options.as_ref());
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "annotations": annotations,
        "process": {"args": ["pause"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": namespaces(&request.netns_path, shared.unwrap_or(&NamespaceOption::default()))},
    });
    if !linux.cgroup_parent.is_empty() {
        spec["linux"]["cgroupsPath"] = cgroups_path(&linux.cgroup_parent, &request.sandbox_id).into();
    }
    spec
}

/// The sandbox's namespaces. One that the node's stands for is missing, as in the spec of a pod's sandbox container.
fn namespaces(netns: &str, shared: &NamespaceOption) -> Vec<Value> {
    let network = if netns.is_empty() { json!({"type": "network"}) } else { json!({"type": "network", "path": netns}) };
    let all = [(network, shared.network), (json!({"type": "pid"}), shared.pid), (json!({"type": "ipc"}), shared.ipc)];
    all.into_iter().filter(|(_, mode)| *mode != NODE).map(|(namespace, _)| namespace).collect()
}

/// The sandbox's cgroup below the pod's, in the form that the pod's has: a path, or a slice of systemd.
fn cgroups_path(parent: &str, id: &str) -> String {
    match parent.rsplit('/').next().filter(|name| name.ends_with(".slice")) {
        Some(slice) => format!("{slice}:cri-containerd:{id}"),
        None => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

#[cfg(test)]
mod tests {
    use husk_protos::cri::{DNSConfig, LinuxContainerResources, LinuxSandboxSecurityContext};
    use protobuf::well_known_types::any::Any;

    use super::*;

    fn request(pod: &PodSandboxConfig) -> CreateSandboxRequest {
        let options = Any { type_url: POD.to_owned(), value: pod.write_to_bytes().unwrap(), ..Default::default() };
        CreateSandboxRequest {
            sandbox_id: "p1".into(),
            bundle_path: "/b".into(),
            netns_path: "/run/netns/p1".into(),
            options: Some(options).into(),
            ..Default::default()
        }
    }

    fn node() -> Node {
        Node { hostname: "node-7".into(), hosts: "the node's hosts".into(), resolv_conf: "the node's servers".into() }
    }

    fn text(read: &SandboxRequest) -> Vec<String> {
        read.files.iter().map(|file| String::from_utf8_lossy(&file.content).into_owned()).collect()
    }

    #[test]
    fn a_pod_that_says_nothing_has_the_files_and_the_name_of_its_node_and_another_sandbox_has_none() {
        let mut read = SandboxRequest::read(&request(&PodSandboxConfig::default()), &node()).unwrap();
        assert_eq!(read.hostname.as_deref(), Some("node-7"));
        assert_eq!(text(&read), ["node-7\n", "the node's hosts", "the node's servers"]);
        assert!(!read.has_dns);
        read.set_resolv_conf(b"relay".to_vec());
        assert_eq!(text(&read)[2], "relay");
        let other = CreateSandboxRequest { options: None.into(), ..request(&PodSandboxConfig::default()) };
        let read = SandboxRequest::read(&other, &node()).unwrap();
        assert_eq!((read.hostname, read.files.len(), read.sysctls.len()), (None, 0, 0));
    }

    #[test]
    fn the_pods_configuration_becomes_a_spec() {
        let resources = LinuxContainerResources {
            memory_limit_in_bytes: 1 << 30,
            cpu_quota: 150_000,
            cpu_period: 100_000,
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod7".into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        let dns = DNSConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["svc.local".into(), "local".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        let mut pod = PodSandboxConfig {
            hostname: "web-0".into(),
            dns_config: Some(dns).into(),
            linux: Some(linux).into(),
            ..Default::default()
        };
        pod.annotations.insert("io.husk.debug".into(), "true".into());
        // The pod's author cannot decide what containerd says.
        pod.annotations.insert("io.kubernetes.cri.sandbox-memory".into(), "1".into());
        let read = SandboxRequest::read(&request(&pod), &node()).unwrap();
        assert_eq!(read.hostname.as_deref(), Some("web-0"));
        let resolv_conf = "search svc.local local\nnameserver 10.96.0.10\noptions ndots:5\n";
        assert_eq!(text(&read), ["web-0\n", "the node's hosts", resolv_conf]);
        assert_eq!(read.sysctls.len(), 2, "containerd's defaults: {:?}", read.sysctls);
        let limits = pod::limits(&read.spec).unwrap();
        assert_eq!((limits.memory, limits.cpus), (Some(1 << 30), Some(2)));
        let spec = serde_json::to_value(&read.spec).unwrap();
        assert_eq!(spec["annotations"]["io.husk.debug"], "true");
        assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/pod7/p1");
        assert_eq!(spec["linux"]["namespaces"][0], json!({"type": "network", "path": "/run/netns/p1"}));
        assert_eq!(pod::shares_node(&read.spec), [""; 0]);
        assert_eq!(cgroups_path("/kubepods.slice/kubepods-pod7.slice", "p1"), "kubepods-pod7.slice:cri-containerd:p1");
    }

    #[test]
    fn what_a_vm_cannot_have_is_rejected_by_field() {
        let shared = NamespaceOption { pid: NODE, ..Default::default() };
        let context = LinuxSandboxSecurityContext { namespace_options: Some(shared).into(), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: Some(context).into(), ..Default::default() };
        let mut pod = PodSandboxConfig { linux: Some(linux).into(), ..Default::default() };
        let node = node();
        let read = |request: &_| SandboxRequest::read(request, &node);
        let problems = pod::shares_node(&read(&request(&pod)).unwrap().spec);
        assert!(problems.len() == 1 && problems[0].contains("hostPID"), "{problems:?}");
        pod.linux.mut_or_insert_default().sysctls.insert("vm.swappiness".into(), "7".into());
        let error = read(&request(&pod)).unwrap_err()[0].to_string();
        assert!(error.starts_with("linux.sysctls[\"vm.swappiness\"] = \"7\": belongs to no namespace"), "{error}");
        pod.linux = None.into();
        pod.hostname = "x init=/bin/sh".into();
        let error = read(&request(&pod)).unwrap_err()[0].to_string();
        assert!(error.starts_with("hostname = \"x init=/bin/sh\": must be at most 64"), "{error}");
        let mut other = request(&PodSandboxConfig::default());
        other.options.mut_or_insert_default().type_url = "x/y.Z".into();
        let error = read(&other).unwrap_err()[0].to_string();
        assert_eq!(error, "options.type_url = \"x/y.Z\": must be runtime.v1.PodSandboxConfig");
    }
}
