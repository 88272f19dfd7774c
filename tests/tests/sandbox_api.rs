//! containerd's Sandbox API: a sandbox without a pause container.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::ttrpc::{self, Code};
use husk_protos::cri::{
    DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
    PodSandboxConfig,
};
use husk_protos::sandbox_update::{SandboxRecord, Typed, UpdateSandboxRequest, UpdateSandboxResponse};
use husk_tests::artifacts::Version;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::leftovers::Leftovers;
use husk_tests::pods::Bridge;
use husk_tests::process;
use husk_tests::sandbox_api::{self, call, create, shutdown, start, start_with};
use husk_tests::shim::{Shim, code};
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];
const SOON: Duration = Duration::from_secs(20);

fn status(shim: &Shim) -> ttrpc::Result<api::SandboxStatusResponse> {
    let id = shim.bundle.id.clone();
    call(shim, "SandboxStatus", &api::SandboxStatusRequest { sandbox_id: id, verbose: true, ..Default::default() })
}

fn wait(shim: &Shim) -> ttrpc::Result<u32> {
    let request = api::WaitSandboxRequest { sandbox_id: shim.bundle.id.clone(), ..Default::default() };
    call(shim, "WaitSandbox", &request).map(|response: api::WaitSandboxResponse| response.exit_status)
}

fn update(shim: &Shim, limits: &Value) -> ttrpc::Result<UpdateSandboxResponse> {
    let value = json!({"Overhead": null, "Resources": limits}).to_string().into_bytes();
    let type_url = "io.containerd.cri.v1/UpdatedResources".into();
    let extension = Typed { type_url, value, ..Default::default() };
    let extensions = [("updated-resources".to_owned(), extension)].into();
    let request = UpdateSandboxRequest {
        sandbox_id: shim.bundle.id.clone(),
        sandbox: MessageField::some(SandboxRecord { extensions, ..Default::default() }),
        fields: vec!["extensions".into()],
        ..Default::default()
    };
    call(shim, "UpdateSandbox", &request)
}

/// Starts the sandbox, and asks for its status while its VM boots, as a containerd that restarts does: once. Returns its PID.
fn start_and_ask(shim: &Shim) -> Result<u32> {
    let (pid, asked) = std::thread::scope(|scope| -> Result<_> {
        let started = scope.spawn(|| start(shim));
        let booting = wait_for(SOON, "the VM boots", || shim.containerd().qemu_of(&shim.bundle.id).ok());
        let asked = booting.and_then(|_| Ok(status(shim)?));
        let pid = started.join().map_err(|_| anyhow::anyhow!("the start panicked"))??;
        Ok((pid, asked?))
    })?;
    ensure!(asked.state == "SANDBOX_READY" && asked.pid == pid, "asked during the boot: {asked:?}");
    Ok(pid)
}

/// Limits within the VM's size are accepted, and others are rejected by name.
fn expect_updates(shim: &Shim) -> Result<()> {
    update(shim, &json!({"memory_limit_in_bytes": 600 << 20, "cpu_quota": 50_000, "cpu_period": 100_000}))?;
    for (limits, field) in [
        (json!({"memory_limit_in_bytes": 1 << 30}), "memory_limit_in_bytes"),
        (json!({"cpu_quota": 300_000, "cpu_period": 100_000}), "cpu_quota"),
        (json!({"oom_score_adj": 7}), "oom_score_adj"),
    ] {
        let updated = update(shim, &limits);
        let text = format!("{updated:?}");
        ensure!(code(&updated) == Some(Code::INVALID_ARGUMENT) && text.contains(field), "{limits}: {text}");
    }
    Ok(())
}

/// The spec of a container that joins the sandbox's namespaces by the PID that StartSandbox has reported.
fn member(sandbox: &str, id: &str, pid: u32) -> Value {
    sandbox_api::member(sandbox, id, &SLEEP, pid)
}

