//! Limits that refer to the host: a VM does not have the host's CPUs and memory nodes, its huge pages and its devices.

use std::fs;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::bundle;
use husk_tests::compare::{same, tested};
use husk_tests::containerd::Containerd;
use husk_tests::husk_only;
use husk_tests::shim::{Shim, code};
use serde_json::{Value, json};

fn spec(id: &str, args: &[&str], resources: &[(&str, Value)]) -> Value {
    let mut spec = bundle::spec(id, args);
    for (part, value) in resources {
        spec["linux"]["resources"][*part] = value.clone();
    }
    spec
}

/// The host's CPUs that the VM of `id` may use.
fn cpus_of_qemu(containerd: &Containerd, id: &str) -> Result<String> {
    let qemu = containerd.qemu_of(id)?;
    let status = fs::read_to_string(format!("/proc/{}/status", qemu.pid))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    Ok(line.context("no Cpus_allowed_list")?.trim().to_owned())
}

#[test]
fn limits_that_name_the_hosts_cpus_or_set_nothing_do_not_prevent_a_container() -> Result<()> {
    husk_only!();
    let cpus = std::thread::available_parallelism()?.get();
    // The VM has one CPU.
    let cpu = json!({"cpus": format!("0-{}", cpus - 1), "mems": "0", "quota": 0, "period": 0, "shares": 0});
    let resources =
        [("cpu", cpu), ("memory", json!({"limit": 0, "swap": 0, "reservation": 0})), ("pids", json!({"limit": 0}))];
    let text = same(|containerd| {
        let id = containerd.id("host-limits");
        let (status, out, errors) = Shim::start(containerd, &id, &spec(&id, &["echo", "ran"], &resources))?.run()?;
        Ok(format!("{status} {out} {errors}"))
    })?;
    ensure!(text.trim() == "0 ran", "{text}");
    Ok(())
}

#[test]
fn cpus_of_the_host_restrict_the_vm_and_what_the_guest_lacks_is_ignored_by_name() -> Result<()> {
    husk_only!();
    let containerd = tested()?;
    let id = containerd.id("cpuset");
    let limit = |size: &str| json!({"pageSize": size, "limit": 0});
    let resources = [
        ("cpu", json!({"cpus": "1", "mems": "0"})),
        ("memory", json!({"swappiness": 60, "kernel": 1 << 30})),
        ("hugepageLimits", json!([limit("64KB"), limit("2MB"), limit("16GB")])),
        ("rdma", json!({"mlx5_1": {"hcaHandles": 3}})),
        ("blockIO", json!({"weight": 500})),
    ];
    let mut spec = spec(&id, &["sleep", "1000"], &resources);
    bundle::append(&mut spec, "/linux/namespaces", [json!({"type": "cgroup"})]);
    let shim = Shim::running(containerd, &id, &spec)?;
    ensure!(cpus_of_qemu(containerd, &id)? == "1", "{}", cpus_of_qemu(containerd, &id)?);
    let inside = shim.script("inside", "cd /sys/fs/cgroup; echo $(cat cpuset.cpus cpuset.mems hugetlb.2MB.max)")?;
    ensure!(inside == "0", "the guest's own cpuset changed: {inside:?}");
    let log = shim.log();
    for ignored in
        ["memory.swappiness", "memory.kernel", "hugepageLimits.64KB", "hugepageLimits.16GB", "rdma", "blockIO.weight"]
    {
        ensure!(log.contains(&format!("linux.resources.{ignored}")), "{ignored} is not in the log:\n{log}");
    }
    ensure!(!log.contains("hugepageLimits.2MB"), "{log}");

    shim.task.update(&id, &json!({"cpu": {"cpus": "0"}, "hugepageLimits": [limit("16GB")], "pids": {"limit": 70}}))?;
    ensure!(cpus_of_qemu(containerd, &id)? == "0" && shim.task.metrics(&id)?.pids.limit == 70);
    // An update changes all limits or none.
    for impossible in [
        json!({"cpu": {"cpus": "4000"}, "pids": {"limit": 71}}),
        json!({"cpu": {"cpus": "1"}, "unified": {"memory.absent": "1"}}),
    ] {
        let updated = shim.task.update(&id, &impossible);
        ensure!(code(&updated) == Some(Code::INVALID_ARGUMENT), "{updated:?}");
        ensure!(cpus_of_qemu(containerd, &id)? == "0" && shim.task.metrics(&id)?.pids.limit == 70, "{impossible}");
    }

    // Another container of the pod adds its CPUs, as long as it exists.
    let other = containerd.id("other");
    let mut second = self::spec(&other, &["sleep", "1000"], &[("cpu", json!({"cpus": "1"}))]);
    second["annotations"] = json!({"io.kubernetes.cri.sandbox-id": id});
    let second = Shim::running(containerd, &other, &second)?;
    ensure!(cpus_of_qemu(containerd, &id)? == "0-1");
    second.task.kill(&other, "", 9)?;
    second.task.wait(&other, "")?;
    second.task.delete(&other, "")?;
    ensure!(cpus_of_qemu(containerd, &id)? == "0");
    Ok(())
}
