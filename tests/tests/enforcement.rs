//! The host enforces what it is asked for. It ends a VM that does not do so itself, limits the VM's processes, and keeps
//! the guest from writing where a container may not.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::cgroup;
use husk_tests::command::wait_for;
use husk_tests::compare;
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::events::Watch;
use husk_tests::leftovers::Leftovers;
use husk_tests::operator;
use husk_tests::process::Process;
use husk_tests::shim::Shim;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const KILL_TIMEOUT: &str = "kill_timeout_ms = 2000\n";

/// What the first containers of a daemon leave: folders that all share. `also` may stay too.
fn expect_nothing_left(containerd: &Containerd, before: &Leftovers, also: &str) -> Result<()> {
    let shared = [
        "folder /run/bundles",
        "folder /run/containerd/fifo",
        "folder /run/containerd/s",
        "folder /run/containerd/state/io.containerd.runtime.v2.task/husk-test",
        "folder /run/husk",
    ];
    before.expect_none_since_but(containerd, |line| shared.contains(&line) || line.contains(also))
}

/// All processes of virtiofsd that serve a container.
fn virtiofsds(containerd: &Containerd, id: &str) -> Result<Vec<Process>> {
    let (_, below) = containerd.shim_of(id)?;
    let found: Vec<_> = below.into_iter().filter(|process| process.name.starts_with("virtiofsd")).collect();
    ensure!(found.len() > 1, "no worker of virtiofsd: {found:?}");
    Ok(found)
}

/// A container whose program looks for files that do not exist, each of which takes a request to virtiofsd.
fn busy<'a>(containerd: &'a Containerd, name: &str) -> Result<Container<'a>> {
    let search = "n=0; while :; do n=$((n+1)); [ -e /missing$n ] && exit 1; done";
    containerd.detached(&[], name, &["sh", "-c", search])
}

/// Expects that the task exits with 137, that it can be removed, and that nothing is left of it.
fn expect_enforced(containerd: &Containerd, container: Container<'_>, end: &[&str], cause: &str) -> Result<()> {
    let events = Watch::start(containerd)?;
    let id = container.id().to_owned();
    let ended = containerd.ctr(end.iter().copied()).arg(&id).output()?;
    let published = events.collect(&id, SOON, |event| event.topic == "/tasks/exit")?;
    ensure!(published.last().is_some_and(|exit| exit.fields["exit_status"] == 137), "{published:#?}");
    if container.status()?.is_some() {
        ensure!(ended.code() == 0, "{ended}");
        ensure!(container.delete_task()? == 137);
    }
    ensure!(container.status()?.is_none(), "{end:?} left the task: {ended}");
    let died = || containerd.logged("the VM died").into_iter().find(|line| line.contains(&id));
    let logged = wait_for(SOON, "the cause is logged", died).with_context(|| containerd.log_tail())?;
    ensure!(logged.contains(cause), "{logged}\nexpected {cause}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_container_that_the_guest_cannot_kill_ends_within_the_deadline_and_can_be_removed() -> Result<()> {
    let configured = Configured::start(KILL_TIMEOUT)?;
    let containerd = &configured.containerd;
    let before = Leftovers::now(containerd);

    let container = busy(containerd, "stuck-share")?;
    container.script("true")?;
    for virtiofsd in virtiofsds(containerd, container.id())? {
        virtiofsd.stop();
    }
    let status = operator::husk(containerd, &["status", container.id()])?.ok()?.text();
    let warning = "WARNING     the share does not respond: virtiofsd is stopped by a signal or a debugger";
    ensure!(status.contains(warning), "{status}");
    let cause = "the guest reported no exit after SIGKILL within 2000 ms; virtiofsd is stopped by a signal";
    expect_enforced(containerd, container, &["task", "kill", "--signal", "SIGKILL"], cause)?;

    let container = containerd.detached(&[], "stuck-vm", &["sleep", "1000"])?;
    containerd.qemu_of(container.id())?.stop();
    // Without an answer to State, ctr does not know a PID to kill, and deletes the task at once.
    let cause = "the guest did not delete ";
    expect_enforced(containerd, container, &["task", "rm", "--force"], cause)?;
    // Nobody reads the fifos of `ctr run --detach`.
    expect_nothing_left(containerd, &before, " /run/containerd/fifo/")
}

/// The limits of a container's cgroup on the host: bytes, CPU time in microseconds per 100 ms, and processes.
fn limits(id: &str) -> Result<[Option<u64>; 3]> {
    Ok([
        cgroup::limit(id, &["memory.max", "memory.limit_in_bytes"])?,
        cgroup::limit(id, &["cpu.max", "cpu.cfs_quota_us"])?,
        cgroup::limit(id, &["pids.max"])?,
    ])
}

fn spec(id: &str) -> Value {
    let mut spec = bundle::spec(id, &["sleep", "1000"]);
    spec["process"]["oomScoreAdj"] = json!(321);
    spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    spec["linux"]["resources"]["cpu"] = json!({"quota": 50_000, "period": 100_000});
    spec["linux"]["resources"]["pids"] = json!({"limit": 100});
    spec
}

/// The memory that docs/resources.md states for a sandbox with a VM of the default size.
fn memory_of_sandbox(containerd: &Containerd, id: &str) -> Result<u64> {
    let status = operator::husk_json(containerd, &["status", "--json", id])?;
    let files = status["files"]["limit"].as_u64().with_context(|| status.to_string())?;
    let code = if status["machine"]["accel"] == "Kvm" { 0 } else { 128 };
    Ok(((512 + 128 + code) << 20) + files * 1536)
}

fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    Ok(fs::read_to_string(path).with_context(|| path.display().to_string())?.trim().to_owned())
}

