//! New limits for a container that runs: in place, seen from inside and in its stats, and all or none of them.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::{self, Code};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::shim::{Shim, Streams, code};
use serde_json::{Value, json};

/// A container that sees its own cgroup, and that the test can give other limits; nothing under runc, whose cgroups are the host's.
fn limited<'a>(containerd: &'a Containerd, name: &str) -> Result<(Shim<'a>, String)> {
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, &["sleep", "1000"]);
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "cgroup"}));
    }
    spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    let shim = Shim::start(containerd, &id, &spec)?;
    shim.run_detached()?;
    Ok((shim, id))
}

fn refused(shim: &Shim, resources: &Value) -> Result<(Code, String)> {
    match shim.task.update(&shim.bundle.id, resources) {
        Err(ttrpc::Error::RpcStatus(status)) => Ok((status.code(), status.message)),
        other => bail!("{resources}: {other:?}"),
    }
}

#[test]
fn limits_change_in_place_and_are_seen_from_inside_and_in_stats() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("limits_change_in_place_and_are_seen_from_inside_and_in_stats") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let (shim, id) = limited(containerd, "update")?;
    let files = "memory.max memory.low memory.swap.max cpu.max cpu.weight cpuset.cpus cpuset.mems pids.max hugetlb.2MB.max memory.high";
    let inside = |exec: &str| shim.script(exec, &format!("cd /sys/fs/cgroup; for f in {files}; do cat $f; done"));
    ensure!(inside("before")?.starts_with(&format!("{}\n", 64 << 20)), "{}", inside("before-2")?);

    shim.task.update(
        &id,
        &json!({
            "memory": {"limit": 96 << 20, "reservation": 16 << 20, "swap": 100 << 20},
            "cpu": {"quota": 30_000, "period": 50_000, "shares": 512, "cpus": "0", "mems": "0"},
            "pids": {"limit": 50},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "unified": {"memory.high": (80 << 20).to_string()},
            // Clients send what they do not change, too.
            "devices": bundle::spec(&id, &["sleep"])["linux"]["resources"]["devices"],
        }),
    )?;
    let wanted = [96 << 20, 16 << 20, 4 << 20].map(|n: u64| n.to_string()).join("\n");
    let wanted = format!("{wanted}\n30000 50000\n59\n0\n0\n50\n0\n{}", 80 << 20);
    ensure!(inside("after")? == wanted, "{}\nwanted:\n{wanted}", inside("after-2")?);
    let metrics = shim.task.metrics(&id)?;
    ensure!((metrics.pids.limit, metrics.memory.usage_limit) == (50, 96 << 20), "{metrics}");

    // They hold: a fork too many fails.
    shim.task.update(&id, &json!({"pids": {"limit": 4}}))?;
    let (status, _, errors) =
        shim.exec_process("forks", &bundle::process(&["sh", "-c", "sleep 5 & sleep 5 & sleep 5 & true"]))?;
    ensure!(status != 0 && errors.contains("fork"), "{status}: {errors}");
    shim.task.update(&id, &json!({"pids": {"limit": -1}, "memory": {"limit": -1}, "cpu": {"quota": -1}}))?;
    let metrics = shim.task.metrics(&id)?;
    ensure!((metrics.pids.limit, metrics.memory.usage_limit) == (u64::MAX, u64::MAX), "{metrics}");
    ensure!(shim.script("unlimited", "cat /sys/fs/cgroup/cpu.max")? == "max 50000");

    // A container that is paused can be given limits as well.
    shim.task.pause(&id)?;
    shim.task.update(&id, &json!({"pids": {"limit": 60}}))?;
    ensure!(shim.task.metrics(&id)?.pids.limit == 60);
    shim.task.resume(&id)?;
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    ensure!(code(&shim.task.update(&id, &json!({}))) == Some(Code::FAILED_PRECONDITION), "it has ended");
    Ok(())
}

#[test]
fn an_update_that_cannot_be_is_named_and_changes_nothing() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("an_update_that_cannot_be_is_named_and_changes_nothing") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let (shim, id) = limited(containerd, "refused")?;
    let before = shim.task.metrics(&id)?;
    let cases = [
        (json!({"cpu": {"cpus": "63"}}), "linux.resources.cpu.cpus: the guest has"),
        (json!({"cpu": {"quota": 1}}), "linux.resources.cpu.quota: write \"1\" to cpu.max"),
        (json!({"memory": {"swappiness": 3}}), "linux.resources.memory.swappiness"),
        (
            json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}}),
            "linux.resources.memory.limit: 4096 is less than",
        ),
        (json!({"memory": {"disableOOMKiller": true}}), "linux.resources.memory.disableOOMKiller"),
        (json!({"network": {"classID": 5}}), "linux.resources.network"),
        (json!({"blockIO": {"weight": 500}}), "linux.resources.blockIO"),
        (json!({"devices": [{"allow": true, "access": "rwm"}]}), "linux.resources.devices"),
        (json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}), "linux.resources.hugepageLimits.3MB"),
        (json!({"unified": {"cgroup.freeze": "1"}}), "linux.resources.unified.cgroup.freeze"),
        (json!({"unified": {"memory.absent": "1"}}), "the guest's kernel has no such limit"),
        (json!({"memory": "much"}), "linux.resources: "),
    ];
    for (mut resources, named) in cases {
        // In front of what cannot be, something that can.
        resources["pids"] = json!({"limit": 33});
        if let Some(all) = resources["hugepageLimits"].as_array_mut() {
            all.insert(0, json!({"pageSize": "2MB", "limit": 0}));
        }
        let (code, message) = refused(&shim, &resources)?;
        ensure!(code == Code::INVALID_ARGUMENT && message.contains(named), "{resources}: {code:?} {message}");
        let after = shim.task.metrics(&id)?;
        ensure!(after.pids.limit == before.pids.limit && after.hugetlb == before.hugetlb, "{resources}: {after}");
    }
    let none = api::UpdateTaskRequest { id: id.clone(), ..Default::default() };
    let none = shim.task.call::<_, api::Empty>("Update", &none);
    ensure!(code(&none) == Some(Code::INVALID_ARGUMENT), "an update of nothing: {none:?}");
    let (_, both) = refused(&shim, &json!({"cpu": {"cpus": "63"}, "memory": {"swappiness": 3}}))?;
    ensure!(both.contains("linux.resources.cpu.cpus") && both.contains("swappiness"), "not both: {both}");
    Ok(())
}

#[test]
fn a_memory_limit_that_is_lowered_under_what_is_used_is_told_as_an_oom() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("a_memory_limit_that_is_lowered_under_what_is_used_is_told_as_an_oom") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let (shim, id) = limited(containerd, "lowered")?;
    let process = bundle::process(&["sh", "-c", "head -c 20000000 /dev/zero | tail -c 20000000 | (sleep 1000; cat)"]);
    shim.task.exec(&id, "holds", &process, &Streams::default())?;
    shim.task.start(&id, "holds")?;
    let held = || shim.task.metrics(&id).map(|now| (now.memory.anon > 15_000_000).then_some(())).transpose();
    wait_for(Duration::from_secs(20), "the memory is in use", held)??;
    shim.task.update(&id, &json!({"memory": {"limit": 8 << 20}}))?;
    shim.events.until("/tasks/oom", Duration::from_secs(20))?;
    ensure!(shim.task.metrics(&id)?.memory_events.oom_kill > 0);
    ensure!(shim.task.state(&id, "")?.status.value() == 2, "the init had no part in it");
    Ok(())
}
