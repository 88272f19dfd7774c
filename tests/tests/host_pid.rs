//! The PID that containerd reports is that of a process on the host, as under runc: in the container's network namespace
//! and cgroup, and alive as long as the container.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::events::task::TaskExit;
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Container, Containerd};
use husk_tests::leftovers::Leftovers;
use husk_tests::process::{self, Process};
use husk_tests::shim::{Shim, Streams};
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];
const SOON: Duration = Duration::from_secs(60);
/// The annotation with which the CRI plugin identifies a container's pod.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// The PID that `ctr task ls` shows.
fn shown_pid(containerd: &Containerd, id: &str) -> Result<u32> {
    let list = containerd.ctr(["task", "ls"]).ok()?.text();
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(id)).context("no such task")?;
    line.split_whitespace().nth(1).context("no PID")?.parse().with_context(|| line.to_owned())
}

/// The holders below the daemon.
fn holders(containerd: &Containerd) -> Vec<Process> {
    let all = process::descendants(containerd.pid()).into_iter();
    all.filter(|process| process.name == "husk-holder" && !process.zombie).collect()
}

fn no_holder_is_left(containerd: &Containerd, id: &str) -> Result<()> {
    let name = format!("/{id}");
    wait_for(SOON, "the holder is gone", || {
        (!holders(containerd).iter().any(|holder| holder.command.ends_with(&name))).then_some(())
    })
}

/// What a user finds out about a process of the host.
fn seen(containerd: &Containerd, pid: u32) -> Result<String> {
    let script = format!(
        "readlink /proc/{pid}/ns/net
        nsenter -t {pid} -n ip -o link | cut -d: -f2 | grep -v husk- | sort | xargs echo
        nsenter -t {pid} -n ip -o addr show dev lo | grep -c 127.0.0.1/8"
    );
    Ok(containerd.sh(&script)?.text())
}

#[test]
fn a_pid_leads_to_the_containers_network_and_cgroup_as_under_runc() -> Result<()> {
    let containerd = Containerd::shared()?;
    let name = containerd.id("named");
    containerd.sh(&format!("ip netns add {name}; ip -n {name} link set lo up"))?;
    let _netns = Removed(containerd, &name);
    let own = containerd.sh("readlink /proc/self/ns/net")?.text();
    let named = format!("net:[{}]", containerd.sh(&format!("stat -Lc %i /run/netns/{name}"))?.text());
    let by_path = format!("network:/run/netns/{name}");
    for runtime in [Runtime::Runc, Runtime::Husk] {
        for (flags, expected) in
            [(&["--with-ns", by_path.as_str()][..], Some(&named)), (&["--net-host"], Some(&own)), (&[], None)]
        {
            let container = containerd.detached_with(runtime, flags, "pid", &SLEEP)?;
            let pid = shown_pid(containerd, container.id())?;
            let seen = seen(containerd, pid)?;
            let lines: Vec<&str> = seen.lines().collect();
            match expected {
                Some(expected) => ensure!(lines[0] == expected, "{runtime:?} {flags:?}: {seen}"),
                // A new namespace.
                None => ensure!(lines[0] != own && lines[0] != named, "{runtime:?} {flags:?}: {seen}"),
            }
            if flags != ["--net-host"] {
                ensure!(lines[1..] == ["lo", "1"], "{runtime:?} {flags:?}: {seen}");
            }
            let cgroups = containerd.sh(&format!("cat /proc/{pid}/cgroup"))?.text();
            ensure!(cgroups.contains(&format!("/husk-test/{}\n", container.id())), "{runtime:?}: {cgroups}");
            if runtime == Runtime::Husk {
                let qemu = containerd.qemu_of(container.id())?;
                let of_qemu = std::fs::read_to_string(format!("/proc/{}/cgroup", qemu.pid))?;
                let holder = holders(containerd).into_iter().find(|one| one.command.ends_with(container.id()));
                let holder = holder.context("no holder")?;
                ensure!(of_qemu == std::fs::read_to_string(format!("/proc/{}/cgroup", holder.pid))?, "{of_qemu}");
                ensure!(holder.command == format!("husk-holder: husk-test/{}", container.id()), "{holder:?}");
            }
            containerd.sh(&format!("kill -9 {pid}"))?;
            container.await_status("STOPPED")?;
            ensure!(container.delete_task()? == 137, "{runtime:?} {flags:?}");
        }
    }
    Ok(())
}

