//! The shim's interface to containerd: its start, its service names, its responses and its `delete` action.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::ttrpc::{self, Code};
use husk_protos::runtime_options;
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::bundle::{self, Bundle};
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::events::Sink;
use husk_tests::process::{self, Process};
use husk_tests::shim::{Any, Api, Bootstrap, Shim, Streams, Task, action, address, code};
use serde_json::Value;

/// An idle container and its id.
fn running<'a>(containerd: &'a Containerd, name: &str) -> Result<(Shim<'a>, String)> {
    let shim = Shim::idle(containerd, name)?;
    let id = shim.bundle.id.clone();
    Ok((shim, id))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn start_prints_an_address_and_nothing_on_stderr() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("start");
    let bundle = Bundle::write(containerd, &id, &bundle::spec(&id, &["true"]))?;
    let events = Sink::start()?;
    let started = action(containerd, &bundle, &events, &Bootstrap::Flags, "start")?.ok()?;
    ensure!(started.stderr.is_empty(), "{started}");
    let socket = containerd.path(address(&started.text())?);
    ensure!(socket.exists(), "{started}");
    let state = Task::connect(&socket, Api::V2)?.state(&id, "");
    ensure!(code(&state) == Some(Code::NOT_FOUND), "{state:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn start_understands_the_parameters_of_containerd_2_3() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("params");
    let bundle = Bundle::write(containerd, &id, &bundle::spec(&id, &["true"]))?;
    let events = Sink::start()?;
    // The second `start` finds the server of the first, by the address that the flags contain.
    for bootstrap in [Bootstrap::Params, Bootstrap::ParamsWithoutAddresses] {
        let started = action(containerd, &bundle, &events, &bootstrap, "start")?.ok()?;
        ensure!(started.stderr.is_empty(), "{started}");
        let result = BootstrapResult::parse_from_bytes(&started.stdout).with_context(|| started.to_string())?;
        ensure!(result.version == 3 && result.protocol == "ttrpc", "{result:?}");
        let task = Task::connect(&containerd.path(address(&result.address)?), Api::V3)?;
        let state = task.state(&id, "");
        ensure!(code(&state) == Some(Code::NOT_FOUND), "{state:?}");
    }
    ensure!(process::descendants(containerd.pid()).iter().filter(|p| p.command.contains(&id)).count() == 1);
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn start_rejects_ids_that_containerd_does_not_have() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = format!("{}#01", containerd.id("invalid"));
    let bundle = Bundle::write(containerd, &id, &bundle::spec(&id, &["true"]))?;
    let started = action(containerd, &bundle, &Sink::start()?, &Bootstrap::Flags, "start")?;
    ensure!(started.code() != 0 && started.stdout.is_empty(), "{started}");
    ensure!(started.errors().contains(&format!("container id {id:?}")), "{started}");
    Ok(())
}

#[test]
fn the_runtimes_features_are_known_to_containerd() -> Result<()> {
    for version in [Version::V2_1, Version::V2_4] {
        expect_features(Containerd::shared_of(version)?)?;
    }
    Ok(())
}

fn expect_features(containerd: &Containerd) -> Result<()> {
    let runtime = format!("--runtime={}", containerd.runtime().name());
    let shown = containerd.ctr(["plugins", "inspect-runtime"]).arg(runtime).ok()?;
    let info: Value = serde_json::from_str(&shown.text()).with_context(|| shown.to_string())?;
    let features = &info["Features"];
    let has = |list: &Value, name: &str| list.as_array().is_some_and(|all| all.iter().any(|one| one == name));
    ensure!(info["Name"] == containerd.runtime().name() && info["Version"]["Version"] != "", "{shown}");
    ensure!(has(&features["mountOptions"], "rro") && has(&features["hooks"], "poststop"), "{shown}");
    ensure!(has(&features["linux"]["namespaces"], "user") && features["linux"]["seccomp"]["enabled"] == true);
    if containerd.runtime() == Runtime::Husk {
        ensure!(features["linux"]["mountExtensions"]["idmap"]["enabled"] == false, "{shown}");
        ensure!(has(&features["mountOptions"], "idmap") && !has(&features["hooks"], "createContainer"), "{shown}");
    }
    Ok(())
}

/// Options as containerd's clients send them for runc.
fn options(options: &Options) -> Result<Any> {
    let type_url = "containerd.runc.v1.Options".to_owned();
    Ok(Any { type_url, value: options.write_to_bytes()?, ..Default::default() })
}

#[test]
fn options_of_the_runtime_are_applied_or_rejected_by_name() -> Result<()> {
    let containerd = Containerd::shared()?;
    let husk = containerd.runtime() == Runtime::Husk;
    let id = containerd.id("options");
    let bundle = Bundle::write(containerd, &id, &bundle::spec(&id, &["true"]))?;
    let events = Sink::start()?;
    let start = |cgroup: &str| {
        let options = options(&Options { shim_cgroup: cgroup.into(), ..Default::default() })?;
        action(containerd, &bundle, &events, &Bootstrap::Options(options), "start")
    };
    let absent = start(&format!("/{id}-absent"))?;
    ensure!(
        absent.code() != 0 && (!husk || absent.errors().contains(&format!("ShimCgroup \"/{id}-absent\""))),
        "{absent}"
    );
    let root = Path::new("/sys/fs/cgroup");
    let root = if root.join("cpu").exists() { root.join("cpu") } else { root.to_owned() };
    let cgroup = root.join(&id);
    std::fs::create_dir(&cgroup)?;
    let socket = address(&start(&format!("/{id}"))?.ok()?.text())?;
    let (shim, _) = containerd.shim_of(&id)?;
    let inside = std::fs::read_to_string(cgroup.join("cgroup.procs"))?;
    let task = Task::connect(&containerd.path(socket), Api::V2)?;
    let create = |any: Any| -> ttrpc::Result<api::CreateTaskResponse> {
        let request = api::CreateTaskRequest {
            id: id.clone(),
            bundle: bundle.path.display().to_string(),
            rootfs: bundle.rootfs.clone(),
            options: Some(any).into(),
            ..Default::default()
        };
        task.call("Create", &request)
    };
    let created = create(options(&Options { binary_name: "/no/such/runtime".into(), ..Default::default() })?);
    // Ends the shim, so that the cgroup can be removed.
    let deleted = action(containerd, &bundle, &events, &Bootstrap::Flags, "delete")?;
    if !husk {
        shim.kill();
    }
    wait_for(Duration::from_secs(60), "the cgroup is empty", || std::fs::remove_dir(&cgroup).ok())?;
    ensure!(inside.lines().any(|pid| pid == shim.pid.to_string()), "{} is not in {inside:?}", shim.pid);
    ensure!(code(&created).is_some(), "{created:?}");
    if husk {
        let message = format!("{created:?}");
        ensure!(code(&created) == Some(Code::INVALID_ARGUMENT), "{message}");
        ensure!(message.contains("BinaryName") && message.contains("/no/such/runtime"), "{message}");
        deleted.ok()?;
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_runtimes_options_can_name_a_configuration_file() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("config-path");
    let path = format!("/run/{id}.toml");
    // Too little: the error shows that the file is read.
    std::fs::write(containerd.path(&path), "memory_mib = 1\n")?;
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["true"]))?;
    let value = runtime_options::Options { config_path: path.clone(), ..Default::default() }.write_to_bytes()?;
    let options = Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() };
    let request = api::CreateTaskRequest { options: Some(options).into(), ..shim.create_request(&Streams::default()) };
    let created: ttrpc::Result<api::CreateTaskResponse> = shim.task.call("Create", &request);
    let message = format!("{created:?}");
    ensure!(code(&created) == Some(Code::INVALID_ARGUMENT), "{message}");
    ensure!(message.contains(&path) && message.contains("memory_mib = 1"), "{message}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn after_a_failed_create_delete_ends_the_shim_at_once() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("failed-create");
    let mut shim = Shim::start(containerd, &id, &bundle::spec(&id, &["true"]))?;
    shim.bundle.rootfs[0].options.push("loop".into());
    let created: ttrpc::Result<api::CreateTaskResponse> =
        shim.task.call("Create", &shim.create_request(&Streams::default()));
    // A rootfs that the shim refuses is the client's mistake.
    ensure!(code(&created) == Some(Code::INVALID_ARGUMENT), "{created:?}");
    let (process, below) = containerd.shim_of(&id)?;
    // Without Shutdown.
    expect_cleaned_up(&shim, &id, &below)?;
    ensure!(!process.is_alive(), "the shim lingers");
    Ok(())
}

