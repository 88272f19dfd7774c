//! The shim's interface to containerd: its start, its service names, its responses and its `delete` action.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::{self, Code};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle::{self, Bundle};
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::events::Sink;
use husk_tests::husk_only;
use husk_tests::process::Process;
use husk_tests::shim::{Api, Bootstrap, Shim, Task, action, address, code};

/// An idle container and its id.
fn running<'a>(containerd: &'a Containerd, name: &str) -> Result<(Shim<'a>, String)> {
    let shim = Shim::idle(containerd, name)?;
    let id = shim.bundle.id.clone();
    Ok((shim, id))
}

#[test]
fn start_prints_an_address_and_nothing_on_stderr() -> Result<()> {
    husk_only!();
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
fn start_understands_the_parameters_of_containerd_2_3() -> Result<()> {
    husk_only!();
    let containerd = Containerd::shared()?;
    let id = containerd.id("params");
    let bundle = Bundle::write(containerd, &id, &bundle::spec(&id, &["true"]))?;
    let events = Sink::start()?;
    let started = action(containerd, &bundle, &events, &Bootstrap::Params, "start")?.ok()?;
    ensure!(started.stderr.is_empty(), "{started}");
    let result = BootstrapResult::parse_from_bytes(&started.stdout).with_context(|| started.to_string())?;
    ensure!(result.version == 3 && result.protocol == "ttrpc", "{result:?}");
    let task = Task::connect(&containerd.path(address(&result.address)?), Api::V3)?;
    let state = task.state(&id, "");
    ensure!(code(&state) == Some(Code::NOT_FOUND), "{state:?}");
    Ok(())
}

#[test]
fn the_task_service_is_available_under_both_names() -> Result<()> {
    husk_only!();
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "names")?;
    let two = shim.client(Api::V2)?.state(&id, "")?;
    let three = shim.client(Api::V3)?.state(&id, "")?;
    ensure!(two == three && two.id == id && two.pid > 0, "{two:?} {three:?}");
    ensure!(two.bundle == shim.bundle.path.display().to_string(), "not the host's bundle: {two:?}");
    Ok(())
}

#[test]
fn unsupported_calls_return_unimplemented() -> Result<()> {
    husk_only!();
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
    let events = shim.events.until("/tasks/delete", Duration::from_secs(20))?;
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
    wait_for(Duration::from_secs(20), "the shim, its children and its socket are gone", gone)
}

/// Runs `delete` as containerd does, and checks its output and that nothing is left.
fn expect_cleaned_up(shim: &Shim, id: &str, below: &[Process]) -> Result<()> {
    let deleted = shim.delete_action()?.ok()?;
    ensure!(deleted.took < Duration::from_secs(5), "containerd's timeout is 5 s: {deleted}");
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
    wait_for(Duration::from_secs(5), "the shim dies", || (!process.is_alive()).then_some(()))?;
    expect_cleaned_up(&shim, &id, &below)?;
    // A second time, as containerd may after a restart.
    shim.delete_action()?.ok()?;
    Ok(())
}

#[test]
fn the_shim_runs_after_the_last_delete_until_shutdown() -> Result<()> {
    husk_only!();
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "last-delete")?;
    let (process, below) = containerd.shim_of(&id)?;
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    shim.task.delete(&id, "")?;
    let state = containerd.path(Path::new("/run/husk/husk-test").join(&id));
    let cleaned = || (!state.exists() && below.iter().all(|process| !process.is_alive())).then_some(());
    wait_for(Duration::from_secs(20), "everything is cleaned up", cleaned)?;
    // A slow client must be able to receive the response to its Delete.
    ensure!(code(&shim.task.state(&id, "")) == Some(Code::NOT_FOUND), "the shim no longer responds");
    shim.shutdown();
    wait_for(Duration::from_secs(5), "the shim is gone", || (!process.is_alive()).then_some(()))
}

#[test]
fn delete_kills_a_hanging_shim_and_cleans_up() -> Result<()> {
    husk_only!();
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "hangs")?;
    let (process, below) = containerd.shim_of(&id)?;
    // A shim that is being killed but not yet dead appears the same: it exists but does not respond.
    process.stop();
    expect_cleaned_up(&shim, &id, &below)?;
    ensure!(!process.is_alive(), "the shim still runs");
    Ok(())
}
