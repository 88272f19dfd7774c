//! Containers of one sandbox share a shim and a VM, and nothing else unless their specs say so. This holds for sandboxes
//! with a pause container and for those of the Sandbox API, which have none: the checks are the same.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::ttrpc::Code;
use husk_protos::cri::{LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig};
use husk_tests::artifacts::Version;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::leftovers::Leftovers;
use husk_tests::sandbox_api::{self, SANDBOX_ID};
use husk_tests::shim::{Shim, Streams, code};
use serde_json::{Value, json};

/// The spec of a container in this sandbox.
fn spec(sandbox: &str, id: &str, args: &[&str]) -> Value {
    let mut spec = bundle::spec(id, args);
    spec["annotations"] = json!({ SANDBOX_ID: sandbox });
    spec
}

/// Kills and deletes a container, as the kubelet does.
fn remove(shim: &Shim) -> Result<u32> {
    let id = &shim.bundle.id;
    shim.task.kill(id, "", 9)?;
    shim.task.wait(id, "")?;
    let status = shim.task.delete(id, "")?;
    shim.shutdown();
    Ok(status)
}

const SLEEP: [&str; 2] = ["sleep", "1000"];

/// The pod's limits: 900 MiB, and one and a half CPUs.
const MEMORY: i64 = 900 << 20;
const CPU: (i64, i64) = (150_000, 100_000);

/// A sandbox of the pod's size.
struct Pod<'a> {
    /// Its shim, and its pause container if it has one.
    shim: Shim<'a>,
    /// The PID by whose namespaces containers join the sandbox.
    pid: u32,
}

impl<'a> Pod<'a> {
    fn with_pause_container(containerd: &'a Containerd, name: &str) -> Result<Self> {
        let id = containerd.id(name);
        let mut sized = spec(&id, &id, &SLEEP);
        // As the CRI plugin tells the limits of the pod's containers together.
        let (memory, quota, period) = (MEMORY.to_string(), CPU.0.to_string(), CPU.1.to_string());
        let limits =
            [("memory", memory.as_str()), ("cpu-quota", &quota), ("cpu-period", &period), ("cpu-shares", "1536")];
        for (name, value) in limits {
            sized["annotations"][format!("io.kubernetes.cri.sandbox-{name}")] = json!(value);
        }
        let shim = Shim::running(containerd, &id, &sized)?;
        // The CRI plugin builds the paths of namespaces from this PID.
        let pid = shim.task.state(&id, "")?.pid;
        Ok(Self { shim, pid })
    }

    fn of_the_sandbox_api(containerd: &'a Containerd, name: &str) -> Result<Self> {
        let shim = Shim::start_sandbox(containerd, &containerd.id(name))?;
        let resources = LinuxContainerResources {
            memory_limit_in_bytes: MEMORY,
            cpu_quota: CPU.0,
            cpu_period: CPU.1,
            cpu_shares: 1536,
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig { resources: MessageField::some(resources), ..Default::default() };
        let config =
            PodSandboxConfig { hostname: "husk-test".into(), linux: MessageField::some(linux), ..Default::default() };
        sandbox_api::create(&shim, "", &config)?;
        let pid = sandbox_api::start(&shim)?;
        Ok(Self { shim, pid })
    }

    fn id(&self) -> &str {
        &self.shim.bundle.id
    }

    fn containerd(&self) -> &'a Containerd {
        self.shim.containerd()
    }

    /// A container that shares nothing with the sandbox's others.
    fn container(&self, name: &str) -> Result<Shim<'a>> {
        let id = self.containerd().id(name);
        Shim::running(self.containerd(), &id, &spec(self.id(), &id, &SLEEP))
    }
}

/// Kills and deletes containers.
fn remove_all(containers: &[&Shim]) -> Result<()> {
    containers.iter().try_for_each(|container| {
        ensure!(remove(container)? == 137);
        Ok(())
    })
}