#[test]
fn calls_of_unknown_services_return_unimplemented() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "unknown")?;
    for service in ["containerd.services.transfer.v1.Transfer", "containerd.services.streaming.v1.Streaming"] {
        let result: ttrpc::Result<api::Empty> = shim.task.call_service(service, "Ping", &api::Empty::new());
        ensure!(code(&result) == Some(Code::UNIMPLEMENTED), "{service}: {result:?}");
        ensure!(Runtime::under_test() != Runtime::Husk || format!("{result:?}").contains(service), "{result:?}");
    }
    // The connection still works.
    ensure!(shim.task.state(&id, "")?.id == id);
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_task_service_is_available_under_both_names() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "names")?;
    let two = shim.client(Api::V2)?.state(&id, "")?;
    let three = shim.client(Api::V3)?.state(&id, "")?;
    ensure!(two == three && two.id == id && two.pid > 0, "{two:?} {three:?}");
    ensure!(two.bundle == shim.bundle.path.display().to_string(), "not the host's bundle: {two:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn unsupported_calls_return_unimplemented() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "unimplemented")?;
    let task = &shim.task;
    let checkpoint: ttrpc::Result<api::Empty> =
        task.call("Checkpoint", &api::CheckpointTaskRequest { id: id.clone(), ..Default::default() });
    ensure!(code(&checkpoint) == Some(Code::UNIMPLEMENTED), "{checkpoint:?}");
    Ok(())
}

