//! Signals reach exactly the intended processes, and exit statuses show which signal killed a process.

use std::time::Duration;

use anyhow::{Result, ensure};
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::ttrpc::Code;
use husk_tests::bundle;
use husk_tests::containerd::Containerd;
use husk_tests::shim::{Shim, Streams, code};
use serde_json::json;

/// A script that appends `name` to a file at each SIGUSR1. The directory `/run/<name>` shows that it is ready.
fn listens(name: &str) -> String {
    format!("trap 'echo {name} >> /run/received' USR1; mkdir -p /run/{name}; while :; do sleep 0.1; done")
}

#[test]
fn a_signal_reaches_only_the_init_only_an_exec_or_all_processes() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("signal");
    let script = format!("({}) & {}", listens("child"), listens("init"));
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", &script]))?;
    shim.run_detached()?;
    shim.start_exec("e", &bundle::process(&["sh", "-c", &listens("exec")]), &Streams::default())?;
    shim.script("ready", "until [ -d /run/init -a -d /run/child -a -d /run/exec ]; do :; done")?;

    let received = |round: &str, count: usize| {
        let waits = format!("until [ $(wc -l < /run/received) -ge {count} ]; do :; done; sort /run/received | xargs");
        shim.script(round, &waits)
    };
    shim.task.kill(&id, "", 10)?;
    ensure!(received("one", 1)? == "init");
    shim.task.kill(&id, "e", 10)?;
    ensure!(received("two", 2)? == "exec init");
    shim.task.kill_all(&id, 10)?;
    ensure!(received("three", 5)? == "child exec exec init init");

    // SIGKILL to all ends the exec with the init.
    shim.task.kill_all(&id, 9)?;
    ensure!(shim.task.wait(&id, "")? == 137 && shim.task.wait(&id, "e")? == 137);
    ensure!(code(&shim.task.kill(&id, "", 9)) == Some(Code::NOT_FOUND), "Kill after the exit");
    ensure!(code(&shim.task.kill(&id, "e", 15)) == Some(Code::NOT_FOUND), "Kill of an exec after its exit");
    Ok(())
}

#[test]
fn the_exit_status_after_a_signal_is_128_plus_its_number() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("numbers");
    let mut spec = bundle::spec(&id, &["sleep", "1000"]);
    // PID 1 of a PID namespace ignores signals without a handler, so this container has no PID namespace.
    spec["linux"]["namespaces"] = json!([{"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}]);
    let shim = Shim::start(containerd, &id, &spec)?;
    shim.run_detached()?;
    // HUP, INT, QUIT, ABRT, KILL, USR1, SEGV, TERM, and two signals without a name (signal(7)).
    for signal in [1, 2, 3, 6, 9, 10, 11, 15, 34, 64] {
        let exec = format!("e{signal}");
        shim.start_exec(&exec, &bundle::process(&["sleep", "1000"]), &Streams::default())?;
        shim.task.kill(&id, &exec, signal)?;
        let status = shim.task.wait(&id, &exec)?;
        ensure!(status == 128 + signal, "signal {signal}: {status}");
        ensure!(shim.task.delete(&id, &exec)? == 128 + signal);
    }
    shim.task.kill(&id, "", 15)?;
    ensure!(shim.task.wait(&id, "")? == 143 && shim.task.delete(&id, "")? == 143);
    Ok(())
}

#[test]
fn a_container_that_was_never_started_can_be_killed() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("never");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.create(&Streams::default())?;
    shim.task.kill(&id, "", 9)?;
    ensure!(shim.task.wait(&id, "")? == 137 && shim.task.delete(&id, "")? == 137);
    let events = shim.events.until("/tasks/delete", Duration::from_secs(60))?;
    let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
    ensure!(topics == ["/tasks/create", "/tasks/exit", "/tasks/delete"], "{topics:?}");
    let exit: TaskExit = events[1].decode()?;
    ensure!(exit.exit_status == 137 && exit.id == id && exit.pid > 0, "{exit:?}");
    Ok(())
}
