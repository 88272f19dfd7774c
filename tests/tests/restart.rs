//! containerd can stop and restart while containers run: the containers keep running, and no event or output is lost.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::events::task::TaskExit;
use husk_tests::artifacts::Version;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::events::{Sink, Watch};
use husk_tests::fifo;
use husk_tests::leftovers::Leftovers;
use husk_tests::on_every_containerd;
use husk_tests::shim::{Api, Shim, Streams, Task};
use nix::sys::signal::Signal;

const DEADLINE: Duration = Duration::from_secs(60);
/// Makes the restart monitor check every second; it has one name in 1.x and another in 2.x.
const MONITOR: &str = r#"[plugins."io.containerd.internal.v1.restart"]
interval = "1s"
[plugins."io.containerd.monitor.container.v1.restart"]
interval = "1s"
"#;

on_every_containerd!(
    containers_outlive_a_stopped_containerd,
    containers_outlive_a_killed_containerd,
    #[cfg_attr(runc, ignore = "about VMs")]
    the_restart_monitor_restarts_a_container_after_its_vm_was_killed,
);

fn containers_outlive_a_stopped_containerd(version: Version) -> Result<()> {
    outlive(version, Signal::SIGTERM)
}

fn containers_outlive_a_killed_containerd(version: Version) -> Result<()> {
    outlive(version, Signal::SIGKILL)
}

fn outlive(version: Version, signal: Signal) -> Result<()> {
    let containerd = Containerd::start(version)?;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(&containerd);
    let traps = "trap 'exit 7' TERM; trap 'echo signalled' USR1; touch /trapped; while :; do sleep 0.1; done";
    let stays = containerd.detached(&[], "stays", &["sh", "-c", traps])?;
    let ends = containerd.detached(&[], "ends", &["sh", "-c", traps])?;
    for container in [&stays, &ends] {
        wait_for(DEADLINE, "the trap is set", || container.script("ls /trapped").ok())?;
    }
    let dies = containerd.detached(&[], "dies", &["sleep", "1000"])?;
    let (shim, _) = containerd.shim_of(stays.id())?;

    let task = Task::connect(&containerd.shim_socket(ends.id())?, Api::V2)?;
    containerd.stop(signal)?;
    // This container exits while containerd is down.
    task.kill(ends.id(), "", Signal::SIGTERM as u32)?;
    ensure!(task.wait(ends.id(), "")? == 7);
    containerd.restart()?;

    ensure!(stays.status()?.as_deref() == Some("RUNNING"), "{:?}", stays.status()?);
    ensure!(containerd.shim_of(stays.id())?.0 == shim, "the container has another shim");
    // A starting containerd considers a shim without a process leaked and deletes it; 1.6 does not.
    match ends.status()?.as_deref() {
        None => {}
        Some("STOPPED") => ensure!(ends.delete_task()? == 7),
        Some(status) => bail!("the exited container is {status}"),
    }
    dies.kill_and_wait()?;
    ensure!(dies.delete_task()? == 137);

    // Exec, attach and wait work as before.
    stays.exec(&["sh", "-c", "exit 9"]).expect_code(9)?;
    let mut attach = containerd.ctr(["task", "attach", stays.id()]).command();
    let mut attached = attach.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    // Signals instead of an exec that ends the container: `ctr task attach` deletes the container then, while
    // `ctr task exec` still waits for its process. And the container ends when the client is attached.
    stays.kill("SIGUSR1")?;
    let (mut stdout, mut output) = (BufReader::new(attached.stdout.take().context("stdout")?), String::new());
    stdout.read_line(&mut output)?;
    stays.kill("SIGTERM")?;
    stdout.read_to_string(&mut output)?;
    let status = attached.wait()?;
    ensure!(output == "signalled\n" && status.code() == Some(7), "attach: {output:?}, {status}");
    // `ctr task attach` deletes the task after it has seen its exit.
    ensure!(stays.status()?.is_none(), "{:?}", stays.status()?);
    for container in [&stays, &ends, &dies] {
        containerd.ctr(["container", "rm", container.id()]).ok()?;
    }
    // containerd is a new process. And ctr owns the fifos: it removes those of the tasks that it deletes, if it knows
    // them.
    let excused = |line: &str| line.contains(" containerd: ") || line.contains("/run/containerd/fifo/");
    before.expect_none_since_but(&containerd, excused)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn events_wait_for_containerd_and_arrive_once_and_in_order() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("events");
    let mut shim = Shim::start_with(containerd, &id, &bundle::spec(&id, &["sh", "-c", "exit 6"]), Sink::closed()?)?;
    shim.create_and_start(&Streams::default())?;
    // Wait returns before the event is delivered.
    ensure!(shim.task.wait(&id, "")? == 6);
    shim.events.open()?;
    let events = shim.events.until("/tasks/exit", DEADLINE)?;
    let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
    ensure!(topics == ["/tasks/create", "/tasks/start", "/tasks/exit"], "{topics:?}");
    ensure!(events[2].decode::<TaskExit>()?.exit_status == 6);
    shim.task.delete(&id, "")?;
    let events = shim.events.until("/tasks/delete", DEADLINE)?;
    ensure!(events.len() == 1, "{events:#?}");
    Ok(())
}