/// Containers of a sandbox are in one VM, of the pod's size, and see nothing of each other.
fn share_a_vm(pod: &Pod, first: &Shim) -> Result<()> {
    let second = pod.container("other")?;
    ensure!(first.socket == second.socket, "two shims: {:?} {:?}", first.socket, second.socket);
    let size = second.exec("size", &["sh", "-c", "nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo"])?.1;
    let (cpus, memory) = size.split_once('\n').context("two lines")?;
    ensure!(cpus == "2" && (900..900 + 128).contains(&memory.parse::<u64>()?), "the pod's size: {size}");
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    ensure!(first.exec("boot", &boot)? == second.exec("boot", &boot)?, "two VMs");

    ensure!(first.exec("write", &["sh", "-c", "echo first > /mine"])?.0 == 0);
    ensure!(second.exec("read", &["test", "-e", "/mine"])?.0 == 1, "the second container sees the first's file");
    for namespace in ["pid", "ipc", "uts", "mnt", "net", "cgroup"] {
        let link = ["readlink", &format!("/proc/self/ns/{namespace}")];
        let (one, two) = (first.exec("ns", &link)?, second.exec("ns", &link)?);
        ensure!(one.0 == 0 && two.0 == 0 && one != two, "{namespace}: {one:?} {two:?}");
    }
    // Two processes in its own cgroup, `sleep` and `cat`: a shared cgroup would contain the first container's too.
    let pids = ["cat", "/sys/fs/cgroup/cgroup.procs"];
    ensure!(second.exec("pids", &pids)?.1.lines().count() == 2, "{:?}", second.exec("again", &pids)?);
    remove_all(&[&second])
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn containers_of_a_sandbox_share_a_vm_of_the_pods_size_but_not_files_or_cgroups() -> Result<()> {
    let pod = Pod::with_pause_container(Containerd::shared()?, "pod")?;
    share_a_vm(&pod, &pod.shim)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn containers_of_a_sandbox_without_a_pause_container_are_what_those_of_one_with_it_are() -> Result<()> {
    let containerd = &Containerd::start(Version::default_for_tests())?;
    let pod = Pod::of_the_sandbox_api(containerd, "api")?;
    let first = pod.container("first")?;
    share_a_vm(&pod, &first)?;
    rejects_foreign_namespaces(&pod)?;
    let joined = containerd.id("joined");
    let joined = Shim::running(containerd, &joined, &sandbox_api::member(pod.id(), &joined, &SLEEP, pod.pid))?;
    joins_namespaces(&pod, &joined, &["net", "ipc", "uts"])?;
    run_a_crowd(&pod)?;
    remove_all(&[&first, &joined])?;
    sandbox_api::shutdown(&pod.shim)?;
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_sandbox_lives_until_its_last_container_is_deleted() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (pod, other) = (containerd.id("lives"), containerd.id("second"));
    let first = Shim::running(containerd, &pod, &spec(&pod, &pod, &SLEEP))?;
    let second = Shim::running(containerd, &other, &spec(&pod, &other, &SLEEP))?;
    let (process, below) = containerd.shim_of(&pod)?;
    // Each container's own process on the host ends with it.
    let vm: Vec<_> = below.iter().filter(|process| process.name != "husk-holder").collect();

    // The first container, for which the VM was booted, is deleted before the others.
    ensure!(remove(&first)? == 137);
    ensure!(
        process.is_alive() && vm.iter().all(|process| process.is_alive()),
        "the sandbox ended with its first container"
    );
    ensure!(second.exec("there", &["echo", "there"])? == (0, "there".to_owned()));
    let third_id = containerd.id("third");
    let third = Shim::running(containerd, &third_id, &spec(&pod, &third_id, &SLEEP))?;
    ensure!(remove(&second)? == 137);
    ensure!(third.exec("there", &["echo", "there"])? == (0, "there".to_owned()));
    ensure!(remove(&third)? == 137);
    let gone = || (!process.is_alive() && below.iter().all(|process| !process.is_alive())).then_some(());
    wait_for(Duration::from_secs(60), "the shim and its children are gone", gone)
}

/// A container that joins namespaces by the sandbox's PID is in those of `member`, of which `common` are the sandbox's.
fn joins_namespaces(pod: &Pod, member: &Shim, common: &[&str]) -> Result<()> {
    let (containerd, pid) = (pod.containerd(), pod.pid);
    let other = containerd.id("joins");
    let mut joins = sandbox_api::member(pod.id(), &other, &SLEEP, pid);
    joins["linux"]["namespaces"][1]["path"] = json!(format!("/proc/{pid}/ns/pid"));
    let second = Shim::running(containerd, &other, &joins)?;
    for namespace in common {
        let link = ["readlink", &format!("/proc/self/ns/{namespace}")];
        let (one, two) = (member.exec("ns", &link)?, second.exec("ns", &link)?);
        ensure!(one.0 == 0 && one == two, "{namespace}: {one:?} {two:?}");
    }
    ensure!(second.exec("name", &["hostname"])?.1 == "husk-test");
    if common.contains(&"pid") {
        let processes = member.exec("ps", &["ps", "-o", "args"])?.1;
        ensure!(processes.lines().filter(|line| line.starts_with("sleep")).count() == 2, "{processes}");
    }
    // The joined container's process is not the PID namespace's init; its exit must still be noticed.
    remove_all(&[&second])?;
    ensure!(member.exec("there", &["echo", "there"])? == (0, "there".to_owned()));
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_container_can_join_namespaces_of_the_first_by_path() -> Result<()> {
    let pod = Pod::with_pause_container(Containerd::shared()?, "joined")?;
    joins_namespaces(&pod, &pod.shim, &["net", "ipc", "uts", "pid"])?;
    rejects_foreign_namespaces(&pod)
}

/// Namespaces from outside the sandbox are rejected by their path.
fn rejects_foreign_namespaces(pod: &Pod) -> Result<()> {
    let (containerd, other) = (pod.containerd(), pod.containerd().id("refused"));
    for path in ["/proc/1/ns/net", "/proc/self/ns/net", "/run/netns/host"] {
        let mut wrong = spec(pod.id(), &other, &SLEEP);
        wrong["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "network", "path": path}]);
        let shim = Shim::start(containerd, &other, &wrong)?;
        let request = shim.create_request(&Streams::default());
        let created: containerd_shim_protos::ttrpc::Result<containerd_shim_protos::api::CreateTaskResponse> =
            shim.task.call("Create", &request);
        ensure!(code(&created) == Some(Code::INVALID_ARGUMENT), "{created:?}");
        let text = format!("{created:?}");
        ensure!(text.contains("linux.namespaces[1].path") && text.contains(path), "{text}");
        std::fs::remove_dir_all(&shim.bundle.outside)?;
    }
    Ok(())
}

/// Twenty containers that run at the same time leave nothing in the sandbox and on the host.
fn run_a_crowd(pod: &Pod) -> Result<()> {
    const COUNT: usize = 20;
    let containerd = pod.containerd();
    let watcher = containerd.id("watcher");
    let mut sees_all = spec(pod.id(), &watcher, &SLEEP);
    sees_all["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}]);
    let first = Shim::running(containerd, &watcher, &sees_all)?;
    // Command lines, which are empty for kernel threads, and the number of zombies.
    let script = "all=$(for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done); echo \"$all\" | sort -u; \
        cat /proc/[0-9]*/stat | grep -c ') Z '";
    let processes = |exec: &str| first.exec(exec, &["sh", "-c", script]);
    let ids: Vec<String> = (0..COUNT).map(|n| containerd.id(&format!("one-of-{n}"))).collect();
    let share = || -> Result<HashSet<_>> {
        let entries = std::fs::read_dir(containerd.path("/run/husk/husk-test").join(pod.id()).join("share"))?;
        Ok(entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<std::io::Result<_>>()?)
    };
    let (before, shared) = (Leftovers::now(containerd), share()?);
    let listed = processes("before")?;
    ensure!(listed.1.contains("sleep 1000"), "{listed:?}");

    std::thread::scope(|scope| -> Result<()> {
        let runs: Vec<_> = ids
            .iter()
            .enumerate()
            .map(|(n, id)| {
                let pod = pod.id();
                scope.spawn(move || -> Result<()> {
                    // Half of the containers exit at once, the others are killed, so that deletions mix with creations.
                    let script = format!("echo {n}; exit {n}");
                    let (args, killed) =
                        if n % 2 == 0 { (["sh", "-c", &script], false) } else { (["sleep", "1000", "1"], true) };
                    let shim = Shim::start(containerd, id, &spec(pod, id, &args))?;
                    if killed {
                        shim.create_and_start(&Streams::default())?;
                        ensure!(remove(&shim)? == 137, "{id}");
                    } else {
                        let (status, out, err) = shim.run()?;
                        ensure!((status as usize, &out) == (n, &n.to_string()), "{id}: {status} {out} {err}");
                    }
                    std::fs::remove_dir_all(&shim.bundle.outside)?;
                    Ok(())
                })
            })
            .collect();
        let results: Vec<_> = runs.into_iter().map(|run| run.join()).collect();
        for result in results {
            result.map_err(|_| anyhow::anyhow!("a run panicked"))??;
        }
        Ok(())
    })?;
    before.expect_none_since(containerd)?;
    let after = processes("after")?;
    ensure!(after == listed, "processes in the guest: {after:?}, before: {listed:?}");
    let left = share()?;
    ensure!(left == shared, "left in the share: {left:?}, before: {shared:?}");
    remove_all(&[&first])
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn twenty_concurrent_containers_in_one_vm_leave_nothing_behind() -> Result<()> {
    let containerd = &Containerd::start(Version::default_for_tests())?;
    run_a_crowd(&Pod::with_pause_container(containerd, "crowd")?)
}