#[test]
fn calls_for_unknown_containers_and_execs_return_not_found() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "not-found")?;
    let task = &shim.task;
    for (method, result) in [
        ("State", code(&task.state("nobody", ""))),
        ("Kill", code(&task.kill("nobody", "", 9))),
        ("Delete", code(&task.delete("nobody", ""))),
        ("State of an exec", code(&task.state(&id, "nothing"))),
        ("Start of an exec", code(&task.start(&id, "nothing"))),
    ] {
        ensure!(result == Some(Code::NOT_FOUND), "{method} returns {result:?}");
    }
    Ok(())
}

#[test]
fn a_running_container_cannot_be_deleted() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "running")?;
    let result = shim.task.delete(&id, "");
    // runc's shim returns its own precondition failure as Unknown.
    ensure!(matches!(code(&result), Some(Code::FAILED_PRECONDITION | Code::UNKNOWN)), "{result:?}");
    if Runtime::under_test() == Runtime::Husk {
        ensure!(code(&result) == Some(Code::FAILED_PRECONDITION), "{result:?}");
    }
    ensure!(shim.task.state(&id, "")?.status.value() == 2, "the container no longer runs");
    Ok(())
}

#[test]
fn connect_returns_the_pids_of_the_shim_and_of_the_container() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "connect")?;
    let connected: api::ConnectResponse =
        shim.task.call("Connect", &api::ConnectRequest { id: id.clone(), ..Default::default() })?;
    ensure!(connected.shim_pid > 0 && connected.task_pid > 0, "{connected:?}");
    ensure!(connected.task_pid == shim.task.state(&id, "")?.pid, "{connected:?}");
    let pids: api::PidsResponse = shim.task.call("Pids", &api::PidsRequest { id: id.clone(), ..Default::default() })?;
    // Under husk, Pids lists the processes in the guest: it contains the PID only by chance.
    let listed = pids.processes.iter().any(|process| process.pid == connected.task_pid);
    ensure!(!pids.processes.is_empty() && (listed || Runtime::under_test() == Runtime::Husk), "{pids:?}");
    Ok(())
}

