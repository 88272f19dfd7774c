//! VMs that wait: what a container in one of them sees, and that nobody gets one twice, or half of one.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::leftovers::Leftovers;
use husk_tests::operator::{folder, husk, husk_json};
use serde_json::Value;

/// For a boot and a rehearsal on a loaded machine that emulates its VMs.
const BOOT: Duration = Duration::from_secs(120);
/// husk's configuration in the daemon's /run.
const CONFIG: &str = "/run/containerd/husk.toml";
/// What the log says of a sandbox that has got a VM from the pool.
const WARM: &str = "the sandbox has a VM from the pool";

/// A daemon whose pool has this many VMs.
fn with_pool(size: u32) -> Result<Containerd> {
    Containerd::with(Setup { husk: format!("pool = {size}\n"), ..Setup::default() })
}

/// The waiting VMs.
fn pool(containerd: &Containerd) -> Result<Vec<Value>> {
    let listed = husk_json(containerd, &["pool", "list", "--json"])?;
    Ok(listed.as_array().context("no list")?.clone())
}

/// Fills the pool, and waits until this many VMs wait.
fn filled(containerd: &Containerd, size: usize) -> Result<Vec<Value>> {
    husk(containerd, &["pool", "fill"])?;
    wait_for(BOOT, "the pool is full", || {
        let waiting = pool(containerd).ok()?;
        (waiting.len() == size && waiting.iter().all(|vm| vm["state"] == "waiting")).then_some(waiting)
    })
    .with_context(|| format!("{:?}", pool(containerd)))
}

fn pids(pool: &[Value]) -> BTreeSet<u64> {
    pool.iter().filter_map(|vm| vm["pid"].as_u64()).collect()
}

/// What a program in a container can see of its surroundings, without what differs from boot to boot.
const LOOK: &str = "id; pwd; env | sort; hostname; cat /proc/mounts | sed 's/inode64//'; ls / /dev /sys /run; ip addr; ip route; \
    wc -l </proc/1/cgroup; cat /proc/self/status | grep -E '^(Cap|Seccomp|NoNew)'; \
    cat /proc/cmdline | tr ' ' '\\n' | grep -vE 'husk.epoch_ns|tsc_early_khz|virtio_net.held'; cat /proc/sys/kernel/hostname; \
    ls /sys/fs/cgroup; cat /proc/self/limits; free | head -1; ls -l /proc/self/ns | wc -l";

#[test]
fn a_container_in_a_waiting_vm_sees_what_it_would_in_its_own_and_leaves_nothing_behind() -> Result<()> {
    let containerd = with_pool(1)?;
    // Cold: the pool is empty, and is filled after this container's start.
    let cold = containerd.script(&[], "cold", LOOK)?;
    let waiting = filled(&containerd, 1)?;
    let boot_id = "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1; date +%s";
    let warm = containerd.detached(&[], "warm", &["sh", "-c", "sleep 1000"])?;
    containerd.await_logged(WARM, 1).context("the container did not get the waiting VM")?;
    let state: Value = serde_json::from_slice(&fs::read(folder(&containerd, warm.id()).join("state.json"))?)?;
    ensure!(state["machine"]["process"]["pid"] == waiting[0]["pid"], "{state}");
    ensure!(state["sandbox"] == warm.id() && state["namespace"] == "husk-test", "{state}");
    // The tools find it under its name.
    let listed = husk_json(&containerd, &["list", "--json"])?;
    ensure!(listed.as_array().is_some_and(|all| all.len() == 1 && all[0]["sandbox"] == warm.id()), "{listed}");
    let first = warm.script(boot_id)?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    ensure!(warm.script("echo out; echo err >&2; exit 0")?.contains("out"));
    warm.kill_and_wait()?;
    ensure!(warm.delete_task()? == 137);
    containerd.ctr(["container", "rm", warm.id()]).ok()?;
    in_a_pods_network(&containerd)?;
    // The next one has another VM, which the first has ordered.
    let next = filled(&containerd, 1)?;
    ensure!(pids(&next).is_disjoint(&pids(&waiting)));
    let looked = containerd.script(&[], "warm", LOOK)?;
    ensure!(containerd.await_logged(WARM, 3)?.len() == 3, "{}", containerd.log_tail());
    ensure!(looked == cold, "cold:\n{cold}\nwarm:\n{looked}");
    let shown: u64 = first.lines().last().context("no date")?.trim().parse()?;
    ensure!(now.abs_diff(shown) < 60, "the container's clock shows {shown} instead of {now}");
    drained(&containerd)
}

