//! Pods as the kubelet runs them, through the CRI of the newest containerd: under husk with a pause container and without
//! one, they are what they are under runc.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::protobuf::MessageField;
use husk_protos::cri::{
    DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
    PodSandboxConfig,
};
use husk_tests::command::wait_for;
use husk_tests::containerd::ENV;
use husk_tests::cri::{Cri, Handler};
use husk_tests::leftovers::Leftovers;
use serde_json::Value;

const SLEEP: [&str; 2] = ["sleep", "1000"];
/// What the containers of a pod see, whatever runs it.
const SEEN: &str = "hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf; df -k /dev/shm | awk 'NR == 2 {print $2}'
    cd /proc/sys; for name in net/core/somaxconn net/ipv4/conf/eth0/log_martians net/ipv4/ip_unprivileged_port_start \
    net/ipv4/ping_group_range kernel/shm_rmid_forced kernel/msgmax fs/mqueue/msg_max; do echo $name $(cat $name); done";

/// The PIDs of the pod's programs, of both its containers: they have one PID namespace.
const PIDS: &str = "pidof sleep";

/// A cgroup of the machine, removed with the test.
struct Cgroup(PathBuf);

impl Cgroup {
    fn create(name: &str) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let root = if root.join("cpu").exists() { root.join("cpu") } else { root.to_owned() };
        std::fs::create_dir(root.join(name))?;
        Ok(Self(root.join(name)))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Not empty if the test has failed. Its processes end with the daemon.
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn config(cgroup_parent: &str) -> PodSandboxConfig {
    let sysctls = [
        ("net.core.somaxconn", "77"),
        ("net.ipv4.conf.eth0.log_martians", "1"),
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.msgmax", "9000"),
        ("fs.mqueue.msg_max", "20"),
    ];
    let dns = DNSConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["svc.local".into()],
        options: vec!["ndots:5".into()],
        ..Default::default()
    };
    let linux = LinuxPodSandboxConfig {
        cgroup_parent: cgroup_parent.into(),
        sysctls: sysctls.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        resources: MessageField::some(memory(300)),
        ..Default::default()
    };
    PodSandboxConfig {
        hostname: "web-0".into(),
        dns_config: MessageField::some(dns),
        linux: MessageField::some(linux),
        ..Default::default()
    }
}

/// The same with the node's processes.
fn with_host_pid(cgroup_parent: &str) -> PodSandboxConfig {
    let mut config = config(cgroup_parent);
    let shared = NamespaceOption { pid: 2, ..Default::default() };
    let context = LinuxSandboxSecurityContext { namespace_options: MessageField::some(shared), ..Default::default() };
    config.linux.mut_or_insert_default().security_context = MessageField::some(context);
    config
}

fn memory(mib: i64) -> LinuxContainerResources {
    LinuxContainerResources { memory_limit_in_bytes: mib << 20, ..Default::default() }
}

