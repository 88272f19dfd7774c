//! The life of a VM as its operator sees it: each state with its cause, in the state on disk, in the log and in `husk`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Container, Containerd, NAMESPACE};
use husk_tests::operator::{husk_json, listed};
use nix::sys::signal::Signal;
use serde_json::Value;

/// For what follows a death, or is on its way to the log.
const SOON: Duration = Duration::from_secs(20);

fn is_husk(test: &str) -> bool {
    Runtime::under_test().is_husk_or_tell(test)
}

/// What the state on disk says of the VM.
fn vm(containerd: &Containerd, id: &str) -> Result<Value> {
    let path = containerd.path("/run/husk").join(NAMESPACE).join(id).join("state.json");
    let mut state: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    Ok(state["vm"].take())
}

/// The states that it went through, and the cause of the last transition.
fn path(vm: &Value) -> Result<(Vec<&str>, &str)> {
    let transitions = vm["transitions"].as_array().context("transitions")?;
    let mut states = Vec::new();
    for transition in transitions {
        let (from, to) = (transition["from"].as_str().context("from")?, transition["to"].as_str().context("to")?);
        ensure!(states.is_empty() || states.last() == Some(&from), "{vm:#}");
        if states.is_empty() {
            states.push(from);
        }
        states.push(to);
    }
    ensure!(vm["state"].as_str() == states.last().copied(), "{vm:#}");
    let cause = transitions.last().and_then(|last| last["cause"].as_str()).context("a cause")?;
    Ok((states, cause))
}

/// The lines of the log that tell of transitions of this sandbox, as soon as the last one is to this state.
fn logged(containerd: &Containerd, id: &str, last: &str) -> Result<Vec<String>> {
    let last = format!(" to={last} ");
    wait_for(SOON, &format!("{id} is logged as{last}"), || {
        let mut lines = containerd.logged("the VM's state");
        lines.retain(|line| line.contains(&format!("sandbox={id} ")));
        lines.last().is_some_and(|line| line.contains(&last)).then_some(lines)
    })
    .with_context(|| containerd.log_tail())
}

const UP: [&str; 5] = ["Pending", "Provisioning", "Configured", "Starting", "Running"];

#[test]
fn a_vms_states_are_on_disk_while_it_runs_and_in_the_log_when_it_is_gone() -> Result<()> {
    if !is_husk("a_vms_states_are_on_disk_while_it_runs_and_in_the_log_when_it_is_gone") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_millis() as u64);
    let before = now()?;
    let container = containerd.detached(&[], "lives", &["sleep", "1000"])?;
    let vm = vm(containerd, container.id())?;
    ensure!(path(&vm)?.0 == UP, "{vm:#}");
    let times: Option<Vec<u64>> =
        vm["transitions"].as_array().context("transitions")?.iter().map(|t| t["at_ms"].as_u64()).collect();
    let times = times.context("at_ms")?;
    ensure!(times.is_sorted() && times[0] >= before && times[times.len() - 1] <= now()?, "{times:?}");

    container.kill("SIGKILL")?;
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 137);
    let lines = logged(containerd, container.id(), "Stopped")?;
    let mut states = UP.to_vec();
    states.extend(["Stopping", "Stopped"]);
    ensure!(lines.len() == states.len() - 1, "{lines:#?}");
    for (line, states) in lines.iter().zip(states.windows(2)) {
        let told = format!(" from={} to={} cause=", states[0], states[1]);
        ensure!(line.contains("level=info") && line.contains(&told), "no{told}in {line}");
    }
    Ok(())
}

/// Kills a process below the shim, chosen by its name and whether the shim has started it itself; the cause of the VM's failure.
fn cause_of_death(containerd: &Containerd, container: &Container, name: &str, started: bool) -> Result<String> {
    let (shim, below) = containerd.shim_of(container.id())?;
    let chosen = below.iter().find(|process| process.name.starts_with(name) && (process.parent == shim.pid) == started);
    chosen.with_context(|| format!("no {name}: {below:#?}"))?.kill();
    let failed = || match vm(containerd, container.id()) {
        Ok(vm) if vm["state"] == "Failed" => Some(vm),
        _ => None,
    };
    let vm = wait_for(SOON, "the VM has failed", failed).with_context(|| containerd.log_tail())?;
    let (states, cause) = path(&vm)?;
    ensure!(states[..UP.len()] == UP && states[UP.len()..] == ["Failed"], "{vm:#}");
    let lines = logged(containerd, container.id(), "Failed")?;
    ensure!(lines.last().is_some_and(|line| line.contains(&format!("cause={cause:?}"))), "{cause}: {lines:#?}");
    Ok(cause.to_owned())
}

