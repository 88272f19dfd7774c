//! Resource usage: every field that the guest's kernel counts, under the names known to containerd's clients.

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::bundle;
use husk_tests::containerd::Containerd;
use husk_tests::shim::{Shim, Streams, code};
use serde_json::json;

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn stats_contain_every_field_that_the_guests_kernel_counts() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("stats");
    let mut spec = bundle::spec(&id, &["sleep", "1000"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    spec["linux"]["resources"]["cpu"] = json!({"quota": 50_000, "period": 100_000});
    spec["linux"]["resources"]["pids"] = json!({"limit": 77});
    let shim = Shim::start(containerd, &id, &spec)?;
    ensure!(code(&shim.task.stats(&id)) == Some(Code::NOT_FOUND), "Stats before Create");
    shim.create(&Streams::default())?;
    let created = shim.task.metrics(&id)?;
    ensure!((created.pids.current, created.pids.limit) == (1, 77), "{created}");
    shim.task.start(&id, "")?;
    shim.script("works", "dd if=/dev/zero of=/run/file bs=1M count=8; head -c 3000000 /dev/urandom | md5sum")?;

    let now = shim.task.metrics(&id)?;
    let (cpu, memory) = (&now.cpu, &now.memory);
    ensure!((now.pids.current, now.pids.limit) == (1, 77), "{now}");
    ensure!(cpu.usage_usec > 0 && cpu.user_usec > 0 && cpu.system_usec > 0, "{now}");
    ensure!(cpu.usage_usec > created.cpu.usage_usec && cpu.usage_usec < 60_000_000, "{now}");
    ensure!(cpu.nr_periods > 0 && cpu.psi.some.is_some() && cpu.psi.full.is_some(), "{now}");
    ensure!(
        cpu.nr_throttled > 0 && cpu.throttled_usec > 0 && cpu.psi.some.total > 0,
        "the CPU limit never throttled the container: {now}"
    );
    ensure!(memory.usage_limit == 64 << 20 && memory.usage >= 8 << 20 && memory.max_usage >= memory.usage, "{now}");
    ensure!(memory.shmem >= 8 << 20 && memory.file >= memory.shmem && memory.anon > 0, "{now}");
    ensure!(memory.kernel_stack > 0 && memory.slab > 0 && memory.pgfault > 0 && memory.psi.is_some(), "{now}");
    ensure!(memory.slab >= memory.slab_unreclaimable && memory.swap_limit == u64::MAX, "{now}");
    ensure!(now.memory_events.is_some() && now.memory_events.oom_kill == 0, "{now}");
    ensure!(now.io.is_some() && now.io.psi.is_some() && now.rdma.is_none(), "{now}");
    let huge = now.hugetlb.iter().find(|huge| huge.pagesize == "2MB");
    ensure!(huge.is_some_and(|huge| huge.current == 0 && huge.max == u64::MAX), "{now}");
    ensure!(now.network.iter().any(|network| network.name == "lo"), "{now}");

    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    let stopped = shim.task.metrics(&id)?;
    ensure!(stopped.pids.current == 0 && stopped.cpu.usage_usec >= cpu.usage_usec, "{stopped}");
    shim.task.delete(&id, "")?;
    ensure!(code(&shim.task.stats(&id)) == Some(Code::NOT_FOUND));
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn ctr_task_metrics_shows_the_stats_with_every_containerd() -> Result<()> {
    for version in Version::ALL {
        let containerd = Containerd::shared_of(version)?;
        let container = containerd.detached(&["--memory-limit", "67108864"], "metrics", &["sleep", "1000"])?;
        let shown = containerd.ctr(["task", "metrics", container.id()]).ok()?.text();
        let value = |name: &str| {
            let mut lines = shown.lines().filter_map(|line| line.split_once(char::is_whitespace));
            let value = lines.find(|(one, _)| *one == name).and_then(|(_, value)| value.trim().parse::<u64>().ok());
            value.with_context(|| format!("{version:?} shows no {name}:\n{shown}"))
        };
        ensure!(value("pids.current")? == 1 && value("memory.usage_limit")? == 64 << 20, "{version:?}:\n{shown}");
        let cpu = ["cpu.usage_usec", "cpu.user_usec", "cpu.system_usec", "memory.usage"];
        ensure!(cpu.iter().map(|name| value(name)).sum::<Result<u64>>()? > 0, "{version:?}:\n{shown}");
        let json = containerd.ctr(["task", "metrics", "--format", "json", container.id()]).ok()?.text();
        ensure!(serde_json::from_str::<serde_json::Value>(&json)?.is_object(), "{version:?}: {json}");
    }
    Ok(())
}

#[test]
fn pids_are_listed_with_their_exec_ids() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("pids");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    let init = shim.create(&Streams::default())?;
    let before = shim.task.pids(&id)?;
    ensure!(before.len() == 1 && before[0].pid == init, "Pids before Start: {before:?} {init}");
    shim.task.start(&id, "")?;
    shim.task.exec(&id, "one", &bundle::process(&["sh", "-c", "sleep 1000; true"]), &Streams::default())?;
    let one = shim.task.start(&id, "one")?;
    // Under husk, a container and its execs have one PID on the host.
    let shared = shim.containerd().runtime() == Runtime::Husk;
    ensure!((one == init) == shared, "{one} {init}");
    shim.script("sees-it", "until [ $(pidof sleep | wc -w) = 2 ]; do :; done")?;
    let pids = shim.task.pids(&id)?;
    ensure!(pids.len() == 3, "expected the init, the exec's shell and its child: {pids:?}");
    ensure!(pids.iter().any(|process| process.pid == init && process.info.is_none()), "no {init}: {pids:?}");
    for process in pids {
        match process.info.as_ref() {
            // Protobuf field 1, a string of three bytes.
            Some(info) => {
                ensure!(
                    info.type_url == "containerd.runc.v1.ProcessDetails" && info.value == b"\x0a\x03one",
                    "{info:?}"
                );
                ensure!(process.pid == one, "{process:?}, the exec's PID is {one}");
            }
            None => ensure!(process.pid != one || shared, "{process:?} has no exec id"),
        }
    }
    Ok(())
}

#[test]
fn ctr_task_ps_shows_execs_with_every_containerd() -> Result<()> {
    for version in Version::ALL {
        let containerd = Containerd::shared_of(version)?;
        let container = containerd.detached(&[], "ps", &["sleep", "1000"])?;
        let exec = containerd.id("named");
        containerd.ctr(["task", "exec", "--detach", "--exec-id", &exec, container.id(), "sleep", "1000"]).ok()?;
        let shown = containerd.ctr(["task", "ps", container.id()]).ok()?.text();
        let with = shown.lines().filter(|line| line.contains(&exec)).count();
        ensure!(with == 1 && shown.lines().count() == 3, "{version:?}:\n{shown}");
    }
    Ok(())
}
