//! New limits for a running container: they take effect in place, inside and in the stats, and either all or none
//! apply.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::{self, Code};
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::shim::{Shim, Streams, code};
use serde_json::{Value, json};

/// A container that sees its own cgroup. For husk only: under runc, the cgroups are the host's.
fn limited<'a>(containerd: &'a Containerd, name: &str) -> Result<(Shim<'a>, String)> {
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, &["sleep", "1000"]);
    bundle::append(&mut spec, "/linux/namespaces", [json!({"type": "cgroup"})]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    let shim = Shim::start(containerd, &id, &spec)?;
    shim.run_detached()?;
    Ok((shim, id))
}

fn update_error(shim: &Shim, resources: &Value) -> Result<(Code, String)> {
    match shim.task.update(&shim.bundle.id, resources) {
        Err(ttrpc::Error::RpcStatus(status)) => Ok((status.code(), status.message)),
        other => bail!("{resources}: {other:?}"),
    }
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn limits_change_in_place_inside_and_in_the_stats() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = limited(containerd, "update")?;
    let files = "memory.max memory.low memory.swap.max cpu.max cpu.weight pids.max hugetlb.2MB.max memory.high";
    let inside = |exec: &str| shim.script(exec, &format!("cd /sys/fs/cgroup; for f in {files}; do cat $f; done"));
    ensure!(inside("before")?.starts_with(&format!("{}\n", 64 << 20)), "{}", inside("before-2")?);

    shim.task.update(
        &id,
        &json!({
            "memory": {"limit": 96 << 20, "reservation": 16 << 20, "swap": 100 << 20},
            "cpu": {"quota": 30_000, "period": 50_000, "shares": 512},
            "pids": {"limit": 50},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "unified": {"memory.high": (80 << 20).to_string()},
            // Clients also send unchanged settings.
            "devices": bundle::spec(&id, &["sleep"])["linux"]["resources"]["devices"],
        }),
    )?;
    let expected = [96 << 20, 16 << 20, 4 << 20].map(|n: u64| n.to_string()).join("\n");
    let expected = format!("{expected}\n30000 50000\n59\n50\n0\n{}", 80 << 20);
    ensure!(inside("after")? == expected, "{}\nexpected:\n{expected}", inside("after-2")?);
    let metrics = shim.task.metrics(&id)?;
    ensure!((metrics.pids.limit, metrics.memory.usage_limit) == (50, 96 << 20), "{metrics}");

    // The new limit is enforced: one fork too many fails.
    shim.task.update(&id, &json!({"pids": {"limit": 4}}))?;
    let (status, _, errors) =
        shim.exec_process("forks", &bundle::process(&["sh", "-c", "sleep 5 & sleep 5 & sleep 5 & true"]))?;
    ensure!(status != 0 && errors.contains("fork"), "{status}: {errors}");
    shim.task.update(&id, &json!({"pids": {"limit": -1}, "memory": {"limit": -1}, "cpu": {"quota": -1}}))?;
    let metrics = shim.task.metrics(&id)?;
    ensure!((metrics.pids.limit, metrics.memory.usage_limit) == (u64::MAX, u64::MAX), "{metrics}");
    ensure!(shim.script("unlimited", "cat /sys/fs/cgroup/cpu.max")? == "max 50000");

    // A paused container accepts new limits as well.
    shim.task.pause(&id)?;
    shim.task.update(&id, &json!({"pids": {"limit": 60}}))?;
    ensure!(shim.task.metrics(&id)?.pids.limit == 60);
    shim.task.resume(&id)?;
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    ensure!(
        code(&shim.task.update(&id, &json!({}))) == Some(Code::FAILED_PRECONDITION),
        "Update of an exited container"
    );
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_failed_update_names_the_limit_and_changes_nothing() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = limited(containerd, "update-error")?;
    let before = shim.task.metrics(&id)?;
    let cases = [
        (json!({"cpu": {"cpus": "4000"}}), "linux.resources.cpu.cpus \"4000\": write"),
        (json!({"cpu": {"quota": 1}}), "linux.resources.cpu.quota: write \"1\" to cpu.max"),
        (json!({"cpu": {"realtimeRuntime": 3}}), "linux.resources.cpu.realtimeRuntime \"3\""),
        (
            json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}}),
            "linux.resources.memory.limit: 4096 is less than",
        ),
        (json!({"memory": {"disableOOMKiller": true}}), "linux.resources.memory.disableOOMKiller"),
        (json!({"memory": {"limit": 1 << 30}}), "memory.limit 1073741824: the VM (Microvm) has 512 MiB"),
        (json!({"cpu": {"quota": 100_001}}), "cpu.quota 100001: means 1.001 CPUs"),
        (json!({"unified": {"cpu.max": "300000 100000"}}), "linux.resources.cpu.quota 300000: means 3 CPUs"),
        (json!({"network": {"classID": 5}}), "linux.resources.network"),
        (
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}}),
            "linux.resources.blockIO.throttleReadBpsDevice",
        ),
        (json!({"devices": [{"allow": true, "access": "rwm"}]}), "linux.resources.devices"),
        (json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}), "linux.resources.hugepageLimits \"3MB\""),
        (json!({"unified": {"cgroup.freeze": "1"}}), "linux.resources.unified.cgroup.freeze"),
        (json!({"unified": {"memory.absent": "1"}}), "the guest's kernel has no such limit"),
        (json!({"memory": "much"}), "linux.resources: "),
    ];
    for (mut resources, expected) in cases {
        // A possible change precedes the impossible one.
        resources["pids"] = json!({"limit": 33});
        if let Some(all) = resources["hugepageLimits"].as_array_mut() {
            all.insert(0, json!({"pageSize": "2MB", "limit": 0}));
        }
        let (code, message) = update_error(&shim, &resources)?;
        ensure!(code == Code::INVALID_ARGUMENT && message.contains(expected), "{resources}: {code:?} {message}");
        let after = shim.task.metrics(&id)?;
        ensure!(after.pids.limit == before.pids.limit && after.hugetlb == before.hugetlb, "{resources}: {after}");
    }
    let none = api::UpdateTaskRequest { id: id.clone(), ..Default::default() };
    let none = shim.task.call::<_, api::Empty>("Update", &none);
    ensure!(code(&none) == Some(Code::INVALID_ARGUMENT), "an Update without resources: {none:?}");
    let both = json!({"cpu": {"realtimeRuntime": 3}, "memory": {"disableOOMKiller": true}});
    let (_, both) = update_error(&shim, &both)?;
    ensure!(
        both.contains("linux.resources.cpu.realtimeRuntime") && both.contains("disableOOMKiller"),
        "expected both limits in: {both}"
    );
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn lowering_a_memory_limit_below_the_usage_causes_an_oom_event() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = limited(containerd, "lowered")?;
    let process = bundle::process(&["sh", "-c", "head -c 20000000 /dev/zero | tail -c 20000000 | (sleep 1000; cat)"]);
    shim.start_exec("holds", &process, &Streams::default())?;
    let held = || shim.task.metrics(&id).map(|now| (now.memory.anon > 15_000_000).then_some(())).transpose();
    wait_for(Duration::from_secs(60), "the memory is in use", held)??;
    shim.task.update(&id, &json!({"memory": {"limit": 8 << 20}}))?;
    shim.events.until("/tasks/oom", Duration::from_secs(60))?;
    ensure!(shim.task.metrics(&id)?.memory_events.oom_kill > 0);
    ensure!(shim.task.state(&id, "")?.status.value() == 2, "the init does not run any more");
    Ok(())
}
