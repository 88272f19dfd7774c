//! containerd may end and come back while containers run: they do not notice, and nothing of theirs is lost.

use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::events::task::TaskExit;
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Container, Containerd, Setup};
use husk_tests::events::{Sink, Watch};
use husk_tests::fifo;
use husk_tests::leftovers::Leftovers;
use husk_tests::on_every_containerd;
use husk_tests::shim::{Api, Shim, Streams, Task};
use nix::sys::signal::Signal;

const DEADLINE: Duration = Duration::from_secs(60);
/// Makes the monitor look every second, under the name that it has in 1.x and in 2.x.
const MONITOR: &str = r#"[plugins."io.containerd.internal.v1.restart"]
interval = "1s"
[plugins."io.containerd.monitor.container.v1.restart"]
interval = "1s"
"#;

on_every_containerd!(
    containers_outlive_a_stopped_containerd,
    containers_outlive_a_killed_containerd,
    the_restart_monitor_brings_a_container_back_after_its_vm_was_killed,
);

fn containers_outlive_a_stopped_containerd(version: Version) -> Result<()> {
    outlive(version, Signal::SIGTERM)
}

fn containers_outlive_a_killed_containerd(version: Version) -> Result<()> {
    outlive(version, Signal::SIGKILL)
}

/// Makes the file that the container's init waits for. The init's end takes the exec along if it is faster.
fn let_go(container: &Container) -> Result<()> {
    let made = container.exec(&["touch", "/go"]).output()?;
    ensure!(matches!(made.code(), 0 | 137), "{made}");
    Ok(())
}

fn outlive(version: Version, signal: Signal) -> Result<()> {
    let containerd = Containerd::start(version)?;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(&containerd);
    let waits = "while [ ! -e /go ]; do sleep 0.1; done; echo went; exit 3";
    let stays = containerd.detached(&[], "stays", &["sh", "-c", waits])?;
    let traps = "trap 'exit 7' TERM; touch /trapped; while :; do sleep 0.1; done";
    let ends = containerd.detached(&[], "ends", &["sh", "-c", traps])?;
    wait_for(DEADLINE, "the trap is set", || ends.script("ls /trapped").ok())?;
    let dies = containerd.detached(&[], "dies", &["sleep", "1000"])?;
    let (shim, _) = containerd.shim_of(stays.id())?;

    let task = Task::connect(&containerd.shim_socket(ends.id())?, Api::V2)?;
    containerd.end(signal)?;
    // It ends while nobody is there to be told.
    task.kill(ends.id(), "", Signal::SIGTERM as u32)?;
    ensure!(task.wait(ends.id(), "")? == 7);
    containerd.start_again()?;

    ensure!(stays.status()?.as_deref() == Some("RUNNING"), "{:?}", stays.status()?);
    ensure!(containerd.shim_of(stays.id())?.0 == shim, "it has another shim now");
    // A starting containerd takes a shim without any process for one that leaked, and has it deleted; 1.6 does not.
    match ends.status()?.as_deref() {
        None => {}
        Some("STOPPED") => ensure!(ends.delete_task()? == 7),
        Some(status) => bail!("the container that ended is {status}"),
    }
    dies.kill("SIGKILL")?;
    dies.await_status("STOPPED")?;
    ensure!(dies.delete_task()? == 137);

    // Entered, attached to and waited for as before.
    stays.exec(&["sh", "-c", "exit 9"]).expect_code(9)?;
    let mut attach = containerd.ctr(["task", "attach", stays.id()]).command();
    let mut attached = attach.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let_go(&stays)?;
    let mut said = String::new();
    attached.stdout.take().context("stdout")?.read_to_string(&mut said)?;
    let status = attached.wait()?;
    ensure!(said == "went\n" && status.code() == Some(3), "attach: {said:?}, {status}");
    // `ctr task attach` deletes the task whose end it has seen.
    ensure!(stays.status()?.is_none(), "{:?}", stays.status()?);
    for container in [&stays, &ends, &dies] {
        containerd.ctr(["container", "rm", container.id()]).ok()?;
    }
    // containerd is another process now; and fifos are the client's own: ctr removes those of the tasks that it deletes, if it knows them.
    let excused = |line: &str| line.contains(" containerd: ") || line.contains("/run/containerd/fifo/");
    before.expect_none_since_but(&containerd, excused)
}

