//! Containers of one sandbox share a shim and a VM, and nothing else unless their specs say so.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::artifacts::Version;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::husk_only;
use husk_tests::leftovers::Leftovers;
use husk_tests::shim::{Shim, Streams, code};
use serde_json::{Value, json};

/// The annotation with which the CRI plugin identifies a container's pod.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

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

#[test]
fn containers_of_a_sandbox_share_a_vm_of_the_pods_size_but_not_files_or_cgroups() -> Result<()> {
    husk_only!();
    let containerd = Containerd::shared()?;
    let (pod, other) = (containerd.id("pod"), containerd.id("other"));
    let mut sized = spec(&pod, &pod, &SLEEP);
    // As the CRI plugin tells the limits of the pod's containers together: 900 MiB, and one and a half CPUs.
    let limits = [("memory", "943718400"), ("cpu-quota", "150000"), ("cpu-period", "100000"), ("cpu-shares", "1536")];
    for (name, value) in limits {
        sized["annotations"][format!("io.kubernetes.cri.sandbox-{name}")] = json!(value);
    }
    let first = Shim::running(containerd, &pod, &sized)?;
    let second = Shim::running(containerd, &other, &spec(&pod, &other, &SLEEP))?;
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
    Ok(())
}

#[test]
fn a_sandbox_lives_until_its_last_container_is_deleted() -> Result<()> {
    husk_only!();
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
    wait_for(Duration::from_secs(20), "the shim and its children are gone", gone)
}

#[test]
fn a_container_can_join_namespaces_of_the_first_by_path() -> Result<()> {
    husk_only!();
    let containerd = Containerd::shared()?;
    let (pod, other) = (containerd.id("joined"), containerd.id("joins"));
    let first = Shim::running(containerd, &pod, &spec(&pod, &pod, &SLEEP))?;
    // The CRI plugin builds the paths from this PID.
    let pid = first.task.state(&pod, "")?.pid;
    let mut joins = spec(&pod, &other, &SLEEP);
    joins["linux"]["namespaces"] = json!([
        {"type": "mount"},
        {"type": "network", "path": format!("/proc/{pid}/ns/net")},
        {"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")},
        {"type": "uts", "path": format!("/proc/{pid}/ns/uts")},
        {"type": "pid", "path": format!("/proc/{pid}/ns/pid")},
    ]);
    // Only the creator of a UTS namespace may set the host name.
    joins.as_object_mut().context("an object")?.remove("hostname");
    let second = Shim::running(containerd, &other, &joins)?;
    for namespace in ["net", "ipc", "uts", "pid"] {
        let link = ["readlink", &format!("/proc/self/ns/{namespace}")];
        let (one, two) = (first.exec("ns", &link)?, second.exec("ns", &link)?);
        ensure!(one.0 == 0 && one == two, "{namespace}: {one:?} {two:?}");
    }
    ensure!(second.exec("name", &["hostname"])?.1 == "husk-test");
    // The first container sees the second's process in the shared PID namespace.
    let processes = first.exec("ps", &["ps", "-o", "args"])?.1;
    ensure!(processes.lines().filter(|line| line.starts_with("sleep")).count() == 2, "{processes}");
    // The joined container's process is not the PID namespace's init; its exit must still be noticed.
    ensure!(remove(&second)? == 137);
    ensure!(first.exec("there", &["echo", "there"])? == (0, "there".to_owned()));
    Ok(())
}

#[test]
fn a_namespace_path_from_outside_the_sandbox_is_rejected() -> Result<()> {
    husk_only!();
    let containerd = Containerd::shared()?;
    let (pod, other) = (containerd.id("refuses"), containerd.id("refused"));
    let _first = Shim::running(containerd, &pod, &spec(&pod, &pod, &SLEEP))?;
    for path in ["/proc/1/ns/net", "/proc/self/ns/net", "/run/netns/host"] {
        let mut wrong = spec(&pod, &other, &SLEEP);
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

#[test]
fn twenty_concurrent_containers_in_one_vm_leave_nothing_behind() -> Result<()> {
    husk_only!();
    const COUNT: usize = 20;
    let containerd = &Containerd::start(Version::default_for_tests())?;
    let pod = containerd.id("crowd");
    let mut sees_all = spec(&pod, &pod, &SLEEP);
    sees_all["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}]);
    let first = Shim::running(containerd, &pod, &sees_all)?;
    // Command lines, which are empty for kernel threads, and the number of zombies.
    let script = "all=$(for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done); echo \"$all\" | sort -u; \
        cat /proc/[0-9]*/stat | grep -c ') Z '";
    let processes = |exec: &str| first.exec(exec, &["sh", "-c", script]);
    let ids: Vec<String> = (0..COUNT).map(|n| containerd.id(&format!("one-of-{n}"))).collect();
    let before = Leftovers::now(containerd);
    let listed = processes("before")?;
    ensure!(listed.1.contains("sleep 1000"), "{listed:?}");

    std::thread::scope(|scope| -> Result<()> {
        let runs: Vec<_> = ids
            .iter()
            .enumerate()
            .map(|(n, id)| {
                let pod = &pod;
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
    let left: HashSet<_> = std::fs::read_dir(containerd.path("/run/husk/husk-test").join(&pod).join("share"))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<std::io::Result<_>>()?;
    ensure!(left.len() == 1, "left in the share: {left:?}");
    Ok(())
}