#[test]
fn output_is_complete_although_containerd_was_killed_meanwhile() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let script = "while [ ! -e /begin ]; do sleep 0.1; done; for n in $(seq 1 200); do echo $n; sleep 0.02; done; \
        while [ ! -e /go ]; do sleep 0.1; done; echo end";
    let container = containerd.detached(&[], "output", &["sh", "-c", script])?;
    // Read like a client that is not containerd itself, and so survives it.
    let fifo = containerd.sh(&format!("ls /run/containerd/fifo/*/{}-stdout", container.id()))?.text();
    let mut stdout = fifo::Reader::open(&containerd.path(fifo))?;
    // Only now: an exiting ctr may still consume output written while it runs.
    container.script("touch /begin")?;
    let mut output = stdout.read(8, DEADLINE)?;
    containerd.stop(Signal::SIGKILL)?;
    output.extend(stdout.read(8, DEADLINE)?);
    containerd.restart()?;
    // The init's exit may kill this exec.
    let touched = container.exec(&["touch", "/go"]).output()?;
    ensure!(matches!(touched.code(), 0 | 137), "{touched}");
    output.extend(stdout.read_to_end(DEADLINE)?);
    let output = String::from_utf8(output)?;
    let expected: String = (1..=200).map(|n| format!("{n}\n")).chain(["end\n".to_owned()]).collect();
    ensure!(output == expected, "{output:?}");
    Ok(())
}

#[test]
fn a_restarted_containerd_receives_new_events() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "restarted", &["sleep", "1000"])?;
    containerd.stop(Signal::SIGKILL)?;
    containerd.restart()?;
    let watch = Watch::start(&containerd)?;
    container.kill("SIGKILL")?;
    let events = watch.collect(container.id(), DEADLINE, |event| event.topic == "/tasks/exit")?;
    ensure!(events.len() == 1 && events[0].fields["exit_status"] == 137, "{events:#?}");
    Ok(())
}

fn the_restart_monitor_restarts_a_container_after_its_vm_was_killed(version: Version) -> Result<()> {
    let setup = Setup { version: Some(version), config: MONITOR.to_owned(), ..Setup::default() };
    let containerd = Containerd::with(setup)?;
    let label = ["--label", "containerd.io/restart.status=running"];
    let container = containerd.detached(&label, "again", &["sleep", "1000"])?;
    let boot = |script: &str| container.script(script).ok().filter(|id| !id.is_empty());
    // On a slow machine the monitor may find the container created but not yet running, and restart it before the test
    // sees it.
    let first = wait_for(DEADLINE, "the first boot's id", || boot("cat /proc/sys/kernel/random/boot_id"))?;
    containerd.qemu_of(container.id())?.kill();
    let second = wait_for(DEADLINE, "the container runs again", || {
        boot("cat /proc/sys/kernel/random/boot_id").filter(|id| *id != first)
    })
    .with_context(|| containerd.log_tail())?;
    ensure!(first != second);
    // Otherwise the monitor would restart it during the test's cleanup.
    containerd.ctr(["container", "label", container.id(), "containerd.io/restart.status=stopped"]).ok()?;
    Ok(())
}
