//! The life of a VM as its operator sees it: each state with its cause, in state.json, in the log and in `husk`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Version;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Container, Containerd, NAMESPACE};
use husk_tests::operator::{husk_json, listed};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Deadline for the consequences of a death, and for log lines.
const SOON: Duration = Duration::from_secs(60);

/// The VM's part of state.json.
fn vm(containerd: &Containerd, id: &str) -> Result<Value> {
    let path = containerd.path("/run/husk").join(NAMESPACE).join(id).join("state.json");
    let mut state: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    Ok(state["vm"].take())
}

/// The states that the VM went through, and the cause of the last transition.
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

/// The log lines about the sandbox's transitions, once the last one leads to the state `last`.
fn logged(containerd: &Containerd, id: &str, last: &str) -> Result<Vec<String>> {
    let last = format!(" to={last} ");
    wait_for(SOON, &format!("a transition of {id} is logged with{last}"), || {
        let mut lines = containerd.logged("the VM's state");
        lines.retain(|line| line.contains(&format!("sandbox={id} ")));
        lines.last().is_some_and(|line| line.contains(&last)).then_some(lines)
    })
    .with_context(|| containerd.log_tail())
}

const UP: [&str; 5] = ["Pending", "Provisioning", "Configured", "Starting", "Running"];

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vms_states_are_on_disk_while_it_runs_and_remain_in_the_log() -> Result<()> {
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

    container.kill_and_wait()?;
    ensure!(container.delete_task()? == 137);
    let lines = logged(containerd, container.id(), "Stopped")?;
    let mut states = UP.to_vec();
    states.extend(["Stopping", "Stopped"]);
    ensure!(lines.len() == states.len() - 1, "{lines:#?}");
    for (line, states) in lines.iter().zip(states.windows(2)) {
        let transition = format!(" from={} to={} cause=", states[0], states[1]);
        ensure!(line.contains("level=info") && line.contains(&transition), "no{transition}in {line}");
    }
    Ok(())
}

/// Kills a process below the shim, selected by its name and by whether the shim is its parent. Returns the cause of the
/// VM's failure.
fn cause_of_death(containerd: &Containerd, container: &Container, name: &str, started: bool) -> Result<String> {
    let (shim, below) = containerd.shim_of(container.id())?;
    let chosen = below.iter().find(|process| process.name.starts_with(name) && (process.parent == shim.pid) == started);
    chosen.with_context(|| format!("no {name}: {below:#?}"))?.kill();
    let failed = || match vm(containerd, container.id()) {
        Ok(vm) if vm["state"] == "Failed" => Some(vm),
        _ => None,
    };
    let vm = wait_for(SOON, "the VM is in state Failed", failed).with_context(|| containerd.log_tail())?;
    let (states, cause) = path(&vm)?;
    ensure!(states[..UP.len()] == UP && states[UP.len()..] == ["Failed"], "{vm:#}");
    let lines = logged(containerd, container.id(), "Failed")?;
    ensure!(lines.last().is_some_and(|line| line.contains(&format!("cause={cause:?}"))), "{cause}: {lines:#?}");
    Ok(cause.to_owned())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_killed_qemu_is_the_cause_of_the_vms_failure() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "qemu", &["sleep", "1000"])?;
    let cause = cause_of_death(containerd, &container, "qemu", true)?;
    ensure!(cause == "QEMU was killed by signal 9", "{cause}");
    // The removal of the sandbox does not change the state.
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 137);
    let gone = || vm(containerd, container.id()).is_err().then_some(());
    wait_for(SOON, "the sandbox is removed", gone)?;
    logged(containerd, container.id(), "Failed").map(drop)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_killed_virtiofsd_is_the_cause_of_the_vms_failure() -> Result<()> {
    let containerd = Containerd::shared()?;
    // The parent, which the shim has started, and its child, which serves. The parent exits with the child's status
    // (-9).
    let table =
        [("started", true, "virtiofsd was killed by signal 9"), ("serves", false, "virtiofsd exited with status 247")];
    for (name, started, expected) in table {
        let container = containerd.detached(&[], name, &["sleep", "1000"])?;
        let cause = cause_of_death(containerd, &container, "virtiofsd", started)?;
        ensure!(cause == expected, "{name}: {cause}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_without_a_container_is_stopped() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("refused");
    let ran = containerd.run(&["--annotation", "io.husk.vcpus=many"], &id, &["true"]).output()?;
    ensure!(ran.code() != 0, "{ran}");
    let lines = logged(containerd, &id, "Stopped")?;
    ensure!(lines.len() == 1 && lines[0].contains(" from=Pending to=Stopped "), "{lines:#?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_failed_boot_leads_to_start_failed() -> Result<()> {
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
#[cfg_attr(runc, ignore = "about VMs")]
fn husk_shows_a_vms_state_and_cause_of_failure_without_containerd() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "seen", &["sleep", "1000"])?;
    let (shim, _) = containerd.shim_of(container.id())?;
    let qemu = containerd.qemu_of(container.id())?;
    containerd.stop(Signal::SIGKILL)?;

    let columns = listed(&containerd, container.id())?;
    let shown = ["NAMESPACE", "STATE"].map(|title| columns.get(title).map(String::as_str));
    ensure!(shown == [Some(NAMESPACE), Some("Running")], "{columns:?}");
    let status = || husk_json(&containerd, &["status", "--json", container.id()]);
    let vm = &status()?;
    ensure!(path(vm)?.0 == UP, "{vm:#}");
    let recorded = self::vm(&containerd, container.id())?["transitions"][0]["at_ms"].as_u64().context("at_ms")?;
    let seconds = containerd.sh(&format!("date -u -d @{} +%FT%T", recorded / 1000))?.text();
    ensure!(vm["transitions"][0]["at"] == format!("{seconds}.{:03}Z", recorded % 1000), "{recorded} {vm:#}");

    qemu.kill();
    wait_for(SOON, "the VM is in state Failed", || {
        status().map(|status| (status["state"] == "Failed").then_some(())).transpose()
    })??;
    let vm = &status()?;
    ensure!(path(vm)?.1 == "QEMU was killed by signal 9", "{vm:#}");
    ensure!(listed(&containerd, container.id())?["STATE"] == "Failed" && shim.is_alive());
    containerd.restart()
}
