//! `ctr run` and what belongs to it, on every containerd that husk works with.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Version;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::events::Watch;
use husk_tests::on_every_containerd;

on_every_containerd!(
    output_and_exit_status_reach_the_user,
    the_kernel_inside_is_not_the_hosts,
    a_killed_container_says_137,
    a_container_in_the_background_can_be_entered_killed_and_deleted,
    two_containers_at_once_do_not_meet,
    events_come_in_order_and_complete,
);

fn output_and_exit_status_reach_the_user(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let ran = containerd.run(&[], &containerd.id("zero"), &["sh", "-c", "echo out; echo err >&2"]).ok()?;
    ensure!(ran.text() == "out" && ran.errors().trim() == "err", "{ran}");
    for status in [7, 255] {
        let id = containerd.id("status");
        containerd.run(&[], &id, &["sh", "-c", &format!("exit {status}")]).expect_code(status)?;
    }
    Ok(())
}

fn the_kernel_inside_is_not_the_hosts(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    if !containerd.runtime().is_husk_or_tell("the_kernel_inside_is_not_the_hosts") {
        return Ok(());
    }
    let inside = containerd.script(&[], "uname", "uname -r; cat /proc/version /proc/cmdline")?;
    let host = std::fs::read_to_string("/proc/version")?;
    ensure!(!inside.contains(host.trim()), "the container runs on the host's kernel: {inside}");
    ensure!(inside.starts_with("6.12"), "not the kernel of kernel-config/: {inside}");
    // Without it the guest measures its clocks, a quarter of a second of each boot; with KVM it has better ones.
    let kvm =
        std::path::Path::new("/sys/module/kvm_intel").exists() || std::path::Path::new("/sys/module/kvm_amd").exists();
    ensure!(kvm || inside.contains("tsc_early_khz="), "the guest was not told its clock's frequency: {inside}");
    Ok(())
}

fn a_killed_container_says_137(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let container = containerd.detached(&[], "killed", &["sleep", "1000"])?;
    container.kill("SIGKILL")?;
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 137);
    Ok(())
}

fn a_container_in_the_background_can_be_entered_killed_and_deleted(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let script = "trap 'exit 42' TERM; echo started > /state; while :; do sleep 0.1; done";
    let container = containerd.detached(&[], "background", &["sh", "-c", script])?;
    ensure!(container.status()?.as_deref() == Some("RUNNING"));

    // The trap is set when the file is there.
    wait_for(Duration::from_secs(20), "the script has started", || container.script("cat /state").ok())?;
    container.exec(&["sh", "-c", "echo inside; exit 9"]).expect_code(9)?;
    ensure!(container.script("cat /proc/1/cmdline | tr '\\0' ' '")?.contains("trap"), "exec is in another container");

    let processes = containerd.ctr(["task", "ps", container.id()]).ok()?.text();
    ensure!(processes.lines().count() >= 2, "no process in `ctr task ps`:\n{processes}");

    container.kill("SIGTERM")?;
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 42);
    ensure!(container.status()?.is_none(), "the task is still listed after its deletion");
    containerd.ctr(["container", "rm", container.id()]).ok()?;
    Ok(())
}

fn two_containers_at_once_do_not_meet(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let one = containerd.detached(&[], "one", &["sh", "-c", "echo 1 > /who; sleep 1000"])?;
    let two = containerd.detached(&[], "two", &["sh", "-c", "echo 2 > /who; sleep 1001"])?;
    let who = |container: &husk_tests::containerd::Container<'_>| {
        wait_for(Duration::from_secs(20), "/who is written", || container.script("cat /who").ok())
    };
    ensure!(who(&one)? == "1" && who(&two)? == "2");
    let seen = one.script("ps")?;
    ensure!(seen.contains("sleep 1000") && !seen.contains("sleep 1001"), "the first sees the second:\n{seen}");
    one.kill("SIGKILL")?;
    one.await_status("STOPPED")?;
    ensure!(two.script("cat /who")? == "2", "the second does not work any more");
    Ok(())
}

fn events_come_in_order_and_complete(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let watch = Watch::start(containerd)?;
    let container = containerd.detached(&[], "events", &["sleep", "1000"])?;
    containerd.ctr(["task", "exec", "--exec-id", "second", container.id(), "sh", "-c", "exit 3"]).expect_code(3)?;
    container.kill("SIGKILL")?;
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 137);

    // containerd itself reports the deletion of an exec with the same topic, and the id of the exec.
    let deleted = |event: &husk_tests::events::Event| event.topic == "/tasks/delete" && event.text("id") != "second";
    let mut events = watch.collect(container.id(), Duration::from_secs(20), deleted)?;
    events.retain(|event| event.topic != "/tasks/delete" || deleted(event));
    let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
    let wanted = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(topics == wanted, "events: {events:#?}");

    let [create, start, added, started, exec_exit, exit, delete] = events.as_slice() else {
        unreachable!("as many as wanted, which was tested")
    };
    let pid = create.fields["pid"].as_u64().context("create has no pid")?;
    ensure!(pid > 0);
    let bundle = format!("/run/containerd/state/io.containerd.runtime.v2.task/husk-test/{}", container.id());
    ensure!(create.text("bundle") == bundle, "not the host's bundle: {create:?}");
    ensure!(start.fields["pid"] == pid, "{start:?}");
    ensure!(added.text("exec_id") == "second" && started.text("exec_id") == "second", "{added:?} {started:?}");
    ensure!(started.fields["pid"].as_u64().is_some_and(|exec| exec > 0 && exec != pid), "{started:?}");
    ensure!(exec_exit.text("id") == "second" && exec_exit.fields["exit_status"] == 3, "{exec_exit:?}");
    ensure!(exec_exit.fields["pid"] == started.fields["pid"], "{exec_exit:?}");
    ensure!(exit.text("id") == container.id() && exit.fields["pid"] == pid, "{exit:?}");
    ensure!(exit.fields["exit_status"] == 137, "{exit:?}");
    // 1.6 prints a date, later versions the message's fields.
    let exited_at = &exit.fields["exited_at"];
    ensure!(exited_at.is_string() || exited_at["seconds"].as_u64().is_some_and(|s| s > 0), "{exit:?}");
    ensure!(delete.fields["exit_status"] == 137 && delete.fields["pid"] == pid, "{delete:?}");
    Ok(())
}