/// A network namespace that is removed with this value.
struct Removed<'a>(&'a Containerd, &'a str);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        // The test does not depend on it.
        let _ = self.0.sh(&format!("ip netns delete {}", self.1));
    }
}

#[test]
fn killing_the_process_ends_the_container_and_its_execs_once() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "held")?;
    let id = &shim.bundle.id;
    let pid = shim.task.state(id, "")?.pid;
    shim.start_exec("one", &bundle::process(&SLEEP), &Streams::default())?;
    if containerd.runtime() == Runtime::Husk {
        ensure!(shim.task.state(id, "one")?.pid == pid, "an exec's PID is that of its container's holder");
    }
    containerd.sh(&format!("kill -9 {pid}"))?;
    ensure!((shim.task.wait(id, "one")?, shim.task.wait(id, "")?) == (137, 137));
    ensure!(shim.task.state(id, "")?.pid == pid, "the PID stays known");
    ensure!(shim.task.delete(id, "one")? == 137 && shim.task.delete(id, "")? == 137);
    let events = shim.events.until("/tasks/delete", SOON)?;
    let exits: Vec<TaskExit> = events
        .iter()
        .filter(|event| event.topic == "/tasks/exit")
        .map(|event| event.decode())
        .collect::<Result<_>>()?;
    let ids: Vec<&str> = exits.iter().map(|exit| exit.id.as_str()).collect();
    ensure!(ids == ["one", id.as_str()] && exits[1].pid == pid, "{exits:?}");
    Ok(())
}

#[test]
fn a_container_that_was_created_and_not_started_ends_with_its_process_too() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("created");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &SLEEP))?;
    let pid = shim.create(&Streams::default())?;
    containerd.sh(&format!("kill -9 {pid}"))?;
    ensure!(shim.task.wait(&id, "")? == 137);
    ensure!(shim.task.delete(&id, "")? == 137);
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_process_is_gone_after_the_exit_and_after_the_shims_death() -> Result<()> {
    let containerd = &Containerd::start(Version::default_for_tests())?;
    let (exits, dies) = (containerd.id("exits"), containerd.id("dies"));
    {
        let shim = Shim::running(containerd, &exits, &bundle::spec(&exits, &SLEEP))?;
        let pid = shim.task.state(&exits, "")?.pid;
        shim.task.kill(&exits, "", 9)?;
        shim.task.wait(&exits, "")?;
        // At once and before Delete, as with runc.
        containerd.sh(&format!("test ! -e /proc/{pid}"))?;
        ensure!(shim.task.state(&exits, "")?.pid == pid, "the PID of a stopped container is still reported");
        ensure!(shim.task.delete(&exits, "")? == 137);
        shim.shutdown();
        no_holder_is_left(containerd, &exits)?;
        std::fs::remove_dir_all(&shim.bundle.outside)?;
    }
    // The first container has created folders that stay.
    let before = Leftovers::now(containerd);
    let shim = Shim::running(containerd, &dies, &bundle::spec(&dies, &SLEEP))?;
    let (serving, _) = containerd.shim_of(&dies)?;
    ensure!(holders(containerd).len() == 1, "{:?}", holders(containerd));
    serving.kill();
    // Without any cleanup: the kernel ends it.
    no_holder_is_left(containerd, &dies)?;
    shim.delete_action()?.ok()?;
    std::fs::remove_dir_all(&shim.bundle.outside)?;
    before.expect_none_since(containerd)
}

#[test]
fn a_hook_configures_the_containers_network_by_its_pid() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("cni");
    let mut spec = bundle::spec(&id, &SLEEP);
    let script = "state=$(cat); echo \"$state\" > state.json
        pid=$(echo \"$state\" | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')
        readlink /proc/$pid/ns/net > netns; cat /proc/$pid/cgroup > cgroup
        ip link add out$pid type veth peer name made netns $pid";
    spec["hooks"] = json!({"createRuntime": [
        {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "timeout": 20}
    ]});
    let shim = Shim::start(containerd, &id, &spec)?;
    let pid = shim.create(&Streams::default())?;
    let read = |file: &str| std::fs::read_to_string(shim.bundle.outside.join(file));
    let state: Value = serde_json::from_str(&read("state.json")?)?;
    ensure!(state["pid"] == json!(pid) && state["status"] == "creating", "{state}");
    ensure!(read("cgroup")?.contains(&format!("/husk-test/{id}\n")), "{}", read("cgroup")?);
    let links =
        containerd.sh(&format!("readlink /proc/{pid}/ns/net; nsenter -t {pid} -n ip -o link show made"))?.text();
    ensure!(links.starts_with(read("netns")?.trim()) && links.contains(" made@"), "{links}");
    ensure!(containerd.sh("ip link show made").is_err(), "the hook acted on the host's own links");
    Ok(())
}