#[test]
fn events_wait_for_containerd_and_come_once_and_in_order() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("events_wait_for_containerd_and_come_once_and_in_order") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let id = containerd.id("events");
    let mut shim = Shim::start_with(containerd, &id, &bundle::spec(&id, &["sh", "-c", "exit 6"]), Sink::closed()?)?;
    shim.create(&Streams::default())?;
    shim.task.start(&id, "")?;
    // The answer does not wait for the event's delivery.
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
fn output_is_whole_although_containerd_was_killed_in_between() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let script = "while [ ! -e /begin ]; do sleep 0.1; done; for n in $(seq 1 200); do echo $n; sleep 0.02; done; \
        while [ ! -e /go ]; do sleep 0.1; done; echo end";
    let container = containerd.detached(&[], "output", &["sh", "-c", script])?;
    // Read as a client would that is not containerd itself, and so does not end with it.
    let fifo = containerd.sh(&format!("ls /run/containerd/fifo/*/{}-stdout", container.id()))?.text();
    let mut stdout = fifo::Reader::open(&containerd.path(fifo))?;
    // Not before: a ctr that leaves may still take what is said while it is there.
    container.script("touch /begin")?;
    let mut said = stdout.read(8, DEADLINE)?;
    containerd.end(Signal::SIGKILL)?;
    said.extend(stdout.read(8, DEADLINE)?);
    containerd.start_again()?;
    let_go(&container)?;
    said.extend(stdout.read_to_end(DEADLINE)?);
    let said = String::from_utf8(said)?;
    let wanted: String = (1..=200).map(|n| format!("{n}\n")).chain(["end\n".to_owned()]).collect();
    ensure!(said == wanted, "{said:?}");
    Ok(())
}

#[test]
fn a_restarted_containerd_hears_of_what_happens_next() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "hears", &["sleep", "1000"])?;
    containerd.end(Signal::SIGKILL)?;
    containerd.start_again()?;
    let watch = Watch::start(&containerd)?;
    container.kill("SIGKILL")?;
    let events = watch.collect(container.id(), DEADLINE, |event| event.topic == "/tasks/exit")?;
    ensure!(events.len() == 1 && events[0].fields["exit_status"] == 137, "{events:#?}");
    Ok(())
}

fn the_restart_monitor_brings_a_container_back_after_its_vm_was_killed(version: Version) -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("the_restart_monitor_brings_a_container_back_after_its_vm_was_killed") {
        return Ok(());
    }
    let setup = Setup { version: Some(version), config: MONITOR.to_owned(), ..Setup::default() };
    let containerd = Containerd::with(setup)?;
    let label = ["--label", "containerd.io/restart.status=running"];
    let container = containerd.detached(&label, "again", &["sleep", "1000"])?;
    let boot = |script: &str| container.script(script).ok().filter(|id| !id.is_empty());
    // On a slow machine the monitor may find it created and not yet running, and start it anew before anybody has seen it.
    let first = wait_for(DEADLINE, "the first boot's id", || boot("cat /proc/sys/kernel/random/boot_id"))?;
    let (_, below) = containerd.shim_of(container.id())?;
    let vm = below.into_iter().find(|process| process.name.starts_with("qemu")).context("no QEMU")?;
    vm.kill();
    let second = wait_for(DEADLINE, "the container runs again", || {
        boot("cat /proc/sys/kernel/random/boot_id").filter(|id| *id != first)
    })
    .with_context(|| containerd.log_tail())?;
    ensure!(first != second);
    // Or it would be brought back while the test cleans up.
    containerd.ctr(["container", "label", container.id(), "containerd.io/restart.status=stopped"]).ok()?;
    Ok(())
}