/// The card of a waiting VM moves to the namespace that a spec names, and the link's addresses are there.
fn in_a_pods_network(containerd: &Containerd) -> Result<()> {
    containerd.sh(
        "ip netns add pod && ip link add v0 type veth peer name eth0 netns pod && ip addr add 10.9.0.1/24 dev v0 && \
         ip link set v0 up && ip -n pod addr add 10.9.0.2/24 dev eth0 && ip -n pod link set eth0 up && \
         ip -n pod link set lo up && ip -n pod route add default via 10.9.0.1",
    )?;
    let flags = ["--with-ns", "network:/run/netns/pod"];
    let look = "ip addr | sed 's/qdisc.*//'; ip route; ping -c 1 -W 20 10.9.0.1 >/dev/null && echo reached";
    filled(containerd, 1)?;
    let warm = containerd.script(&flags, "pod", look)?;
    ensure!(containerd.await_logged(WARM, 2)?.len() == 2, "{}", containerd.log_tail());
    ensure!(warm.contains("10.9.0.2/24") && warm.ends_with("reached"), "{warm}");
    let config = containerd.path(CONFIG);
    let text = fs::read_to_string(&config)?;
    fs::write(&config, text.replace("pool = 1", "pool = 0"))?;
    let cold = containerd.script(&flags, "pod", look)?;
    fs::write(&config, text)?;
    ensure!(containerd.logged(WARM).len() == 2, "{}", containerd.log_tail());
    ensure!(warm == cold, "warm:\n{warm}\ncold:\n{cold}");
    let left = containerd.sh("ip -n pod -br link; tc -n pod qdisc show")?.text();
    ensure!(!left.contains("husk") && !left.contains("ingress"), "{left}");
    containerd.sh("ip netns del pod").map(drop)
}

/// Empties the pool, and finds nothing of it.
fn drained(containerd: &Containerd) -> Result<()> {
    // A VM that a start has ordered may not be in the pool yet.
    wait_for(BOOT, "the pool is quiet", || {
        husk(containerd, &["pool", "drain"]).ok()?;
        let left = containerd.path("/run/husk/.pool").exists();
        (!left && pool(containerd).ok()?.is_empty()).then_some(())
    })?;
    let left = Leftovers::now(containerd);
    let text = format!("{left:?}");
    ensure!(!text.contains("qemu") && !text.contains("virtiofsd") && !text.contains("/run/husk/.pool/"), "{text}");
    Ok(())
}

#[test]
fn parallel_starts_never_share_a_vm_and_all_succeed() -> Result<()> {
    let containerd = with_pool(3)?;
    let waiting = pids(&filled(&containerd, 3)?);
    let machines = std::thread::scope(|scope| -> Result<Vec<u64>> {
        let starts: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| -> Result<u64> {
                    let container = containerd.detached(&[], "parallel", &["sleep", "1000"])?;
                    let path = folder(&containerd, container.id()).join("state.json");
                    let state: Value = serde_json::from_slice(&fs::read(path)?)?;
                    ensure!(container.script("echo works")?.trim() == "works");
                    container.kill_and_wait()?;
                    ensure!(container.delete_task()? == 137);
                    containerd.ctr(["container", "rm", container.id()]).ok()?;
                    state["machine"]["process"]["pid"].as_u64().context("no machine")
                })
            })
            .collect();
        starts.into_iter().map(|start| start.join().map_err(|_| anyhow::anyhow!("a start panicked"))?).collect()
    })?;
    let used: BTreeSet<u64> = machines.iter().copied().collect();
    ensure!(used.len() == 8, "a VM was used twice: {machines:?}");
    ensure!(waiting.is_subset(&used), "{waiting:?} waited, {used:?} were used\n{}", containerd.log_tail());
    drained(&containerd)
}

