//! The host is clean after any end of a container, its shim or its VM.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::events::Watch;
use husk_tests::leftovers::Leftovers;
use husk_tests::process;

const SOON: Duration = Duration::from_secs(60);

/// A private containerd that has run one container: the first one creates directories of containerd that remain.
fn private_containerd() -> Result<(Containerd, Leftovers)> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(&containerd);
    Ok((containerd, before))
}

#[test]
fn the_first_container_leaves_nothing_behind() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let before = Leftovers::now(&containerd);
    containerd.run(&[], &containerd.id("very-first"), &["true"]).ok()?;
    // Created by containerd on first use, and the directory shared by all sandboxes of a namespace.
    let stays = ["/run/containerd", "/run/husk", "/run/husk/husk-test", "/run/netns", "cgroup"];
    let state = "/run/containerd/state/io.containerd.runtime.v2.task/husk-test";
    let stays = |line: &String| {
        let folders = ["fifo", "runc", "runc/husk-test", "s"].map(|name| format!("folder /run/containerd/{name}"));
        let known = folders.contains(line) || *line == format!("folder {state}");
        known || stays.iter().any(|name| *line == format!("folder {name}"))
    };
    wait_for(Duration::from_secs(60), "only known directories remain", || {
        let added = before.added(&Leftovers::now(&containerd));
        added.iter().all(stays).then_some(())
    })
    .with_context(|| format!("{:#?}", before.added(&Leftovers::now(&containerd))))
}

#[test]
fn a_run_leaves_nothing_behind() -> Result<()> {
    let (containerd, before) = private_containerd()?;
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
fn a_killed_and_deleted_container_leaves_nothing_behind() -> Result<()> {
    let (containerd, before) = private_containerd()?;
    let container = containerd.detached(&[], "killed", &["sh", "-c", "sleep 1000 & sleep 1000"])?;
    container.exec(&["sh", "-c", "exit 2"]).expect_code(2)?;
    let failed = container.exec(&["/no/such/command"]).output()?;
    ensure!(failed.code() != 0 && failed.errors().contains("/no/such/command"), "{failed}");
    container.kill_and_wait()?;
    ensure!(container.delete_task()? == 137);
    containerd.ctr(["container", "rm", container.id()]).ok()?;
    before.expect_none_since(&containerd)
}

#[test]
fn concurrent_containers_leave_nothing_behind() -> Result<()> {
    let (containerd, before) = private_containerd()?;
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

/// Kills a child of the shim whose name starts with `chosen` (`None`: the shim itself) while a container runs, and lets
/// containerd clean up.
fn expect_clean_host_after_killing(chosen: Option<&str>) -> Result<()> {
    let (containerd, before) = private_containerd()?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("kept"), "kept")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.path().display());
    let container = containerd.detached(&["--mount", &mount], "death", &["sleep", "1000"])?;
    let watch = Watch::start(&containerd)?;
    let victim = match chosen {
        None => containerd.shim_of(container.id())?.0,
        Some(name) => containerd.shim_child(container.id(), name)?,
    };
    victim.kill();
    let events = watch.collect(container.id(), SOON, |event| event.topic == "/tasks/exit")?;
    let exit = events.last().context("an event")?;
    ensure!(exit.fields["exit_status"] == 137, "{exit:?}");

    if chosen.is_some() {
        // The shim is alive, so the task exists until it is deleted.
        container.await_status("STOPPED")?;
        ensure!(container.delete_task()? == 137);
    } else {
        let gone = || container.status().map(|status| status.is_none().then_some(())).transpose();
        wait_for(Duration::from_secs(60), "containerd drops the task", gone)??;
    }
    containerd.ctr(["container", "rm", container.id()]).ok()?;
    drop(watch);
    // ctr owns the fifos and removes them with the task, which was gone too early here. And runc's shim leaves its
    // socket.
    let runc = containerd.runtime() == Runtime::Runc;
    let excused = |line: &str| {
        chosen.is_none() && (line.contains("/run/containerd/fifo/") || runc && line.contains("/run/containerd/s/"))
    };
    before.expect_none_since_but(&containerd, excused)?;
    ensure!(fs::read_to_string(folder.path().join("kept"))? == "kept", "a host file is gone");
    containerd.run(&[], &containerd.id("again"), &["true"]).ok()?;
    Ok(())
}

#[test]
fn a_killed_shim_leaves_nothing_behind() -> Result<()> {
    expect_clean_host_after_killing(None)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_killed_qemu_means_exit_status_137_and_leaves_nothing_behind() -> Result<()> {
    expect_clean_host_after_killing(Some("qemu"))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_killed_virtiofsd_means_exit_status_137_and_leaves_nothing_behind() -> Result<()> {
    expect_clean_host_after_killing(Some("virtiofsd"))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_shim_killed_while_the_vm_boots_leaves_nothing_behind() -> Result<()> {
    let (containerd, before) = private_containerd()?;
    let id = containerd.id("early");
    std::thread::scope(|scope| -> Result<()> {
        let run = scope.spawn(|| containerd.run(&[], &id, &["sleep", "1000"]).output());
        let booting = || {
            let all = process::descendants(containerd.pid());
            let qemu = all.iter().find(|process| process.name.starts_with("qemu"))?;
            all.iter().find(|process| process.pid == qemu.parent).cloned()
        };
        wait_for(Duration::from_secs(30), "QEMU starts", booting)?.kill();
        let ran = run.join().map_err(|_| anyhow::anyhow!("the run panicked"))??;
        ensure!(ran.code() != 0, "{ran}");
        Ok(())
    })?;
    // `--rm` may or may not have removed the container.
    let _ = containerd.ctr(["container", "rm", &id]).output()?;
    before.expect_none_since(&containerd)
}

#[test]
fn everything_ends_with_the_test_that_started_it() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "abandoned", &["sleep", "1000"])?;
    let all = process::descendants(containerd.pid());
    ensure!(all.len() > 2, "{all:#?}");
    // As if the test had panicked before its own cleanup.
    std::mem::forget(container);
    drop(containerd);
    let gone = || all.iter().all(|process| !process.is_alive()).then_some(());
    wait_for(Duration::from_secs(60), "all processes are gone", gone)
}
