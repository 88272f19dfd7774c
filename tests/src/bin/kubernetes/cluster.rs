//! A control plane of one node: etcd, kube-apiserver and kubelet. Where husk is registered, it has no scheduler and no
//! controllers: pods name their node, and the objects that controllers would make are made at the start. Where a test
//! installs husk, it has both, and the API server checks what its users may do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use husk_tests::artifacts::repository;
use husk_tests::command::{self, Output};

use crate::daemon::Daemon;
use crate::node::{self, Husk, Node};

/// The node's name.
pub const NODE: &str = "node";
/// Deadline for the API server, and then for the kubelet, to become ready.
const START: Duration = Duration::from_secs(300);
/// Deadline for one kubectl call that does not wait for a pod.
const CALL: Duration = Duration::from_secs(60);

/// The kubelet writes to folders of the machine at fixed paths, and sets sysctls of the machine: here it writes to files
/// that hide them. It does not make its root cgroup.
const PREPARE: &str = r#"set -e
mount -t tmpfs tmpfs /var/log
mkdir -p /run/node/pki /run/node/manifests /run/node/volumes
for name in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
  file=/run/node/sysctl-$(basename $name)
  cat /proc/sys/$name >$file
  mount --bind $file /proc/sys/$name
done
if [ -e /sys/fs/cgroup/cgroup.procs ]; then roots=/sys/fs/cgroup; else roots=$(echo /sys/fs/cgroup/*); fi
for root in $roots; do
  mkdir -p $root/GROUP
  # In version 1, an empty cpuset takes no processes.
  for file in cpuset.cpus cpuset.mems; do
    [ ! -e $root/$file ] || cat $root/$file >$root/GROUP/$file
  done
  # All pods together would count as one of the machine's processes.
  [ ! -e $root/GROUP/cpu.shares ] || echo 10240 >$root/GROUP/cpu.shares
  [ ! -e $root/GROUP/cpu.weight ] || echo 1000 >$root/GROUP/cpu.weight
done
openssl genrsa -out /run/node/pki/sa.key 2048 2>/dev/null
cat >/run/node/tokens.csv <<END
admintoken,admin,admin,system:masters
kubelettoken,system:node:node,kubelet,system:nodes
END
for user in admin kubelet; do
cat >/run/node/$user.conf <<END
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: ${user}token}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
END
done
cat >/run/node/kubelet.yaml <<END
kind: KubeletConfiguration
apiVersion: kubelet.config.k8s.io/v1beta1
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /GROUP
enforceNodeAllocatable: []
failSwapOn: false
# A container that fails is restarted after a second, each time.
featureGates: {KubeletCrashLoopBackOffMax: true}
crashLoopBackOff: {maxContainerRestartPeriod: 1s}
cpuManagerPolicy: static
systemReserved: {cpu: 100m}
volumeStatsAggPeriod: 5s
oomScoreAdj: 0
staticPodPath: /run/node/manifests
volumePluginDir: /run/node/volumes
clusterDNS: ["10.96.0.10"]
clusterDomain: cluster.local
resolvConf: ""
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: "50Mi"}
configMapAndSecretChangeDetectionStrategy: Watch
syncFrequency: 5s
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/node/containerd.sock
END
"#;

/// husk's RuntimeClass, and the label of the nodes that it selects.
const CLASS: &str = "setup/kubernetes/install/runtimeclass.yaml";
const LABEL: &str = "io.husk/runtime=true";
/// The runtime handlers that have a class like it, of the same name.
const HANDLERS: [&str; 4] = ["husk", "husk-shim", "husk-q35", "husk-shim-q35"];

/// The RuntimeClass of runc.
const RUNC: &str =
    r#"{"kind": "RuntimeClass", "apiVersion": "node.k8s.io/v1", "metadata": {"name": "runc"}, "handler": "runc"}"#;

/// The programs that only a cluster without husk runs.
const CONTROLLERS: &str = "kube-controller-manager";
const SCHEDULER: &str = "kube-scheduler";

/// What controllers would make.
const OBJECTS: &str = r#"
{"kind": "List", "apiVersion": "v1", "items": [
  {"kind": "ServiceAccount", "apiVersion": "v1", "metadata": {"name": "default", "namespace": "default"}},
  {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "kube-root-ca.crt", "namespace": "default"},
   "data": {"ca.crt": "none"}}
]}"#;

/// Where metrics-server listens on the node, and what leads the API server there. No proxy for Services runs.
const METRICS: &str = r#"
{"kind": "List", "apiVersion": "v1", "items": [
  {"kind": "Service", "apiVersion": "v1", "metadata": {"name": "metrics-server", "namespace": "kube-system"},
   "spec": {"ports": [{"name": "https", "port": 443, "targetPort": 10251}]}},
  {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4",
   "metadata": {"name": "metrics-server", "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "metrics-server"}},
   "endpoints": [{"addresses": ["192.0.2.1"], "conditions": {"ready": true}}],
   "ports": [{"name": "https", "port": 10251, "protocol": "TCP"}]},
  {"kind": "APIService", "apiVersion": "apiregistration.k8s.io/v1", "metadata": {"name": "v1beta1.metrics.k8s.io"},
   "spec": {"group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
            "insecureSkipTLSVerify": true, "service": {"name": "metrics-server", "namespace": "kube-system"}}}
]}"#;

/// A running cluster. It ends with everything in it when it is dropped.
pub struct Cluster {
    node: Node,
    bin: PathBuf,
    /// etcd, kube-apiserver, kubelet.
    daemons: Vec<Daemon>,
}

/// The programs of a minor version of Kubernetes.
fn bin(version: &str) -> PathBuf {
    node::folder().join(version)
}

/// What must exist before a cluster can start.
pub fn needs(version: &str) -> [PathBuf; 3] {
    [bin(version).join("kubelet"), bin(version).join("kube-apiserver"), node::bin().join("etcd")]
}

/// What must exist beside that before a cluster without husk can start.
pub fn needs_without_husk(version: &str) -> [PathBuf; 2] {
    [CONTROLLERS, SCHEDULER].map(|name| bin(version).join(name))
}

/// The program that serves the metrics of pods and nodes.
pub fn metrics_server() -> PathBuf {
    repository().join(".cache/metrics-server/metrics-server")
}

impl Cluster {
    /// Starts one with this minor version of Kubernetes. The daemons write their logs to `folder`.
    pub fn start(version: &str, folder: &Path) -> Result<Self> {
        let mut cluster = Self::prepare(version, folder, Husk::Registered(""))?;
        cluster.control_plane(&["--authorization-mode=AlwaysAllow"], folder)?;
        cluster.apply(RUNC)?;
        cluster.apply(OBJECTS)?;
        let class = repository().join(CLASS);
        let class = fs::read_to_string(&class).with_context(|| format!("read {}", class.display()))?;
        for handler in HANDLERS {
            let named = class.replace("name: husk\n", &format!("name: {handler}\n"));
            cluster.apply(&named.replace("handler: husk\n", &format!("handler: {handler}\n")))?;
        }
        cluster.kubelet(&[&format!("--node-labels={LABEL}")], folder)?;
        cluster.node.mark_idle();
        Ok(cluster)
    }

    /// Starts one without husk, with a scheduler and controllers, and an API server that authorizes its users.
    pub fn without_husk(version: &str, folder: &Path) -> Result<Self> {
        let mut cluster = Self::prepare(version, folder, Husk::Absent)?;
        cluster.control_plane(&["--authorization-mode=Node,RBAC"], folder)?;
        cluster.apply(RUNC)?;
        let words = ["--kubeconfig=/run/node/admin.conf", "--leader-elect=false"];
        cluster.spawn(&cluster.bin.join(SCHEDULER), &words, folder)?;
        let of_accounts =
            ["--root-ca-file=/run/node/pki/apiserver.crt", "--service-account-private-key-file=/run/node/pki/sa.key"];
        cluster.spawn(&cluster.bin.join(CONTROLLERS), &[&words[..], &of_accounts].concat(), folder)?;
        cluster.kubelet(&[], folder)?;
        Ok(cluster)
    }

    /// A node on which the daemons can start.
    fn prepare(version: &str, folder: &Path, husk: Husk) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let node = Node::start(&folder.join("containerd.log"), husk)?;
        let cluster = Self { node, bin: bin(version), daemons: Vec::new() };
        // Whatever has this name goes with the machine's containerd.
        let group = format!("kubelet-{}", cluster.node.token());
        cluster.sh(&PREPARE.replace("GROUP", &group), CALL)?.ok()?;
        Ok(cluster)
    }

    fn control_plane(&mut self, options: &[&str], folder: &Path) -> Result<()> {
        let etcd = node::bin().join("etcd");
        let client = "http://127.0.0.1:2379";
        let words = ["--data-dir", "/run/node/etcd", "--listen-client-urls", client, "--advertise-client-urls", client];
        self.spawn(&etcd, &[&words[..], &["--listen-peer-urls", "http://127.0.0.1:2380"]].concat(), folder)?;
        let words = [
            "--etcd-servers=http://127.0.0.1:2379",
            "--cert-dir=/run/node/pki",
            "--secure-port=6443",
            "--bind-address=127.0.0.1",
            "--advertise-address=192.0.2.1",
            "--service-account-key-file=/run/node/pki/sa.key",
            "--service-account-signing-key-file=/run/node/pki/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--token-auth-file=/run/node/tokens.csv",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--allow-privileged",
            "--endpoint-reconciler-type=none",
            "--kubelet-preferred-address-types=InternalIP",
            "--enable-aggregator-routing",
        ];
        self.spawn(&self.bin.join("kube-apiserver"), &[&words[..], options].concat(), folder)?;
        self.await_success("kubectl get --raw /readyz", "the API server is ready")
    }

    fn kubelet(&mut self, options: &[&str], folder: &Path) -> Result<()> {
        let words = [
            "--config=/run/node/kubelet.yaml",
            "--kubeconfig=/run/node/kubelet.conf",
            "--root-dir=/run/node/kubelet",
            "--cert-dir=/run/node/kubelet/pki",
            "--hostname-override=node",
            "--node-ip=192.0.2.1",
        ];
        self.spawn(&self.bin.join("kubelet"), &[&words[..], options].concat(), folder)?;
        self.await_kubelet()
    }

    /// Starts metrics-server, for `kubectl top`.
    pub fn serve_metrics(&mut self, folder: &Path) -> Result<()> {
        self.apply(METRICS)?;
        let config = "/run/node/admin.conf";
        let words = [
            &format!("--kubeconfig={config}"),
            &format!("--authentication-kubeconfig={config}"),
            &format!("--authorization-kubeconfig={config}"),
            "--authentication-tolerate-lookup-failure",
            "--kubelet-insecure-tls",
            "--kubelet-preferred-address-types=InternalIP",
            "--metric-resolution=10s",
            "--kubelet-request-timeout=8s",
            "--cert-dir=/run/node/metrics",
            "--secure-port=10251",
        ];
        self.spawn(&metrics_server(), &words, folder)?;
        let available = "kubectl wait --for=condition=Available apiservice/v1beta1.metrics.k8s.io --timeout=1s";
        self.await_success(available, "metrics-server answers the API server")?;
        self.node.mark_idle();
        Ok(())
    }

    fn await_kubelet(&mut self) -> Result<()> {
        let ready = format!("kubectl wait --for=condition=Ready node/{NODE} --timeout=1s");
        self.await_success(&ready, "the node is ready")
    }

    /// Starts a daemon that writes its log to `folder`.
    fn spawn(&mut self, program: &Path, words: &[&str], folder: &Path) -> Result<()> {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let mut command = self.node.enter(program);
        command.args(words);
        self.daemons.push(Daemon::start(command, &folder.join(format!("{name}.log")))?);
        Ok(())
    }

    /// Kills containerd and the kubelet with SIGKILL, and starts both again.
    pub fn interrupt(&mut self) -> Result<()> {
        let kubelet = self.daemons.last_mut().context("no daemon")?;
        self.node.daemon().kill()?;
        kubelet.kill()?;
        self.node.daemon().start_again()?;
        self.node.await_ready()?;
        // It exits if containerd does not answer.
        kubelet.start_again()
    }

    /// The memory that the daemons use, in KiB, by name.
    pub fn daemons_memory(&mut self) -> Result<Vec<(String, u64)>> {
        let daemons = self.daemons.iter().map(Daemon::process).chain([self.node.daemon().process()]);
        daemons.map(|daemon| daemon.and_then(|daemon| Ok((daemon.name.clone(), rss(daemon.pid)?)))).collect()
    }

    /// Repeats a command until it succeeds. Fails if a daemon exits.
    fn await_success(&mut self, script: &str, what: &str) -> Result<()> {
        let mut last = String::new();
        let ready = command::wait_for(START, what, || match self.sh(script, CALL).and_then(Output::ok) {
            Ok(_) => Some(Ok(())),
            Err(error) => {
                last = format!("{error:#}");
                let ended = self.daemons.iter_mut().any(Daemon::has_exited);
                ended.then(|| bail!("a daemon has exited"))
            }
        });
        ready.and_then(|ready| ready).with_context(|| last)
    }

    /// Creates objects from JSON or YAML.
    pub fn apply(&self, objects: &str) -> Result<()> {
        let mut command = self.command();
        command.args(["-c", "kubectl apply -f -"]);
        command::run(command, Some(objects.as_bytes().to_vec()), CALL)?.ok().map(drop)
    }

    /// A shell in the node's namespaces, with kubectl.
    pub fn command(&self) -> Command {
        let mut command = self.node.enter("env");
        let path = format!("PATH={}:{}", self.bin.display(), self.node.search_path());
        command.args([&path, "KUBECONFIG=/run/node/admin.conf", "sh"]);
        command
    }

    /// Runs a shell script in the node's namespaces.
    pub fn sh(&self, script: &str, deadline: Duration) -> Result<Output> {
        let mut command = self.command();
        command.args(["-c", script]);
        command::run(command, None, deadline)
    }

    /// Kills containerd with SIGKILL and starts it again, beside the kubelet.
    pub fn restart_containerd(&mut self) -> Result<()> {
        self.node.daemon().kill()?;
        self.node.daemon().start_again()?;
        self.node.await_ready()
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.node
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // `nsenter` waits for the daemon, which is in the node's PID namespace.
        self.node.kill();
        for daemon in &mut self.daemons {
            daemon.wait();
        }
    }
}

/// A process's memory outside of files, in KiB.
fn rss(pid: i32) -> Result<u64> {
    let file = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let line =
        status.lines().find_map(|line| line.strip_prefix("RssAnon:")).with_context(|| format!("RssAnon in {file}"))?;
    line.trim().trim_end_matches(" kB").parse().with_context(|| format!("parse {line:?} in {file}"))
}