#[test]
fn a_vm_whose_qemu_was_killed_has_failed_of_that() -> Result<()> {
    if !is_husk("a_vm_whose_qemu_was_killed_has_failed_of_that") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "qemu", &["sleep", "1000"])?;
    let cause = cause_of_death(containerd, &container, "qemu", true)?;
    ensure!(cause == "QEMU was killed by signal 9", "{cause}");
    // It stays what it was when the sandbox is removed.
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 137);
    let gone = || vm(containerd, container.id()).is_err().then_some(());
    wait_for(SOON, "the sandbox is removed", gone)?;
    logged(containerd, container.id(), "Failed").map(drop)
}

#[test]
fn a_vm_whose_virtiofsd_was_killed_has_failed_of_that() -> Result<()> {
    if !is_husk("a_vm_whose_virtiofsd_was_killed_has_failed_of_that") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    // The one that the shim has started, and the one that serves, whose end the first tells as its own (-9).
    let table =
        [("started", true, "virtiofsd was killed by signal 9"), ("serves", false, "virtiofsd exited with status 247")];
    for (name, started, wanted) in table {
        let container = containerd.detached(&[], name, &["sleep", "1000"])?;
        let cause = cause_of_death(containerd, &container, "virtiofsd", started)?;
        ensure!(cause == wanted, "{name}: {cause}");
    }
    Ok(())
}

#[test]
fn a_vm_that_no_container_came_to_need_is_stopped() -> Result<()> {
    if !is_husk("a_vm_that_no_container_came_to_need_is_stopped") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let id = containerd.id("refused");
    let ran = containerd.run(&["--annotation", "io.husk.vcpus=many"], &id, &["true"]).output()?;
    ensure!(ran.code() != 0, "{ran}");
    let lines = logged(containerd, &id, "Stopped")?;
    ensure!(lines.len() == 1 && lines[0].contains(" from=Pending to=Stopped "), "{lines:#?}");
    Ok(())
}

#[test]
fn a_boot_that_fails_is_a_start_that_failed() -> Result<()> {
    if !is_husk("a_boot_that_fails_is_a_start_that_failed") {
        return Ok(());
    }
    let table = [
        ("kernel = \"/etc/passwd\"", "Starting", "QEMU exited with status 1"),
        ("qemu = \"/etc/passwd\"", "Configured", "start /etc/passwd"),
    ];
    for (config, from, cause) in table {
        let configured = Configured::start(config)?;
        let containerd = &configured.containerd;
        let id = containerd.id("none");
        let ran = containerd.run(&[], &id, &["true"]).output()?;
        ensure!(ran.code() != 0, "{ran}");
        let lines = logged(containerd, &id, "StartFailed")?;
        let last = lines.last().context("a line")?;
        ensure!(last.contains(&format!(" from={from} to=StartFailed cause=")) && last.contains(cause), "{lines:#?}");
    }
    Ok(())
}

#[test]
fn husk_tells_what_a_vm_is_doing_and_why_it_ended_also_without_containerd() -> Result<()> {
    if !is_husk("husk_tells_what_a_vm_is_doing_and_why_it_ended_also_without_containerd") {
        return Ok(());
    }
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "seen", &["sleep", "1000"])?;
    let (shim, below) = containerd.shim_of(container.id())?;
    let qemu = below.iter().find(|process| process.name.starts_with("qemu")).context("no QEMU")?;
    containerd.end(Signal::SIGKILL)?;

    let columns = listed(&containerd, container.id())?;
    let seen = ["NAMESPACE", "STATE"].map(|title| columns.get(title).map(String::as_str));
    ensure!(seen == [Some(NAMESPACE), Some("Running")], "{columns:?}");
    let status = || husk_json(&containerd, &["status", "--json", container.id()]);
    let vm = &status()?;
    ensure!(path(vm)?.0 == UP, "{vm:#}");
    let kept = self::vm(&containerd, container.id())?["transitions"][0]["at_ms"].as_u64().context("at_ms")?;
    let seconds = containerd.sh(&format!("date -u -d @{} +%FT%T", kept / 1000))?.text();
    ensure!(vm["transitions"][0]["at"] == format!("{seconds}.{:03}Z", kept % 1000), "{kept} {vm:#}");

    qemu.kill();
    wait_for(SOON, "the VM has failed", || {
        status().map(|status| (status["state"] == "Failed").then_some(())).transpose()
    })??;
    let vm = &status()?;
    ensure!(path(vm)?.1 == "QEMU was killed by signal 9", "{vm:#}");
    ensure!(listed(&containerd, container.id())?["STATE"] == "Failed" && shim.is_alive());
    containerd.start_again()
}