/// Checks the VM's processes: their score for the OOM killer, and that they dump no core.
fn expect_processes(containerd: &Containerd, id: &str) -> Result<()> {
    let (shim, _) = containerd.shim_of(id)?;
    let groups = read(format!("/proc/{}/cgroup", shim.pid))?;
    ensure!(groups.lines().any(|line| line.ends_with(id)), "the shim is not in the sandbox's cgroup:\n{groups}");
    let mut processes = virtiofsds(containerd, id)?;
    processes.push(containerd.qemu_of(id)?);
    for Process { pid, name, .. } in processes {
        let score = read(format!("/proc/{pid}/oom_score_adj"))?;
        ensure!(score == "321", "{name} has the score {score}");
        let limits = read(format!("/proc/{pid}/limits"))?;
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).context("no limit of cores")?;
        ensure!(core.split_whitespace().nth(4) == Some("0"), "{name}: {core}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_host_limits_a_vm_as_runc_limits_a_container_and_keeps_its_root_read_only() -> Result<()> {
    let containerd = compare::tested()?;
    let runc = compare::runc()?;
    let id = runc.id("limited");
    let shim = Shim::running(runc, &id, &spec(&id))?;
    let of_runc = limits(&id)?;
    ensure!(of_runc == [Some(64 << 20), Some(50_000), Some(100)], "{of_runc:?}");
    let pid = shim.task.state(&id, "")?.pid;
    let score = runc.sh(&format!("cat /proc/{pid}/oom_score_adj"))?.text();
    ensure!(score == "321", "{score}");
    drop(shim);

    let image = containerd.unpacked_image()?;
    let before = Leftovers::now(containerd);
    let id = containerd.id("limited");
    let root = format!("/run/root-{id}");
    containerd.sh(&format!("cp -a {image} {root}"))?;
    let mut spec = spec(&id);
    spec["root"] = json!({"path": root, "readonly": true});
    for set in ["bounding", "effective", "permitted"] {
        bundle::append(&mut spec, &format!("/process/capabilities/{set}"), [json!("CAP_SYS_ADMIN")]);
    }
    let mut shim = Shim::start(containerd, &id, &spec)?;
    shim.bundle.rootfs.clear();
    shim.run_detached()?;
    let memory = Some(memory_of_sandbox(containerd, &id)?);
    ensure!(limits(&id)? == [memory, Some(100_000), Some(1124)], "{:?}, expected {memory:?}", limits(&id)?);
    expect_processes(containerd, &id)?;

    // In a VM, root can change every mount of the guest.
    let process = |script: &str| {
        let mut process = bundle::process(&["sh", "-c", script]);
        process["capabilities"] = spec["process"]["capabilities"].clone();
        process
    };
    let write = "mount -o remount,rw / && echo mine > /written; chmod 777 /bin; rm /bin/busybox; ls /";
    let (_, out, errors) = shim.exec_process("write", &process(write))?;
    ensure!(errors.contains("/written: Read-only file system"), "{out}\n{errors}");
    ensure!(!out.contains("written") && containerd.path(&root).join("bin/busybox").exists(), "{out}\n{errors}");

    let update = json!({"memory": {"limit": -1}, "cpu": {"quota": 100_000, "period": 100_000}, "pids": {"limit": 200}});
    shim.task.update(&id, &update)?;
    ensure!(limits(&id)? == [None, Some(150_000), Some(1224)], "{:?}", limits(&id)?);
    shim.task.kill(&id, "", 9)?;
    ensure!(shim.task.wait(&id, "")? == 137 && shim.task.delete(&id, "")? == 137);
    shim.shutdown();
    expect_nothing_left(containerd, &before, &root)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_end_of_one_of_two_sandboxes_in_one_cgroup_leaves_the_other_running() -> Result<()> {
    let containerd = Containerd::shared()?;
    let before = Leftovers::now(containerd);
    let group = format!("/shared-{}", containerd.id("cgroup"));
    let flags = ["--cgroup", &group];
    let first = containerd.detached_with(Runtime::Husk, &flags, "first", &["sleep", "1000"])?;
    let second = containerd.detached_with(Runtime::Husk, &flags, "second", &["sleep", "1000"])?;
    first.kill_and_wait()?;
    first.delete_task()?;
    ensure!(second.script("echo runs")? == "runs");
    ensure!(!cgroup::find(&group[1..]).is_empty(), "the cgroup is gone");
    drop((first, second));
    expect_nothing_left(containerd, &before, " /run/containerd/fifo/")
}
