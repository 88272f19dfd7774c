//! Limits that refer to the host: a VM does not have the host's CPUs and memory nodes, its huge pages and its devices.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::bundle;
use husk_tests::compare::{same, tested};
use husk_tests::containerd::{Configured, Containerd};
use husk_tests::shim::{Shim, code};
use serde_json::{Value, json};

fn spec(id: &str, args: &[&str], resources: &[(&str, Value)]) -> Value {
    let mut spec = bundle::spec(id, args);
    for (part, value) in resources {
        spec["linux"]["resources"][*part] = value.clone();
    }
    spec
}

/// The host's CPUs that the VM of `id` may use: each virtual CPU, and all other threads of QEMU.
fn cpus_of_qemu(containerd: &Containerd, id: &str) -> Result<String> {
    let qemu = containerd.qemu_of(id)?;
    let (mut vcpus, mut others) = (BTreeMap::new(), BTreeSet::new());
    for thread in fs::read_dir(format!("/proc/{}/task", qemu.pid))? {
        let folder = thread?.path();
        // QEMU's worker threads come and go.
        let Ok(status) = fs::read_to_string(folder.join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
        let (name, cpus) = (field("Name:"), field("Cpus_allowed_list:").context("no Cpus_allowed_list")?);
        match name.as_deref().and_then(|name| name.strip_prefix("CPU ")) {
            Some(name) => drop(vcpus.insert(name.to_owned(), cpus)),
            None => drop(others.insert(cpus)),
        }
    }
    let join = |cpus: Vec<String>| cpus.join(" ");
    Ok(format!("{} {}", join(vcpus.into_values().collect()), join(others.into_iter().collect())))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn limits_that_name_the_hosts_cpus_or_set_nothing_do_not_prevent_a_container() -> Result<()> {
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
#[cfg_attr(runc, ignore = "about VMs")]
fn cpus_of_the_host_restrict_the_vm_and_what_the_guest_lacks_is_ignored_by_name() -> Result<()> {
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
    spec["annotations"] = json!({"io.husk.vcpus": "2"});
    let shim = Shim::running(containerd, &id, &spec)?;
    ensure!(cpus_of_qemu(containerd, &id)? == "1 1 1", "{}", cpus_of_qemu(containerd, &id)?);
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
    let restricted = || Ok::<_, anyhow::Error>(cpus_of_qemu(containerd, &id)? == "0 0 0");
    ensure!(restricted()? && shim.task.metrics(&id)?.pids.limit == 70);
    // An update changes all limits or none.
    for impossible in [
        json!({"cpu": {"cpus": "4000"}, "pids": {"limit": 71}}),
        json!({"cpu": {"cpus": "1"}, "unified": {"memory.absent": "1"}}),
    ] {
        let updated = shim.task.update(&id, &impossible);
        ensure!(code(&updated) == Some(Code::INVALID_ARGUMENT), "{updated:?}");
        ensure!(restricted()? && shim.task.metrics(&id)?.pids.limit == 70, "{impossible}");
    }

    // Another container of the pod adds its CPUs, as long as it exists. With as many CPUs as virtual ones, each has its
    // own.
    let other = containerd.id("other");
    let mut second = self::spec(&other, &["sleep", "1000"], &[("cpu", json!({"cpus": "1"}))]);
    second["annotations"] = json!({"io.kubernetes.cri.sandbox-id": id});
    let second = Shim::running(containerd, &other, &second)?;
    ensure!(cpus_of_qemu(containerd, &id)? == "0 1 0-1", "{}", cpus_of_qemu(containerd, &id)?);
    let wrong = second.task.update(&other, &json!({"cpu": {"cpus": "4000"}}));
    let message = format!("{wrong:?}");
    ensure!(message.contains("linux.resources.cpu.cpus \\\"4000\\\": write"), "{message}");
    second.task.kill(&other, "", 9)?;
    second.task.wait(&other, "")?;
    second.task.delete(&other, "")?;
    ensure!(restricted()?, "{}", cpus_of_qemu(containerd, &id)?);
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_raised_cpu_limit_starts_virtual_cpus_and_one_beyond_the_vms_size_is_rejected() -> Result<()> {
    let configured = Configured::start("machine = \"q35\"\nmax_vcpus = 3\n")?;
    let containerd = &configured.containerd;
    let id = containerd.id("grows");
    let cpu = json!({"cpus": "1", "quota": 100_000, "period": 100_000});
    let mut spec = spec(&id, &["sleep", "1000"], &[("cpu", cpu), ("memory", json!({"limit": 64 << 20}))]);
    // Without a cgroup, the CPUs restrict the virtual CPUs, including those that do not run yet.
    spec["linux"].as_object_mut().context("linux")?.remove("cgroupsPath");
    let shim = Shim::running(containerd, &id, &spec)?;
    let all = fs::read_to_string("/sys/devices/system/cpu/online")?;
    let restricted = format!("1 1 1 {}", all.trim());
    ensure!(cpus_of_qemu(containerd, &id)? == restricted, "{}", cpus_of_qemu(containerd, &id)?);
    let shown = |exec: &str| shim.script(exec, "nproc; cat /sys/devices/system/cpu/online");
    ensure!(shown("before")? == "1\n0", "{}", shown("before-2")?);

    let beyond = |resources: Value, parts: &[&str]| {
        let updated = shim.task.update(&id, &resources);
        let message = format!("{updated:?}");
        ensure!(code(&updated) == Some(Code::INVALID_ARGUMENT), "{resources}: {message}");
        ensure!(parts.iter().all(|part| message.contains(part)), "{resources}: {message}");
        Ok(())
    };
    beyond(json!({"cpu": {"cpus": "4000"}}), &["linux.resources.cpu.cpus", "4000", "the host has no CPU 4000"])?;
    beyond(json!({"cpu": {"quota": 300_001}}), &["linux.resources.cpu.quota 300001", "1 virtual CPUs", "at most 3"])?;
    beyond(json!({"memory": {"limit": 1 << 30}}), &["linux.resources.memory.limit 1073741824", "(Q35) has 512 MiB"])?;
    ensure!(shown("unchanged")? == "1\n0");

    // In-place resize of a pod: both limits at once.
    shim.task.update(&id, &json!({"cpu": {"quota": 250_000, "period": 100_000}, "memory": {"limit": 300 << 20}}))?;
    ensure!(shown("after")? == "3\n0-2", "{}", shown("after-2")?);
    ensure!(shim.task.metrics(&id)?.memory.usage_limit == 300 << 20);
    ensure!(cpus_of_qemu(containerd, &id)? == restricted, "{}", cpus_of_qemu(containerd, &id)?);
    let busy = "for cpu in 0 1 2; do taskset -c $cpu sh -c 'grep -q \"^Cpus_allowed_list:.$1\\$\" /proc/self/status && \
        echo ran' sh $cpu; done";
    ensure!(shim.script("on-each", busy)?.split_whitespace().count() == 3, "{}", shim.script("on-each-2", busy)?);
    beyond(json!({"cpu": {"quota": 400_000}}), &["linux.resources.cpu.quota 400000", "3 virtual CPUs"])?;
    // Lower limits are accepted, and the VM keeps its virtual CPUs.
    shim.task.update(&id, &json!({"cpu": {"quota": 50_000}, "memory": {"limit": 64 << 20}}))?;
    ensure!(shown("lower")? == "3\n0-2");
    Ok(())
}