#[test]
fn a_dead_a_claimed_and_an_outdated_vm_are_not_handed_out() -> Result<()> {
    let containerd = with_pool(1)?;
    let run = |name: &str| containerd.script(&[], name, "echo works");
    // Its QEMU dies.
    let waiting = filled(&containerd, 1)?;
    kill(&containerd, &waiting[0]["pid"])?;
    ensure!(run("machine")?.trim() == "works");
    // Its shim dies, and leaves its directory.
    let waiting = filled(&containerd, 1)?;
    kill(&containerd, &waiting[0]["shim"])?;
    ensure!(run("shim")?.trim() == "works");
    // The shim does not answer the process that has claimed it.
    let waiting = filled(&containerd, 1)?;
    signal(&containerd, "STOP", &waiting[0]["shim"])?;
    ensure!(run("stopped")?.trim() == "works");
    let untaken = containerd.await_logged("a waiting shim did not take the sandbox", 1)?;
    ensure!(untaken.len() == 1, "{untaken:#?}");
    // Another process has claimed it, and has died.
    let waiting = filled(&containerd, 1)?;
    let dir = containerd.path(PathBuf::from(waiting[0]["dir"].as_str().context("no folder")?));
    fs::rename(dir.join("waiting.sock"), dir.join("claimed.sock"))?;
    ensure!(run("claimed")?.trim() == "works");
    ensure!(containerd.logged(WARM).is_empty(), "{}", containerd.log_tail());
    kill(&containerd, &waiting[0]["shim"])?;
    // The configuration changes.
    let waiting = filled(&containerd, 1)?;
    let config = containerd.path(CONFIG);
    let text = fs::read_to_string(&config)?;
    fs::write(&config, format!("{text}memory_mib = 300\n"))?;
    let memory = containerd.script(&[], "config", "grep MemTotal /proc/meminfo | tr -dc 0-9")?;
    ensure!(memory.trim().parse::<u64>()? < 310 << 10, "{memory}");
    ensure!(containerd.logged(WARM).is_empty(), "{}", containerd.log_tail());
    let next = wait_for(BOOT, "the VM with the old configuration has gone", || {
        let now = pool(&containerd).ok()?;
        let new = now.iter().all(|vm| vm["key"] != waiting[0]["key"]) && now.len() == 1 && now[0]["state"] == "waiting";
        new.then_some(now)
    })?;
    ensure!(next[0]["memory_mib"] == 300, "{next:?}");
    ensure!(run("new")?.trim() == "works");
    ensure!(containerd.await_logged(WARM, 1)?.len() == 1, "{}", containerd.log_tail());
    drained(&containerd)
}

fn kill(containerd: &Containerd, pid: &Value) -> Result<()> {
    signal(containerd, "KILL", pid)?;
    let gone = format!("! kill -0 {pid}");
    wait_for(Duration::from_secs(60), "the process ends", || containerd.sh(&gone).ok().map(drop))
}

/// Signals a process by its number in the daemon's namespace.
fn signal(containerd: &Containerd, signal: &str, pid: &Value) -> Result<()> {
    containerd.sh(&format!("kill -{signal} {pid}")).map(drop)
}

#[test]
fn a_shim_that_is_killed_while_it_gets_a_sandbox_leaves_a_container_or_nothing() -> Result<()> {
    let containerd = with_pool(1)?;
    containerd.script(&[], "first", "true")?;
    drained(&containerd)?;
    let before = Leftovers::now(&containerd);
    for delay in [0, 20, 50, 100, 200] {
        let waiting = filled(&containerd, 1)?;
        let id = containerd.id("killed");
        let ran = std::thread::scope(|scope| {
            let started = scope.spawn(|| containerd.run(&[], &id, &["echo", "works"]).output());
            // Not to wait for anything: the shim may be killed at any moment.
            std::thread::sleep(Duration::from_millis(delay));
            // Fails if it has served its sandbox to the end.
            let _ = signal(&containerd, "KILL", &waiting[0]["shim"]);
            started.join().map_err(|_| anyhow::anyhow!("the run panicked"))?
        })?;
        // A shim that dies before it confirms is replaced. Later, its task is lost, as with any shim.
        if ran.code() != 0 {
            let _ = containerd.ctr(["task", "rm", "--force", &id]).output()?;
            let _ = containerd.ctr(["container", "rm", &id]).output()?;
        } else {
            ensure!(ran.text() == "works", "{delay} ms: {ran}");
        }
        ensure!(containerd.script(&[], "next", "echo works")? == "works");
    }
    drained(&containerd)?;
    before.expect_none_since_but(&containerd, |line| line.contains("/run/containerd/fifo"))
}
