//! Whatever happens to a container, its shim or its VM: afterwards the host is as it was before.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::events::Watch;
use husk_tests::leftovers::Leftovers;
use husk_tests::process;

/// A containerd to oneself, used once already: the first container leaves folders of containerd's own that stay.
fn alone() -> Result<(Containerd, Leftovers)> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(&containerd);
    Ok((containerd, before))
}

#[test]
fn nothing_is_left_of_the_first_container() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let before = Leftovers::now(&containerd);
    containerd.run(&[], &containerd.id("very-first"), &["true"]).ok()?;
    // What containerd itself sets up on first use, and the folder that all sandboxes of a namespace share.
    let stays = ["/run/containerd", "/run/husk", "/run/husk/husk-test", "/run/netns", "cgroup"];
    let state = "/run/containerd/state/io.containerd.runtime.v2.task/husk-test";
    let stays = |line: &String| {
        let folders = ["fifo", "runc", "runc/husk-test", "s"].map(|name| format!("folder /run/containerd/{name}"));
        let known = folders.contains(line) || *line == format!("folder {state}");
        known || stays.iter().any(|name| *line == format!("folder {name}"))
    };
    wait_for(Duration::from_secs(5), "only known folders are left", || {
        let added = before.added(&Leftovers::now(&containerd));
        added.iter().all(stays).then_some(())
    })
    .with_context(|| format!("{:#?}", before.added(&Leftovers::now(&containerd))))
}

#[test]
fn nothing_is_left_after_a_run() -> Result<()> {
    let (containerd, before) = alone()?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("kept"), "kept")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.path().display());
    containerd
        .run(&["--mount", &mount], &containerd.id("run"), &["sh", "-c", "echo x > /new; exit 5"])
        .expect_code(5)?;
    before.expect_none_since(&containerd)?;
    ensure!(fs::read_to_string(folder.path().join("kept"))? == "kept");
    Ok(())
}

#[test]
fn nothing_is_left_after_a_container_was_killed_and_deleted() -> Result<()> {
    let (containerd, before) = alone()?;
    let container = containerd.detached(&[], "killed", &["sh", "-c", "sleep 1000 & sleep 1000"])?;
    container.exec(&["sh", "-c", "exit 2"]).expect_code(2)?;
    let refused = container.exec(&["/no/such/command"]).output()?;
    ensure!(refused.code() != 0 && refused.errors().contains("/no/such/command"), "{refused}");
    container.kill("SIGKILL")?;
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 137);
    containerd.ctr(["container", "rm", container.id()]).ok()?;
    before.expect_none_since(&containerd)
}

#[test]
fn nothing_is_left_after_many_containers_at_once() -> Result<()> {
    let (containerd, before) = alone()?;
    std::thread::scope(|scope| -> Result<()> {
        let runs: Vec<_> = (0..4)
            .map(|n| {
                let containerd = &containerd;
                scope.spawn(move || containerd.run(&[], &containerd.id("many"), &["echo", &n.to_string()]).ok())
            })
            .collect();
        for (n, run) in runs.into_iter().enumerate() {
            let ran = run.join().map_err(|_| anyhow::anyhow!("a run panicked"))??;
            ensure!(ran.text() == n.to_string(), "{ran}");
        }
        Ok(())
    })?;
    before.expect_none_since(&containerd)
}

