//! Limits that refer to the host: a VM does not have the host's CPUs and memory nodes, its huge pages and its devices.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::bundle;
use husk_tests::cgroup;
use husk_tests::command::wait_for;
use husk_tests::compare::{runc, same, tested};
use husk_tests::containerd::{Configured, Containerd, NAMESPACE};
use husk_tests::leftovers::Leftovers;
use husk_tests::operator::husk_json;
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
    let configured = Configured::start("machine = \"q35\"\nmax_vcpus = 3\nmax_memory_mib = 512\n")?;
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

/// A raised limit of memory, MiB.
const RAISED: u64 = 320;

/// Exit statuses of programs that use memory, under a limit of 64 MiB and after it has been raised.
fn uses_of_memory(shim: &Shim, raise: impl Fn() -> Result<()>) -> Result<[u32; 3]> {
    let uses = |exec: &str, mib: u64| {
        // One buffer, which dd fills.
        let block = format!("bs={mib}M");
        let (status, _) = shim.exec(exec, &["dd", "if=/dev/zero", "of=/dev/null", &block, "count=1"])?;
        anyhow::Ok(status)
    };
    // Less than the VM has: its kernel would refuse to promise more.
    let before = uses("before", 150)?;
    raise()?;
    Ok([before, uses("within", RAISED - 20)?, uses("beyond", RAISED + 50)?])
}

/// Files of the share and output pass through memory that the VM has got.
fn expect_files_and_output(shim: &Shim, data: &Path) -> Result<()> {
    let (io, mut stdout, _stderr) = shim.streams("writes")?;
    let script = "head -c 3000000 /dev/urandom | base64 >/data/written; cat /data/written";
    shim.start_exec("writes", &bundle::process(&["sh", "-c", script]), &io)?;
    let out = String::from_utf8(stdout.read_to_end(Duration::from_secs(60))?)?;
    let written = fs::read_to_string(data.join("written"))?;
    ensure!(out == written && out.len() > 4_000_000, "{} and {} bytes", out.len(), written.len());
    fs::write(data.join("from-host"), &written)?;
    let same = shim.script("reads", "cmp /data/written /data/from-host && echo same")?;
    ensure!(same == "same", "{same}");
    Ok(())
}

/// What `husk status` and the cgroup on the host have for the size of the VM, MiB, and for its limit, bytes.
fn memory_of_vm(containerd: &Containerd, id: &str) -> Result<(u64, u64, u64)> {
    let machine = husk_json(containerd, &["status", "--json", id])?["machine"].take();
    let mib = |key: &str| machine[key].as_u64().with_context(|| machine.to_string());
    let limit = cgroup::limit(id, &["memory.max", "memory.limit_in_bytes"])?.context("no limit on the host")?;
    Ok((mib("memory_mib")?, mib("max_memory_mib")?, limit))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_raised_memory_limit_gives_the_vm_memory_that_programs_files_and_output_use() -> Result<()> {
    let spec = |id: &str| spec(id, &["sleep", "1000"], &[("memory", json!({"limit": 64 << 20}))]);
    let raised = json!({"memory": {"limit": RAISED << 20}});
    let runc = runc()?;
    let id = runc.id("grows");
    let shim = Shim::running(runc, &id, &spec(&id))?;
    let of_runc = uses_of_memory(&shim, || Ok(shim.task.update(&id, &raised)?))?;
    ensure!(of_runc == [137, 0, 137], "{of_runc:?}");
    drop(shim);

    let configured = Configured::start("machine = \"q35\"\nmemory_mib = 256\nmax_memory_mib = 650\n")?;
    let containerd = &configured.containerd;
    containerd.unpacked_image()?;
    let id = containerd.id("grows");
    let data = format!("/run/data-{id}");
    fs::create_dir(containerd.path(&data))?;
    let before = Leftovers::now(containerd);
    let mut spec = spec(&id);
    let options = ["rbind", "rw"];
    bundle::append(
        &mut spec,
        "/mounts",
        [json!({"destination": "/data", "type": "bind", "source": data, "options": options})],
    );
    let shim = Shim::running(containerd, &id, &spec)?;
    let total = |exec: &str| -> Result<u64> {
        Ok(shim.script(exec, "awk '/^MemTotal:/ {print $2}' /proc/meminfo")?.parse::<u64>()? >> 10)
    };
    let (total_before, (mib, most, limit)) = (total("total")?, memory_of_vm(containerd, &id)?);
    ensure!((mib, most) == (256, 640), "{mib} {most}");
    let beyond = shim.task.update(&id, &json!({"memory": {"limit": 513 << 20}}));
    let message = format!("{beyond:?}");
    ensure!(code(&beyond) == Some(Code::INVALID_ARGUMENT), "{message}");
    ensure!(message.contains("memory.limit 537919488: the VM (Q35) has 256 MiB and can have at most 640"), "{message}");
    ensure!(memory_of_vm(containerd, &id)? == (mib, most, limit) && total("unchanged")? == total_before);

    let used = uses_of_memory(&shim, || {
        shim.task.update(&id, &raised)?;
        // As soon as the update returns.
        let grown = memory_of_vm(containerd, &id)?;
        ensure!(grown == (512, most, limit + (256 << 20)), "{grown:?} after {limit}");
        let total = total("grown")?;
        ensure!(total == total_before + 256, "{total} MiB after {total_before}");
        Ok(())
    })?;
    ensure!(used == of_runc, "{used:?} instead of {of_runc:?}");
    ensure!(shim.task.metrics(&id)?.memory.usage_limit == RAISED << 20);
    expect_files_and_output(&shim, &containerd.path(&data))?;
    // A VM does not give memory back.
    shim.task.update(&id, &json!({"memory": {"limit": 64 << 20}}))?;
    ensure!(memory_of_vm(containerd, &id)? == (512, most, limit + (256 << 20)));

    // The shim is killed while it waits for QEMU to offer the memory.
    let qemu = containerd.qemu_of(&id)?;
    qemu.stop();
    let state = containerd.path("/run/husk").join(NAMESPACE).join(&id).join("state.json");
    thread::scope(|scope| {
        let update = scope.spawn(|| shim.task.update(&id, &json!({"memory": {"limit": 512 << 20}})));
        wait_for(Duration::from_secs(60), "the shim has begun to let the VM grow", || {
            let state: Value = serde_json::from_slice(&fs::read(&state).ok()?).ok()?;
            (state["machine"]["memory_mib"] == 640).then_some(())
        })?;
        containerd.shim_of(&id)?.0.kill();
        let update = update.join().map_err(|_| anyhow::anyhow!("the update panicked"))?;
        ensure!(update.is_err(), "{update:?}");
        anyhow::Ok(())
    })?;
    shim.delete_action()?.ok()?;
    // Folders that all containers of a daemon share, and the test's own.
    let shared = ["folder /run/bundles", "folder /run/containerd/s", "folder /run/husk"];
    before.expect_none_since_but(containerd, |line| shared.contains(&line) || line.contains(&data))
}