fn pod() -> PodSandboxConfig {
    let resources = LinuxContainerResources { memory_limit_in_bytes: 700 << 20, ..Default::default() };
    PodSandboxConfig {
        hostname: "web-0".into(),
        dns_config: MessageField::some(DNSConfig { servers: vec!["10.96.0.10".into()], ..Default::default() }),
        linux: MessageField::some(LinuxPodSandboxConfig {
            resources: MessageField::some(resources),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_sandbox_without_a_container_has_the_pods_network_name_and_size_until_it_is_stopped() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let containerd = &containerd;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let bridge = Bridge::new(containerd, "api")?;
    let network = bridge.pod(7)?;
    containerd.unpacked_image()?;
    let before = Leftovers::now(containerd);
    let id = containerd.id("sandbox");
    let shim = Shim::start_sandbox(containerd, &id)?;
    ensure!(code(&start(&shim)) == Some(Code::NOT_FOUND), "started before it was created");
    create(&shim, &format!("/run/netns/{}", network.name), &pod())?;
    ensure!(code(&create(&shim, "", &pod())) == Some(Code::ALREADY_EXISTS));
    ensure!(status(&shim)?.state == "SANDBOX_NOTREADY");
    let early = containerd.id("early");
    let early = Shim::start(containerd, &early, &member(&id, &early, 1))?.create_error()?;
    ensure!(early == "the sandbox has not been started", "{early}");
    let pid = start_and_ask(&shim)?;
    let inode = format!("stat -Lc %i /proc/{pid}/ns/net /run/netns/{} | sort -u | wc -l", network.name);
    ensure!(containerd.sh(&inode)?.text().trim() == "1", "the sandbox's process is in another network namespace");
    let running = status(&shim)?;
    ensure!(running.state == "SANDBOX_READY" && running.pid == pid, "{running:?}");
    let husk: Value = serde_json::from_str(running.info.get("husk").context("no status")?)?;
    ensure!(husk["sandbox"] == id, "{husk}");
    expect_updates(&shim)?;
    let platform: api::PlatformResponse = call(&shim, "Platform", &api::PlatformRequest::new())?;
    ensure!(platform.platform.os == "linux");
    let request = api::SandboxMetricsRequest { sandbox_id: id.clone(), ..Default::default() };
    let metrics: api::SandboxMetricsResponse = call(&shim, "SandboxMetrics", &request)?;
    let metrics = Metrics::parse_from_bytes(&metrics.metrics.data.value)?;
    // More than the init and QEMU themselves, less than the guest's memory and theirs.
    ensure!((40 << 20..900 << 20).contains(&metrics.memory.usage) && metrics.cpu.usage_usec > 0, "{metrics}");

    let ids = ["one", "two", "three", "pids"].map(|name| containerd.id(name));
    let one = Shim::running(containerd, &ids[0], &member(&id, &ids[0], pid))?;
    let two = Shim::running(containerd, &ids[1], &member(&id, &ids[1], pid))?;
    let shared = "for n in net ipc uts; do readlink /proc/self/ns/$n; done; hostname; cat /etc/resolv.conf; \
                  ip -o -4 addr show eth0; cat /proc/sys/kernel/random/boot_id; awk '/MemTotal/ {print $2}' /proc/meminfo";
    let seen = one.script("seen", shared)?;
    ensure!(seen == two.script("seen", shared)?, "{seen}");
    one.script("shm", "echo shared > /dev/shm/file")?;
    ensure!(two.script("shm", "cat /dev/shm/file; df -k /dev/shm | awk 'NR == 2 {print $2}'")? == "shared\n65536");
    ensure!(seen.contains("\nweb-0\nnameserver 10.96.0.10\n") && seen.contains(&network.address), "{seen}");
    let memory: u64 = seen.lines().last().context("no memory")?.parse()?;
    ensure!((700 << 10..828 << 10).contains(&memory), "the VM does not have the pod's size: {memory} KiB");
    // With a shared PID namespace, the sandbox's own process is its init.
    let mut pids = member(&id, &ids[3], pid);
    pids["linux"]["namespaces"][1]["path"] = json!(format!("/proc/{pid}/ns/pid"));
    let pids = Shim::running(containerd, &ids[3], &pids)?;
    let orphan = "(sleep 0.1 &); sleep 0.5; cat /proc/1/comm; ps -o stat,comm | grep -c '^Z' || true";
    ensure!(pids.script("pids", orphan)? == "husk-sandbox\n0", "{}", pids.script("again", "ps")?);

    // The VM outlives its containers.
    for (member, id) in [(&one, &ids[0]), (&two, &ids[1])] {
        member.task.kill(id, "", 9)?;
        ensure!(member.task.wait(id, "")? == 137);
        ensure!(member.task.delete(id, "")? == 137);
        member.shutdown();
    }
    let three = Shim::running(containerd, &ids[2], &member(&id, &ids[2], pid))?;
    ensure!(three.script("seen", shared)? == seen, "another VM");

    let ping = api::PingRequest { sandbox_id: id.clone(), ..Default::default() };
    let _: api::PingResponse = call(&shim, "PingSandbox", &ping)?;
    let stop = api::StopSandboxRequest { sandbox_id: id.clone(), timeout_secs: 30, ..Default::default() };
    for _ in 0..2 {
        let _: api::StopSandboxResponse = call(&shim, "StopSandbox", &stop)?;
    }
    ensure!(wait(&shim)? == 0);
    ensure!(three.task.wait(&ids[2], "")? == 137);
    ensure!(three.task.delete(&ids[2], "")? == 137);
    let stopped = status(&shim)?;
    ensure!(stopped.state == "SANDBOX_NOTREADY" && stopped.exited_at.is_some(), "{stopped:?}");
    ensure!(code(&call::<_, api::PingResponse>(&shim, "PingSandbox", &ping)) == Some(Code::UNAVAILABLE));
    shutdown(&shim)?;
    before.expect_none_since_but(containerd, |line| line == "folder /run/bundles")
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_sandbox_whose_vm_dies_reports_137_and_can_be_shut_down() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("dies");
    let shim = Shim::start_sandbox(containerd, &id)?;
    let shared = NamespaceOption { pid: 2, ..Default::default() };
    let context = LinuxSandboxSecurityContext { namespace_options: MessageField::some(shared), ..Default::default() };
    let mut of_node = pod();
    of_node.linux.mut_or_insert_default().security_context = MessageField::some(context);
    match create(&shim, "", &of_node) {
        Err(ttrpc::Error::RpcStatus(status)) if status.message.contains("hostPID") => {}
        other => anyhow::bail!("a pod with the node's processes: {other:?}"),
    }
    create(&shim, "", &pod())?;
    let pid = start(&shim)?;
    ensure!(pid > 0);
    let (process, below) = containerd.shim_of(&id)?;
    containerd.qemu_of(&id)?.kill();
    ensure!(wait(&shim)? == 137);
    ensure!(status(&shim)?.state == "SANDBOX_NOTREADY");
    shutdown(&shim)?;
    let gone = || (!process.is_alive() && below.iter().all(|process| !process.is_alive())).then_some(());
    wait_for(Duration::from_secs(60), "the shim and its children are gone", gone)
}

/// What is left of a sandbox whose StartSandbox has failed and that has been shut down.
fn expect_nothing_left(before: &Leftovers, containerd: &Containerd) -> Result<()> {
    let shared = ["folder /run/bundles", "folder /run/containerd/s"];
    before.expect_none_since_but(containerd, |line| shared.contains(&line))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_sandbox_that_loses_its_vm_or_its_shim_while_it_starts_leaves_nothing_behind() -> Result<()> {
    let containerd = &Containerd::start(Version::default_for_tests())?;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    containerd.unpacked_image()?;
    let before = Leftovers::now(containerd);
    for victim in ["qemu", "shim"] {
        let id = containerd.id(victim);
        let shim = Shim::start_sandbox(containerd, &id)?;
        create(&shim, "", &pod())?;
        let (process, _) = containerd.shim_of(&id)?;
        let started = std::thread::scope(|scope| -> Result<_> {
            let (task, id) = (shim.task.clone(), id.clone());
            let starting = scope.spawn(move || start_with(&task, &id));
            let booting = || process::descendants(process.pid).into_iter().find(|one| one.name.starts_with("qemu"));
            let qemu = wait_for(Duration::from_secs(30), "QEMU starts", booting)?;
            if victim == "qemu" {
                qemu.kill()
            } else {
                process.kill()
            }
            starting.join().map_err(|_| anyhow::anyhow!("the call panicked"))
        })?;
        ensure!(started.is_err(), "{victim}: {started:?}");
        if victim == "qemu" {
            ensure!(code(&started) == Some(Code::UNAVAILABLE), "{started:?}");
            ensure!(status(&shim)?.state == "SANDBOX_NOTREADY");
            shutdown(&shim)?;
        } else {
            shim.delete_action()?.ok()?;
        }
        expect_nothing_left(&before, containerd).context(victim)?;
        std::fs::remove_dir_all(&shim.bundle.outside)?;
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_sandbox_on_a_full_disk_is_rejected_and_leaves_nothing_behind() -> Result<()> {
    let containerd = &Containerd::start(Version::default_for_tests())?;
    containerd.unpacked_image()?;
    containerd.sh("mkdir /run/husk && mount -t tmpfs -o size=2m,mode=755 tmpfs /run/husk")?;
    let before = Leftovers::now(containerd);
    for created in [false, true] {
        let id = containerd.id("full");
        let shim = Shim::start_sandbox(containerd, &id)?;
        // A shim that answers has made its own files. One that cannot make them ends.
        let _: api::PlatformResponse = call(&shim, "Platform", &api::PlatformRequest::new())?;
        if created {
            create(&shim, "", &pod())?;
        }
        containerd.sh("dd if=/dev/zero of=/run/husk/filler bs=4k 2>/dev/null; test -s /run/husk/filler")?;
        let failed = if created { start(&shim).map(drop) } else { create(&shim, "", &pod()).map(drop) };
        let text = format!("{failed:?}");
        ensure!(text.contains("No space left on device"), "created: {created}: {text}");
        shutdown(&shim)?;
        containerd.sh("rm /run/husk/filler")?;
        expect_nothing_left(&before, containerd).with_context(|| format!("created: {created}"))?;
        std::fs::remove_dir_all(&shim.bundle.outside)?;
    }
    Ok(())
}