/// The spec of a container of this sandbox, with these namespaces besides `mount`.
fn in_sandbox(sandbox: &str, id: &str, namespaces: &[Value]) -> Value {
    let mut spec = bundle::spec(id, &SLEEP);
    spec["annotations"] = json!({ SANDBOX_ID: sandbox });
    spec["linux"]["namespaces"] = json!([&[json!({"type": "mount"})], namespaces].concat());
    // Only the creator of a UTS namespace may set the host name.
    spec.as_object_mut().into_iter().for_each(|spec| drop(spec.remove("hostname")));
    spec
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_pod_has_a_pid_for_each_container_and_a_debug_container_joins_its_target() -> Result<()> {
    let containerd = Containerd::shared()?;
    let [pod, one, two, debugger] = ["pod", "one", "two", "debugger"].map(|name| containerd.id(name));
    let pause = Shim::running(
        containerd,
        &pod,
        &in_sandbox(&pod, &pod, &["network", "ipc", "uts", "pid"].map(|kind| json!({"type": kind}))),
    )?;
    let of_pause = pause.task.state(&pod, "")?.pid;
    let joins = |pid: u32, kind: &str, name: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{name}")});
    // As the CRI plugin does it.
    let shared = [joins(of_pause, "network", "net"), joins(of_pause, "ipc", "ipc"), joins(of_pause, "uts", "uts")];
    let with_pid = |pid: Value| [&shared[..], &[pid]].concat();
    let first = Shim::running(containerd, &one, &in_sandbox(&pod, &one, &with_pid(json!({"type": "pid"}))))?;
    let second = Shim::running(containerd, &two, &in_sandbox(&pod, &two, &with_pid(json!({"type": "pid"}))))?;
    let pids = [of_pause, first.task.state(&one, "")?.pid, second.task.state(&two, "")?.pid];
    ensure!(pids[0] != pids[1] && pids[1] != pids[2] && pids[0] != pids[2], "{pids:?}");
    let namespaces = pids.map(|pid| containerd.sh(&format!("readlink /proc/{pid}/ns/net")).map(|shown| shown.text()));
    let [Ok(a), Ok(b), Ok(c)] = namespaces else { anyhow::bail!("{namespaces:?}") };
    ensure!(a == b && b == c && a.starts_with("net:"), "{a} {b} {c}");

    // kubectl debug --target.
    let spec = in_sandbox(&pod, &debugger, &with_pid(joins(pids[2], "pid", "pid")));
    let debugger = Shim::running(containerd, &debugger, &spec)?;
    for (namespace, target) in [("net", &pause), ("ipc", &pause), ("uts", &pause), ("pid", &second)] {
        let link = ["readlink", &format!("/proc/self/ns/{namespace}")];
        ensure!(debugger.exec("ns", &link)? == target.exec("ns", &link)?, "{namespace}");
    }
    let link = ["readlink", "/proc/self/ns/pid"];
    ensure!(debugger.exec("ns", &link)? != first.exec("ns", &link)?, "the other container's PID namespace");
    // The target's process, the debugger's own, and ps.
    let processes = debugger.script("ps", "ps -o args | grep -c '^sleep'")?;
    ensure!(processes == "2", "{processes}");

    // A container that has exited cannot be joined: its PID may be another process's by now.
    first.task.kill(&one, "", 9)?;
    first.task.wait(&one, "")?;
    let late = containerd.id("late");
    let shim = Shim::start(containerd, &late, &in_sandbox(&pod, &late, &[joins(pids[1], "pid", "pid")]))?;
    let error = shim.create_error()?;
    let expected = format!("process {} does not represent a running container of this sandbox", pids[1]);
    ensure!(error.contains(&expected), "{error}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_pid_survives_a_restart_of_containerd() -> Result<()> {
    let containerd = &Containerd::start(Version::default_for_tests())?;
    let container: Container<'_> = containerd.detached(&[], "stays", &SLEEP)?;
    let pid = shown_pid(containerd, container.id())?;
    containerd.stop(nix::sys::signal::Signal::SIGKILL)?;
    containerd.restart()?;
    ensure!(shown_pid(containerd, container.id())? == pid);
    containerd.sh(&format!("readlink /proc/{pid}/ns/net"))?;
    Ok(())
}