/// Runs a pod with two containers, which asks for the node's processes, and returns what they see.
fn pod(cri: &Cri, handler: Handler) -> Result<String> {
    let containerd = &cri.containerd;
    let parent = format!("/pods-{}", containerd.token());
    let pod =
        cri.pod(handler, with_host_pid(&parent)).with_context(|| format!("{handler:?}: {}", containerd.log_tail()))?;
    let (ready, address) = pod.status()?;
    ensure!(ready, "{handler:?}");
    let one = pod.container("one", &SLEEP)?;
    let two = pod.container("two", &SLEEP)?;
    let seen = one.script(SEEN)?;
    ensure!(two.script(SEEN)? == seen, "{handler:?}: the pod's containers differ: {seen}");
    let shared = "for name in net ipc uts; do readlink /proc/self/ns/$name; done; ip -o -4 addr show eth0";
    let of_pod = one.script(shared)?;
    ensure!(two.script(shared)? == of_pod && of_pod.contains(&address), "{handler:?}, {address}: {of_pod}");
    one.script("echo shared >/dev/shm/file")?;
    ensure!(two.script("cat /dev/shm/file")? == "shared", "{handler:?}");
    let pids = one.script(PIDS)?;
    ensure!(pids.split(' ').count() >= 2 && two.script(PIDS)? == pids, "{handler:?}: processes {pids:?}");
    pod.update(memory(200)).with_context(|| format!("{handler:?}"))?;
    if handler == Handler::HuskShim {
        let error = format!("{:#}", pod.update(memory(4096)).err().context("a limit beyond the VM")?);
        ensure!(error.contains("memory_limit_in_bytes") && error.contains("the pod's VM has 512 MiB"), "{error}");
        let mut invalid = config(&parent);
        invalid.linux.mut_or_insert_default().sysctls.insert("vm.swappiness".into(), "1".into());
        let error = format!("{:#}", cri.pod(handler, invalid).err().context("a sysctl of no namespace")?);
        ensure!(error.contains("vm.swappiness"), "{error}");
        let mut invalid = config(&parent);
        invalid.linux.mut_or_insert_default().sysctls.insert("net.ipv4.nonsense".into(), "1".into());
        let error = format!("{:#}", cri.pod(handler, invalid).err().context("a sysctl that does not exist")?);
        ensure!(error.contains("write sysctl key net.ipv4.nonsense"), "{error}");
    }
    if handler == Handler::Husk {
        let state = "/run/containerd/state/io.containerd.runtime.v2.task/k8s.io";
        let path = containerd.path(state).join(&pod.id).join("bootstrap.json");
        let bootstrap: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        ensure!(bootstrap["version"] == 3 && bootstrap["protocol"] == "ttrpc", "{bootstrap}");
    }
    if handler != Handler::Runc {
        let (shim, _) = containerd.shim_of(&pod.id)?;
        let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", shim.pid))?;
        ensure!(cgroups.contains(&format!("/shims-{}", std::process::id())), "ShimCgroup of {handler:?}: {cgroups}");
    }
    pod.stop()?;
    wait_for(Duration::from_secs(60), "the pod is not ready", || {
        pod.status().map(|(ready, _)| (!ready).then_some(())).transpose()
    })??;
    pod.remove()?;
    Ok(seen)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_pod_is_under_husk_with_and_without_a_pause_container_what_it_is_under_runc() -> Result<()> {
    let cgroup = Cgroup::create(&format!("shims-{}", std::process::id()))?;
    let cri = Cri::start(&format!("ShimCgroup = \"/shims-{}\"", std::process::id()))?;
    let expected = pod(&cri, Handler::Runc)?;
    ensure!(expected.contains("net/core/somaxconn 77") && expected.contains("kernel/msgmax 9000"), "{expected}");
    let before = Leftovers::now(&cri.containerd);
    for handler in [Handler::Husk, Handler::HuskShim] {
        let refused = cri.pod(handler, with_host_pid("")).err().context("a pod with the node's processes")?;
        let refused = format!("{refused:#}");
        ensure!(refused.contains("hostPID") && refused.contains("host_pid = \"pod\""), "{handler:?}: {refused}");
    }
    let config = cri.containerd.path(ENV[0].1);
    let text = std::fs::read_to_string(&config)?;
    std::fs::write(&config, text + "\nhost_pid = \"pod\"\n")?;
    for handler in [Handler::Husk, Handler::HuskShim] {
        let seen = pod(&cri, handler)?;
        ensure!(seen == expected, "{handler:?}:\n{seen}\nrunc:\n{expected}");
    }
    // What the first pod of a runtime creates and the next ones share, and the state of the CNI plugins.
    let shared = |line: &str| {
        let folder = line.starts_with("folder ") && (line.ends_with("/k8s.io") || line.ends_with("/run/husk"));
        folder || line.contains(" /run/cni/")
    };
    before.expect_none_since_but(&cri.containerd, shared)?;
    drop(cri);
    ensure!(std::fs::remove_dir(&cgroup.0).is_ok(), "processes are left in {}", cgroup.0.display());
    Ok(())
}
