//! The shim's own border: how it is started, what it answers under which name, what its `delete` says.

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
use husk_tests::process::Process;
use husk_tests::shim::{Api, Bootstrap, Shim, Task, action, address, code};

fn is_husk(test: &str) -> bool {
    Runtime::under_test().is_husk_or_tell(test)
}

/// A running container, and its id.
fn running<'a>(containerd: &'a Containerd, name: &str) -> Result<(Shim<'a>, String)> {
    let shim = Shim::idle(containerd, name)?;
    let id = shim.bundle.id.clone();
    Ok((shim, id))
}

#[test]
fn start_prints_an_address_and_nothing_on_stderr() -> Result<()> {
    if !is_husk("start_prints_an_address_and_nothing_on_stderr") {
        return Ok(());
    }
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
    if !is_husk("start_understands_the_parameters_of_containerd_2_3") {
        return Ok(());
    }
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
fn the_task_service_answers_under_both_names() -> Result<()> {
    if !is_husk("the_task_service_answers_under_both_names") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "names")?;
    let two = shim.client(Api::V2)?.state(&id, "")?;
    let three = shim.client(Api::V3)?.state(&id, "")?;
    ensure!(two == three && two.id == id && two.pid > 0, "{two:?} {three:?}");
    ensure!(two.bundle == shim.bundle.path.display().to_string(), "not the host's bundle: {two:?}");
    Ok(())
}

#[test]
fn what_is_not_there_yet_answers_unimplemented() -> Result<()> {
    if !is_husk("what_is_not_there_yet_answers_unimplemented") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "unimplemented")?;
    let task = &shim.task;
    let checkpoint: ttrpc::Result<api::Empty> =
        task.call("Checkpoint", &api::CheckpointTaskRequest { id: id.clone(), ..Default::default() });
    ensure!(code(&checkpoint) == Some(Code::UNIMPLEMENTED), "{checkpoint:?}");
    Ok(())
}

#[test]
fn calls_about_what_does_not_exist_answer_not_found() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "not-found")?;
    let task = &shim.task;
    for (method, answer) in [
        ("State", code(&task.state("nobody", ""))),
        ("Kill", code(&task.kill("nobody", "", 9))),
        ("Delete", code(&task.delete("nobody", ""))),
        ("State of an exec", code(&task.state(&id, "nothing"))),
        ("Start of an exec", code(&task.start(&id, "nothing"))),
    ] {
        ensure!(answer == Some(Code::NOT_FOUND), "{method} answers {answer:?}");
    }
    Ok(())
}

#[test]
fn a_running_container_can_not_be_deleted() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "running")?;
    let answer = shim.task.delete(&id, "");
    // runc's shim hides its own precondition in an unknown error.
    ensure!(matches!(code(&answer), Some(Code::FAILED_PRECONDITION | Code::UNKNOWN)), "{answer:?}");
    if Runtime::under_test() == Runtime::Husk {
        ensure!(code(&answer) == Some(Code::FAILED_PRECONDITION), "{answer:?}");
    }
    ensure!(shim.task.state(&id, "")?.status.value() == 2, "it does not run any more");
    Ok(())
}

#[test]
fn connect_tells_the_pids_and_pids_lists_them() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "connect")?;
    let connected: api::ConnectResponse =
        shim.task.call("Connect", &api::ConnectRequest { id: id.clone(), ..Default::default() })?;
    ensure!(connected.shim_pid > 0 && connected.task_pid > 0, "{connected:?}");
    let pids: api::PidsResponse = shim.task.call("Pids", &api::PidsRequest { id: id.clone(), ..Default::default() })?;
    ensure!(pids.processes.iter().any(|process| process.pid == connected.task_pid), "{pids:?}");
    Ok(())
}

#[test]
fn events_come_in_order_with_the_hosts_view_of_things() -> Result<()> {
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
    // The shim may be gone before its answer is out.
    let _ = shim.task.shutdown(&id, false);
    let socket = containerd.path(&shim.socket);
    let gone = || {
        let alive = process.is_alive() || below.iter().any(|process| process.is_alive());
        (!alive && !socket.exists()).then_some(())
    };
    wait_for(Duration::from_secs(20), "the shim, its children and its socket are gone", gone)
}

/// Runs `delete` as containerd does, and looks at what it says and leaves.
fn expect_cleaned_up(shim: &Shim, id: &str, below: &[Process]) -> Result<()> {
    let deleted = shim.delete_action()?.ok()?;
    ensure!(deleted.took < Duration::from_secs(5), "containerd gives it 5 s: {deleted}");
    let answer = api::DeleteResponse::parse_from_bytes(&deleted.stdout).with_context(|| deleted.to_string())?;
    ensure!(answer.exit_status == 137, "{answer:?}");
    let alive: Vec<_> = below.iter().filter(|process| process.is_alive()).collect();
    ensure!(alive.is_empty(), "still there: {alive:#?}");
    let state = shim.containerd().path(Path::new("/run/husk/husk-test").join(id));
    ensure!(!state.exists(), "{} is still there", state.display());
    Ok(())
}

#[test]
fn delete_of_a_killed_shim_reports_137_and_cleans_up() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "delete")?;
    let (process, below) = containerd.shim_of(&id)?;
    process.kill();
    wait_for(Duration::from_secs(5), "the shim is dead", || (!process.is_alive()).then_some(()))?;
    expect_cleaned_up(&shim, &id, &below)?;
    // And once more, as containerd may after a restart.
    shim.delete_action()?.ok()?;
    Ok(())
}

#[test]
fn the_shim_stays_after_its_last_delete_until_it_is_dismissed() -> Result<()> {
    if !is_husk("the_shim_stays_after_its_last_delete_until_it_is_dismissed") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "dismissed")?;
    let (process, below) = containerd.shim_of(&id)?;
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    shim.task.delete(&id, "")?;
    let state = containerd.path(Path::new("/run/husk/husk-test").join(&id));
    let cleaned = || (!state.exists() && below.iter().all(|process| !process.is_alive())).then_some(());
    wait_for(Duration::from_secs(20), "all is cleaned up", cleaned)?;
    // A client that is slow to take the answer to its Delete must find the connection open.
    ensure!(code(&shim.task.state(&id, "")) == Some(Code::NOT_FOUND), "it does not answer any more");
    // The shim may be gone before its answer is out.
    let _ = shim.task.shutdown(&id, false);
    wait_for(Duration::from_secs(5), "the shim is gone", || (!process.is_alive()).then_some(()))
}

#[test]
fn delete_ends_a_shim_that_hangs_and_cleans_up() -> Result<()> {
    if !is_husk("delete_ends_a_shim_that_hangs_and_cleans_up") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let (shim, id) = running(containerd, "hangs")?;
    let (process, below) = containerd.shim_of(&id)?;
    // A shim that is being killed and is not dead yet looks the same: there, and deaf.
    process.stop();
    expect_cleaned_up(&shim, &id, &below)?;
    ensure!(!process.is_alive(), "the shim is still there");
    Ok(())
}
