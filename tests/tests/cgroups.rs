//! Unusual cgroup trees of a container do not disturb the init. Driven over vsock, without a shim.

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::{KillRequest, PidsRequest, StatsRequest};
use husk_tests::bundle::append;
use husk_tests::guest::{Guest, STEP, call, spec};
use serde_json::{Value, json};
use tokio::time::timeout;

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// A spec of a shell whose cgroup is delegated to the container.
fn delegated(script: &str) -> Value {
    let mut spec = spec(&["sh", "-c", script]);
    let mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["rw", "nosuid", "noexec", "nodev"]});
    append(&mut spec, "/mounts", [mount]);
    append(&mut spec, "/linux/namespaces", [json!({"type": "cgroup"})]);
    spec
}

/// Starts the container and returns its output up to the end of stdout.
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

/// Kills and deletes the container; no cgroup may remain.
async fn end(guest: &Guest) -> Result<()> {
    kill_all(guest, SIGKILL).await?;
    ensure!(guest.wait("c", "").await? == 137);
    guest.delete("c", "").await?;
    ensure!(guest.info().await?.container_cgroups == 0, "cgroups remain");
    Ok(())
}

#[tokio::test]
async fn containers_with_threaded_cgroups_can_be_listed_signalled_and_deleted() -> Result<()> {
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
    // The init of a PID namespace survives a signal that it does not handle; the others die.
    kill_all(&guest, SIGTERM).await?;
    let alone = async {
        while pids(&guest).await? != 1 {}
        anyhow::Ok(())
    };
    timeout(STEP, alone).await.context("the signal did not reach every process")??;
    end(&guest).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn containers_with_cgroup_trees_deeper_than_path_max_can_be_listed_and_deleted() -> Result<()> {
    let guest = Guest::boot().await?;
    // 200 levels of 100 bytes each; PATH_MAX is 4096. Each level has a sibling, and the deepest contains a process.
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
async fn a_container_cannot_exceed_or_raise_its_cgroup_limit() -> Result<()> {
    let guest = Guest::boot().await?;
    let script =
        "cd /sys/fs/cgroup; cat cgroup.max.descendants; echo max > cgroup.max.descendants 2>/dev/null || echo refused
        busybox seq 4097 | busybox xargs busybox mkdir 2>/dev/null; exec sleep 1000 >/dev/null";
    let output = begin(&guest, script).await?;
    ensure!(output == "4096\nrefused\n", "{output}");
    ensure!(guest.info().await?.container_cgroups == 1 + 4096);
    ensure!(pids(&guest).await? == 1);
    end(&guest).await?;
    guest.shut_down().await?;
    Ok(())
}