#[test]
fn events_are_in_order_and_contain_host_paths() -> Result<()> {
    use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExit, TaskStart};
    let containerd = Containerd::shared()?;
    let id = containerd.id("events");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", "exit 6"]))?;
    let (status, ..) = shim.run()?;
    let events = shim.events.until("/tasks/delete", Duration::from_secs(60))?;
    let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
    ensure!(topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"], "{topics:?}");
    let create: TaskCreate = events[0].decode()?;
    let start: TaskStart = events[1].decode()?;
    let exit: TaskExit = events[2].decode()?;
    let delete: TaskDelete = events[3].decode()?;
    ensure!(create.bundle == shim.bundle.path.display().to_string(), "{create:?}");
    ensure!(create.io.stdout.ends_with("init.out") && create.rootfs.len() == 1, "{create:?}");
    ensure!(create.pid == start.pid && start.pid == exit.pid && exit.pid == delete.pid && create.pid > 0);
    ensure!(status == 6 && exit.exit_status == 6 && delete.exit_status == 6, "{exit:?} {delete:?}");
    ensure!(exit.id == id && exit.exited_at == delete.exited_at && exit.exited_at.seconds > 1_600_000_000, "{exit:?}");
    Ok(())
}

#[test]
fn after_shutdown_the_process_and_its_socket_are_gone() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "shutdown")?;
    let (process, below) = containerd.shim_of(&id)?;
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    shim.task.delete(&id, "")?;
    shim.shutdown();
    let socket = containerd.path(&shim.socket);
    let gone = || {
        let alive = process.is_alive() || below.iter().any(|process| process.is_alive());
        (!alive && !socket.exists()).then_some(())
    };
    wait_for(Duration::from_secs(60), "the shim, its children and its socket are gone", gone)
}

/// Runs `delete` as containerd does, and checks its output and that nothing is left.
fn expect_cleaned_up(shim: &Shim, id: &str, below: &[Process]) -> Result<()> {
    let deleted = shim.delete_action()?.ok()?;
    let response = api::DeleteResponse::parse_from_bytes(&deleted.stdout).with_context(|| deleted.to_string())?;
    ensure!(response.exit_status == 137, "{response:?}");
    let alive: Vec<_> = below.iter().filter(|process| process.is_alive()).collect();
    ensure!(alive.is_empty(), "still running: {alive:#?}");
    let state = shim.containerd().path(Path::new("/run/husk/husk-test").join(id));
    ensure!(!state.exists(), "{} still exists", state.display());
    Ok(())
}

#[test]
fn delete_of_a_killed_shim_reports_137_and_cleans_up() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "delete")?;
    let (process, below) = containerd.shim_of(&id)?;
    process.kill();
    wait_for(Duration::from_secs(60), "the shim dies", || (!process.is_alive()).then_some(()))?;
    expect_cleaned_up(&shim, &id, &below)?;
    // A second time, as containerd may after a restart.
    shim.delete_action()?.ok()?;
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_shim_runs_after_the_last_delete_until_shutdown() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "last-delete")?;
    let (process, below) = containerd.shim_of(&id)?;
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    shim.task.delete(&id, "")?;
    let state = containerd.path(Path::new("/run/husk/husk-test").join(&id));
    let cleaned = || (!state.exists() && below.iter().all(|process| !process.is_alive())).then_some(());
    wait_for(Duration::from_secs(60), "everything is cleaned up", cleaned)?;
    // A slow client must be able to receive the response to its Delete.
    ensure!(code(&shim.task.state(&id, "")) == Some(Code::NOT_FOUND), "the shim no longer responds");
    shim.shutdown();
    wait_for(Duration::from_secs(60), "the shim is gone", || (!process.is_alive()).then_some(()))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn delete_kills_a_hanging_shim_and_cleans_up() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "hangs")?;
    let (process, below) = containerd.shim_of(&id)?;
    // A shim that is being killed but not yet dead appears the same: it exists but does not respond.
    process.stop();
    expect_cleaned_up(&shim, &id, &below)?;
    ensure!(!process.is_alive(), "the shim still runs");
    Ok(())
}
