//! `ctr run` and the related commands, with every supported containerd.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::events::Watch;
use husk_tests::on_every_containerd;

on_every_containerd!(
    output_and_exit_status_reach_the_user,
    #[cfg_attr(runc, ignore = "about VMs")]
    the_kernel_inside_is_not_the_hosts_kernel,
    a_killed_container_exits_with_137,
    a_background_container_supports_exec_kill_and_delete,
    two_containers_do_not_see_each_other,
    events_are_complete_and_in_order,
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

fn the_kernel_inside_is_not_the_hosts_kernel(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let inside = containerd.script(&[], "uname", "uname -r; cat /proc/version /proc/cmdline")?;
    let host = std::fs::read_to_string("/proc/version")?;
    ensure!(!inside.contains(host.trim()), "the container runs on the host's kernel: {inside}");
    ensure!(inside.starts_with("6.12"), "not the kernel of kernel-config/: {inside}");
    // Without this parameter the guest calibrates its clock, a quarter of a second per boot. With KVM it has a better
    // clock.
    let kvm =
        std::path::Path::new("/sys/module/kvm_intel").exists() || std::path::Path::new("/sys/module/kvm_amd").exists();
    ensure!(kvm || inside.contains("tsc_early_khz="), "the guest did not receive its clock's frequency: {inside}");
    Ok(())
}

fn a_killed_container_exits_with_137(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let container = containerd.detached(&[], "killed", &["sleep", "1000"])?;
    container.kill_and_wait()?;
    ensure!(container.delete_task()? == 137);
    Ok(())
}

fn a_background_container_supports_exec_kill_and_delete(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let script = "trap 'exit 42' TERM; echo started > /state; while :; do sleep 0.1; done";
    let container = containerd.detached(&[], "background", &["sh", "-c", script])?;
    ensure!(container.status()?.as_deref() == Some("RUNNING"));

    // The trap is set once the file exists.
    wait_for(Duration::from_secs(60), "the script starts", || container.script("cat /state").ok())?;
    container.exec(&["sh", "-c", "echo inside; exit 9"]).expect_code(9)?;
    ensure!(
        container.script("cat /proc/1/cmdline | tr '\\0' ' '")?.contains("trap"),
        "the exec ran in another container"
    );

    let processes = containerd.ctr(["task", "ps", container.id()]).ok()?.text();
    ensure!(processes.lines().count() >= 2, "no process in `ctr task ps`:\n{processes}");

    container.kill("SIGTERM")?;
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 42);
    ensure!(container.status()?.is_none(), "the task is still listed after its deletion");
    containerd.ctr(["container", "rm", container.id()]).ok()?;
    Ok(())
}

fn two_containers_do_not_see_each_other(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let one = containerd.detached(&[], "one", &["sh", "-c", "echo 1 > /who; sleep 1000"])?;
    let two = containerd.detached(&[], "two", &["sh", "-c", "echo 2 > /who; sleep 1001"])?;
    let who = |container: &husk_tests::containerd::Container<'_>| {
        wait_for(Duration::from_secs(60), "/who is written", || container.script("cat /who").ok())
    };
    ensure!(who(&one)? == "1" && who(&two)? == "2");
    let processes = one.script("ps")?;
    ensure!(
        processes.contains("sleep 1000") && !processes.contains("sleep 1001"),
        "the first container sees the second:\n{processes}"
    );
    one.kill_and_wait()?;
    ensure!(two.script("cat /who")? == "2", "the second container no longer works");
    Ok(())
}

fn events_are_complete_and_in_order(version: Version) -> Result<()> {
    let containerd = Containerd::shared_of(version)?;
    let watch = Watch::start(containerd)?;
    let container = containerd.detached(&[], "events", &["sleep", "1000"])?;
    containerd.ctr(["task", "exec", "--exec-id", "second", container.id(), "sh", "-c", "exit 3"]).expect_code(3)?;
    container.kill_and_wait()?;
    ensure!(container.delete_task()? == 137);

    // containerd itself publishes the deletion of an exec with the same topic and the exec's id.
    let deleted = |event: &husk_tests::events::Event| event.topic == "/tasks/delete" && event.text("id") != "second";
    let mut events = watch.collect(container.id(), Duration::from_secs(60), deleted)?;
    events.retain(|event| event.topic != "/tasks/delete" || deleted(event));
    let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(topics == expected, "events: {events:#?}");

    let [create, start, added, started, exec_exit, exit, delete] = events.as_slice() else {
        unreachable!("the number of events was checked above")
    };
    let pid = create.fields["pid"].as_u64().context("create has no pid")?;
    ensure!(pid > 0);
    let bundle = format!("/run/containerd/state/io.containerd.runtime.v2.task/husk-test/{}", container.id());
    ensure!(create.text("bundle") == bundle, "not the host's bundle: {create:?}");
    ensure!(start.fields["pid"] == pid, "{start:?}");
    ensure!(added.text("exec_id") == "second" && started.text("exec_id") == "second", "{added:?} {started:?}");
    // Under husk, one process on the host represents the container and its execs.
    let shared = Runtime::under_test() == Runtime::Husk;
    ensure!(started.fields["pid"].as_u64().is_some_and(|exec| exec > 0 && (exec == pid) == shared), "{started:?}");
    ensure!(exec_exit.text("id") == "second" && exec_exit.fields["exit_status"] == 3, "{exec_exit:?}");
    ensure!(exec_exit.fields["pid"] == started.fields["pid"], "{exec_exit:?}");
    ensure!(exit.text("id") == container.id() && exit.fields["pid"] == pid, "{exit:?}");
    ensure!(exit.fields["exit_status"] == 137, "{exit:?}");
    // 1.6 prints a date, later versions print the message's fields.
    let exited_at = &exit.fields["exited_at"];
    ensure!(exited_at.is_string() || exited_at["seconds"].as_u64().is_some_and(|s| s > 0), "{exit:?}");
    ensure!(delete.fields["exit_status"] == 137 && delete.fields["pid"] == pid, "{delete:?}");
    Ok(())
}
