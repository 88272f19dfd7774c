//! What a container makes below its own cgroup, however odd or deep, stands in nobody's way: driven over vsock, without a shim.

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::{KillRequest, PidsRequest, StatsRequest};
use husk_tests::guest::{Guest, STEP, call, spec};
use serde_json::{Value, json};
use tokio::time::timeout;

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// A container whose cgroup is its own to divide, running a shell.
fn delegated(script: &str) -> Value {
    let mut spec = spec(&["sh", "-c", script]);
    let mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["rw", "nosuid", "noexec", "nodev"]});
    for (list, more) in [("/mounts", mount), ("/linux/namespaces", json!({"type": "cgroup"}))] {
        spec.pointer_mut(list).and_then(Value::as_array_mut).expect("the spec has it").push(more);
    }
    spec
}

/// Starts it, and answers what it has printed until it closed its stdout.
async fn begin(guest: &Guest, script: &str) -> Result<String> {
    guest.create("c", &delegated(script), "o").await?;
    guest.start("c", "").await?;
    Ok(String::from_utf8_lossy(&guest.output("c", "", false).await?).into_owned())
}

async fn pids(guest: &Guest) -> Result<usize> {
    let request = PidsRequest { id: "c".into(), ..Default::default() };
    Ok(guest.task.pids(call(), &request).await?.processes.len())
}

async fn kill_all(guest: &Guest, signal: u32) -> Result<()> {
    let request = KillRequest { id: "c".into(), signal, all: true, ..Default::default() };
    guest.task.kill(call(), &request).await?;
    Ok(())
}

/// Ends and deletes it; nothing of it is left.
async fn end(guest: &Guest) -> Result<()> {
    kill_all(guest, SIGKILL).await?;
    ensure!(guest.wait("c", "").await? == 137);
    guest.delete("c", "").await?;
    ensure!(guest.info().await?.container_cgroups == 0, "groups are left");
    Ok(())
}

#[tokio::test]
async fn a_container_with_threaded_groups_is_listed_signalled_and_deleted() -> Result<()> {
    let guest = Guest::boot().await?;
    let script = "set -e; cd /sys/fs/cgroup; busybox mkdir -p threads/inner domain/below
        echo threaded > threads/cgroup.type; echo threaded > threads/inner/cgroup.type
        sleep 1000 >/dev/null & echo $! > threads/cgroup.procs
        sleep 1000 >/dev/null & echo $! > threads/inner/cgroup.procs
        cat cgroup.type threads/inner/cgroup.type domain/cgroup.type; exec sleep 1000 >/dev/null";
    let types = begin(&guest, script).await?;
    ensure!(types == "domain threaded\nthreaded\ndomain invalid\n", "{types}");
    ensure!(pids(&guest).await? == 3);
    let stats = guest.task.stats(call(), &StatsRequest { id: "c".into(), ..Default::default() }).await?;
    ensure!(stats.stats.is_some());
    // The init of a pid namespace is not ended by a signal that it does not handle, the others are.
    kill_all(&guest, SIGTERM).await?;
    let alone = async {
        while pids(&guest).await? != 1 {}
        anyhow::Ok(())
    };
    timeout(STEP, alone).await.context("the signal has not reached all")??;
    end(&guest).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn a_container_with_a_tree_of_groups_deeper_than_any_path_is_listed_and_deleted() -> Result<()> {
    let guest = Guest::boot().await?;
    // 200 levels of 100 bytes each; PATH_MAX is 4096. Beside each group stands another, and in the last one there is a process.
    let script = "cd /sys/fs/cgroup; n=$(busybox printf %0100d 0); i=0
        while [ $i -lt 200 ] && busybox mkdir beside $n && cd -P $n 2>/dev/null; do i=$((i+1)); done
        sleep 1000 >/dev/null & echo $! > cgroup.procs
        echo $i; exec sleep 1000 >/dev/null";
    let made = begin(&guest, script).await?;
    ensure!(made == "200\n", "{made}");
    ensure!(guest.info().await?.container_cgroups == 1 + 400);
    ensure!(pids(&guest).await? == 2);
    end(&guest).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn a_container_cannot_make_more_groups_than_it_may_nor_allow_itself_more() -> Result<()> {
    let guest = Guest::boot().await?;
    let script =
        "cd /sys/fs/cgroup; cat cgroup.max.descendants; echo max > cgroup.max.descendants 2>/dev/null || echo refused
        busybox seq 4097 | busybox xargs busybox mkdir 2>/dev/null; exec sleep 1000 >/dev/null";
    let said = begin(&guest, script).await?;
    ensure!(said == "4096\nrefused\n", "{said}");
    ensure!(guest.info().await?.container_cgroups == 1 + 4096);
    ensure!(pids(&guest).await? == 1);
    end(&guest).await?;
    guest.shut_down().await?;
    Ok(())
}