/// Kills with SIGKILL what `chosen` picks from the shim's children (none: the shim itself) while a container runs, and lets containerd clean up.
fn after_the_death_of(chosen: Option<&str>) -> Result<()> {
    let (containerd, before) = alone()?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("kept"), "kept")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.path().display());
    let container = containerd.detached(&["--mount", &mount], "death", &["sleep", "1000"])?;
    let watch = Watch::start(&containerd)?;
    let (shim, below) = containerd.shim_of(container.id())?;
    let victim = match chosen {
        None => shim,
        Some(name) => {
            let found = below.iter().find(|process| process.name.starts_with(name)).cloned();
            found.with_context(|| format!("the shim has no {name}: {below:#?}"))?
        }
    };
    let killed = Instant::now();
    victim.kill();
    let events = watch.collect(container.id(), Duration::from_secs(20), |event| event.topic == "/tasks/exit")?;
    let exit = events.last().context("an event")?;
    ensure!(exit.fields["exit_status"] == 137, "{exit:?}");
    ensure!(killed.elapsed() < Duration::from_secs(10), "the exit was told only after {:?}", killed.elapsed());

    if chosen.is_some() {
        // The shim lives, so the task is there until it is deleted.
        container.await_status("STOPPED")?;
        ensure!(container.delete_task()? == 137);
    } else {
        let gone = || container.status().map(|status| status.is_none().then_some(())).transpose();
        wait_for(Duration::from_secs(20), "containerd has dropped the task", gone)??;
    }
    containerd.ctr(["container", "rm", container.id()]).ok()?;
    drop(watch);
    // Fifos are the client's own: ctr removes them with the task, which was gone here before it could. And runc's shim leaves its socket.
    let runc = containerd.runtime() == Runtime::Runc;
    let excused = |line: &str| {
        chosen.is_none() && (line.contains("/run/containerd/fifo/") || runc && line.contains("/run/containerd/s/"))
    };
    before.expect_none_since_but(&containerd, excused)?;
    ensure!(fs::read_to_string(folder.path().join("kept"))? == "kept", "a file of the host is gone");
    containerd.run(&[], &containerd.id("again"), &["true"]).ok()?;
    Ok(())
}

#[test]
fn nothing_is_left_after_the_shim_was_killed() -> Result<()> {
    after_the_death_of(None)
}

#[test]
fn when_qemu_is_killed_the_container_has_exited_with_137_and_nothing_is_left() -> Result<()> {
    let name = "when_qemu_is_killed_the_container_has_exited_with_137_and_nothing_is_left";
    if !Runtime::under_test().is_husk_or_tell(name) {
        return Ok(());
    }
    after_the_death_of(Some("qemu"))
}

#[test]
fn when_virtiofsd_is_killed_the_container_has_exited_with_137_and_nothing_is_left() -> Result<()> {
    let name = "when_virtiofsd_is_killed_the_container_has_exited_with_137_and_nothing_is_left";
    if !Runtime::under_test().is_husk_or_tell(name) {
        return Ok(());
    }
    after_the_death_of(Some("virtiofsd"))
}

#[test]
fn nothing_is_left_when_the_shim_is_killed_while_the_vm_boots() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("nothing_is_left_when_the_shim_is_killed_while_the_vm_boots") {
        return Ok(());
    }
    let (containerd, before) = alone()?;
    let id = containerd.id("early");
    std::thread::scope(|scope| -> Result<()> {
        let run = scope.spawn(|| containerd.run(&[], &id, &["sleep", "1000"]).output());
        let booting = || {
            let all = process::descendants(containerd.pid());
            let qemu = all.iter().find(|process| process.name.starts_with("qemu"))?;
            all.iter().find(|process| process.pid == qemu.parent).cloned()
        };
        wait_for(Duration::from_secs(30), "QEMU has been started", booting)?.kill();
        let ran = run.join().map_err(|_| anyhow::anyhow!("the run panicked"))??;
        ensure!(ran.code() != 0, "{ran}");
        Ok(())
    })?;
    // `--rm` may or may not have come to it.
    let _ = containerd.ctr(["container", "rm", &id]).output()?;
    before.expect_none_since(&containerd)
}

#[test]
fn everything_goes_with_the_test_that_made_it() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "abandoned", &["sleep", "1000"])?;
    let all = process::descendants(containerd.pid());
    ensure!(all.len() > 2, "{all:#?}");
    // As if the test had panicked before it could clean up by itself.
    std::mem::forget(container);
    drop(containerd);
    let gone = || all.iter().all(|process| !process.is_alive()).then_some(());
    wait_for(Duration::from_secs(10), "all processes are gone", gone)
}
