//! containerd's Sandbox API: a sandbox without a pause container.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::ttrpc::{self, Code};
use husk_protos::cri::{
    DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
    PodSandboxConfig,
};
use husk_tests::artifacts::Version;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::husk_only;
use husk_tests::leftovers::Leftovers;
use husk_tests::pods::Bridge;
use husk_tests::shim::{Shim, code};
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];

/// Calls the Sandbox service.
fn call<Q: Message, A: Message>(shim: &Shim, method: &str, request: &Q) -> ttrpc::Result<A> {
    shim.task.call_service("containerd.runtime.sandbox.v1.Sandbox", method, request)
}

fn create(shim: &Shim, netns: &str, pod: &PodSandboxConfig) -> ttrpc::Result<api::CreateSandboxResponse> {
    let value = pod.write_to_bytes().map_err(|error| ttrpc::Error::Others(error.to_string()))?;
    let options = Any { type_url: "runtime.v1.PodSandboxConfig".into(), value, ..Default::default() };
    let request = api::CreateSandboxRequest {
        sandbox_id: shim.bundle.id.clone(),
        bundle_path: shim.bundle.path.display().to_string(),
        netns_path: netns.into(),
        options: MessageField::some(options),
        ..Default::default()
    };
    call(shim, "CreateSandbox", &request)
}

fn start(shim: &Shim) -> ttrpc::Result<u32> {
    let request = api::StartSandboxRequest { sandbox_id: shim.bundle.id.clone(), ..Default::default() };
    call(shim, "StartSandbox", &request).map(|response: api::StartSandboxResponse| response.pid)
}

fn status(shim: &Shim) -> ttrpc::Result<api::SandboxStatusResponse> {
    let id = shim.bundle.id.clone();
    call(shim, "SandboxStatus", &api::SandboxStatusRequest { sandbox_id: id, verbose: true, ..Default::default() })
}

fn wait(shim: &Shim) -> ttrpc::Result<u32> {
    let request = api::WaitSandboxRequest { sandbox_id: shim.bundle.id.clone(), ..Default::default() };
    call(shim, "WaitSandbox", &request).map(|response: api::WaitSandboxResponse| response.exit_status)
}

fn shutdown(shim: &Shim) -> ttrpc::Result<api::ShutdownSandboxResponse> {
    let request = api::ShutdownSandboxRequest { sandbox_id: shim.bundle.id.clone(), ..Default::default() };
    call(shim, "ShutdownSandbox", &request)
}

/// The spec of a container that joins the sandbox's namespaces by the PID that StartSandbox has reported.
fn member(sandbox: &str, id: &str, pid: u32) -> Value {
    let mut spec = bundle::spec(id, &SLEEP);
    spec["annotations"] = json!({"io.kubernetes.cri.sandbox-id": sandbox});
    let path = |kind: &str, name: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{name}")});
    spec["linux"]["namespaces"] = json!([
        {"type": "mount"}, {"type": "pid"}, path("network", "net"), path("ipc", "ipc"), path("uts", "uts"),
    ]);
    spec.as_object_mut().map(|spec| spec.remove("hostname"));
    spec
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
fn a_sandbox_without_a_container_has_the_pods_network_name_and_size_until_it_is_stopped() -> Result<()> {
    husk_only!();
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
    let pid = start(&shim)?;
    let inode = format!("stat -Lc %i /proc/{pid}/ns/net /run/netns/{} | sort -u | wc -l", network.name);
    ensure!(containerd.sh(&inode)?.text().trim() == "1", "the sandbox's process is in another network namespace");
    let running = status(&shim)?;
    ensure!(running.state == "SANDBOX_READY" && running.pid == pid, "{running:?}");
    let husk: Value = serde_json::from_str(running.info.get("husk").context("no status")?)?;
    ensure!(husk["sandbox"] == id, "{husk}");
    let platform: api::PlatformResponse = call(&shim, "Platform", &api::PlatformRequest::new())?;
    ensure!(platform.platform.os == "linux");
    let metrics: ttrpc::Result<api::SandboxMetricsResponse> =
        call(&shim, "SandboxMetrics", &api::SandboxMetricsRequest::new());
    ensure!(code(&metrics) == Some(Code::UNIMPLEMENTED));

    let ids = ["one", "two", "three", "pids"].map(|name| containerd.id(name));
    let one = Shim::running(containerd, &ids[0], &member(&id, &ids[0], pid))?;
    let two = Shim::running(containerd, &ids[1], &member(&id, &ids[1], pid))?;
    let shared = "for n in net ipc uts; do readlink /proc/self/ns/$n; done; hostname; cat /etc/resolv.conf; \
                  ip -o -4 addr show eth0; cat /proc/sys/kernel/random/boot_id; awk '/MemTotal/ {print $2}' /proc/meminfo";
    let seen = one.script("seen", shared)?;
    ensure!(seen == two.script("seen", shared)?, "{seen}");
    ensure!(seen.contains("\nweb-0\nnameserver 10.96.0.10\n") && seen.contains(&network.address), "{seen}");
    let memory: u64 = seen.lines().last().context("no memory")?.parse()?;
    ensure!((700 << 10..828 << 10).contains(&memory), "the VM does not have the pod's size: {memory} KiB");
    let mut pids = member(&id, &ids[3], pid);
    pids["linux"]["namespaces"][1]["path"] = json!(format!("/proc/{pid}/ns/pid"));
    let refused = Shim::start(containerd, &ids[3], &pids)?.create_error()?;
    ensure!(refused.contains("use the sandboxer \"podsandbox\""), "{refused}");

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
fn a_sandbox_whose_vm_dies_reports_137_and_can_be_shut_down() -> Result<()> {
    husk_only!();
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
    wait_for(Duration::from_secs(20), "the shim and its children are gone", gone)
}
