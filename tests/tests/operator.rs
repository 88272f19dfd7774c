//! `husk` and the sockets that it uses: what they show of a running VM, of a dead one, without containerd, and after
//! the shim's death. (`console.rs` tests the console, `ctl.rs` the socket itself.)

use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};
use husk_tests::artifacts::Version;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Container, Containerd, NAMESPACE};
use husk_tests::operator::{Follower, SOON, folder, husk, husk_json, listed};
use husk_tests::process::Process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Makes the guest's kernel print to the console, and its init write log lines.
const VERBOSE: &str = "log_level = \"debug\"\nkernel_params = [\"loglevel=7\"]\n";

/// The verbose containerd shared by most tests here.
fn verbose() -> Result<&'static Containerd> {
    static SHARED: OnceLock<Result<Configured, String>> = OnceLock::new();
    let shared = SHARED.get_or_init(|| Configured::start(VERBOSE).map_err(|error| format!("{error:?}")));
    shared.as_ref().map(|configured| &configured.containerd).map_err(|error| anyhow!("{error}"))
}

/// The PID of a machine's process as `husk` and the shim see it: the last but one, because it is process 1 of a namespace
/// of its own.
fn pid_inside(process: &Process) -> Result<u64> {
    Ok(process.status("NSpid")?.rsplit(' ').nth(1).context("a pid")?.parse()?)
}

fn status(containerd: &Containerd, id: &str) -> Result<Value> {
    husk_json(containerd, &["status", "--json", id])
}

/// Waits until the VM is in state Failed, and returns its status.
fn failed(containerd: &Containerd, id: &str) -> Result<Value> {
    let failed = || match status(containerd, id) {
        Ok(status) if status["state"] == "Failed" => Some(status),
        _ => None,
    };
    wait_for(SOON, "the VM is in state Failed", failed).with_context(|| containerd.log_tail())
}

/// Checks every command for a running VM, with or without containerd.
fn expect_running_vm(containerd: &Containerd, container: &Container<'_>) -> Result<()> {
    let id = container.id();
    let pid = pid_inside(&containerd.qemu_of(id)?)?.to_string();
    let columns = listed(containerd, id)?;
    let expected = [("NAMESPACE", NAMESPACE), ("STATE", "Running"), ("PID", &pid), ("CID", "3"), ("CONTAINERS", id)];
    for (title, expected) in expected {
        ensure!(columns.get(title).map(String::as_str) == Some(expected), "{title}: {columns:?}");
    }
    let status = status(containerd, id)?;
    let machine = &status["machine"];
    ensure!(machine["vcpus"].as_u64() == columns["VCPU"].parse().ok(), "{columns:?} {machine}");
    ensure!(columns["MEMORY"] == format!("{} MiB", machine["memory_mib"]), "{columns:?} {machine}");
    ensure!(columns["AGE"].ends_with('s'), "{columns:?}");
    let all = husk_json(containerd, &["list", "--json"])?;
    let own = all.as_array().and_then(|all| all.iter().find(|sandbox| sandbox["sandbox"] == id));
    ensure!(own.is_some_and(|own| own["state"] == "Running" && own["source"]["from"] == "shim"), "{all:#}");

    ensure!(status["source"]["from"] == "shim" && status["shim"]["alive"] == true, "{status:#}");
    ensure!(status["health"]["alive"] == true && status["health"]["missed"] == 0, "{status:#}");
    ensure!(status["health"]["heartbeat_interval_ms"] == 10_000, "{status:#}");
    ensure!(status["transitions"].as_array().is_some_and(|all| all.len() == 4), "{status:#}");
    ensure!(machine["init"] == env!("CARGO_PKG_VERSION") && machine["alive"] == true, "{status:#}");
    let processes = &status["containers"][0]["processes"];
    ensure!(processes[0]["pid"].as_u64().is_some_and(|pid| pid > 1), "{status:#}");
    ensure!(processes[0]["exit_status"].is_null(), "{status:#}");
    let page = husk(containerd, &["status", id])?.ok()?.text();
    let kernel = machine["kernel"].as_str().context("kernel")?;
    let expected_lines = [
        format!("sandbox     {id} in namespace {NAMESPACE}"),
        "state       Running, for ".to_owned(),
        format!("QEMU, pid {pid}, alive; "),
        format!("kernel      {kernel} from "),
        "health      good: last heartbeat ".to_owned(),
        "supervisor  none".to_owned(),
        "Starting -> Running".to_owned(),
        "kernel, up to PID 1".to_owned(),
    ];
    for expected in expected_lines {
        ensure!(page.contains(&expected), "no {expected:?} in\n{page}");
    }

    let events = husk(containerd, &["events", id])?.ok()?.text();
    for expected in ["from=Starting to=Running", &format!("/tasks/start container={id} pid=")] {
        ensure!(events.contains(expected), "no {expected:?} in\n{events}");
    }
    let events = husk(containerd, &["events", "--json", id])?.ok()?.text();
    let numbers: Vec<u64> = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line)?["number"].as_u64().context("a number"))
        .collect::<Result<_>>()?;
    ensure!(numbers.iter().copied().eq(1..=numbers.len() as u64), "{events}");

    let logs = husk(containerd, &["logs", id])?.ok()?.text();
    let count = |source: &str| logs.lines().filter(|line| line.starts_with(&format!("{source:<7} | "))).count();
    let (console, init) = (count("console"), count("init"));
    ensure!(console > 10 && init > 0 && console + init == logs.lines().count(), "{logs}");
    let some = husk(containerd, &["logs", "--lines", "2", id])?.ok()?.text();
    ensure!(some.lines().count() == 2 + init.min(2), "{some}");
    let one = husk(containerd, &["logs", "--source", "console", "--lines", "1", id])?.ok()?.text();
    ensure!(logs.contains(&format!("console | {one}\n")), "{one:?} in\n{logs}");
    let lines = husk(containerd, &["logs", "--json", "--lines", "1", id])?.ok()?.text();
    let first: Value = serde_json::from_str(lines.lines().next().context("a line")?)?;
    ensure!(first == json!({"source": "console", "line": one}), "{lines}");

    let endpoint = husk_json(containerd, &["console", "--json", id])?;
    ensure!(endpoint["machine"] == "up" && endpoint["path"] == format!("/run/husk/{NAMESPACE}/{id}/console.sock"));
    let profile = husk(containerd, &["boot-profile", id])?.ok()?.text();
    ensure!(profile.contains("kernel, up to PID 1") && profile.matches("|").count() > 10, "{profile}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn every_command_shows_a_running_vm_with_and_without_containerd() -> Result<()> {
    let configured = Configured::start(VERBOSE)?;
    let containerd = &configured.containerd;
    let nothing = husk(containerd, &["list"])?.ok()?.text();
    ensure!(nothing == "SANDBOX  NAMESPACE  STATE  PID  CID  VCPU  MEMORY  AGE  CONTAINERS", "{nothing}");
    ensure!(husk_json(containerd, &["list", "--json"])? == json!([]));
    let container = containerd.detached(&[], "shown", &["sleep", "1000"])?;
    expect_running_vm(containerd, &container).context("with containerd")?;
    containerd.stop(Signal::SIGKILL)?;
    expect_running_vm(containerd, &container).context("without containerd")?;
    containerd.restart()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_dead_vm_is_shown_with_the_cause() -> Result<()> {
    let containerd = verbose()?;
    let container = containerd.detached(&[], "dead", &["sleep", "1000"])?;
    let id = container.id();
    let follower = Follower::start(containerd, &["events", "-f", id])?;
    follower.expect("to=Running")?;
    containerd.qemu_of(id)?.kill();
    let cause = "QEMU was killed by signal 9";
    follower.expect(&format!("cause=\"{cause}\" from=Running to=Failed"))?;

    let status = failed(containerd, id)?;
    ensure!(status["health"]["alive"] == false && status["health"]["cause_of_death"] == cause, "{status:#}");
    ensure!(status["machine"]["alive"] == false && status["shim"]["alive"] == true, "{status:#}");
    let exited = |status: &Value| status["containers"][0]["processes"][0]["exit_status"] == 137;
    wait_for(SOON, "the process has exited", || self::status(containerd, id).ok().filter(exited))?;
    ensure!(listed(containerd, id)?["STATE"] == "Failed");
    let page = husk(containerd, &["status", id])?.ok()?.text();
    for expected in [&format!(": {cause}"), &format!("health      dead: {cause}"), "Running -> Failed"] {
        ensure!(page.contains(expected), "no {expected:?} in\n{page}");
    }
    ensure!(husk(containerd, &["logs", id])?.ok()?.text().contains("console | "));
    let exit = format!("/tasks/exit container={id} exit_status=137 pid=");
    let published = || husk(containerd, &["events", id]).ok().filter(|events| events.text().contains(&exit));
    let events = wait_for(SOON, "the exit is published", published)?.ok()?.text();
    ensure!(events.contains("to=Failed"), "{events}");
    ensure!(husk(containerd, &["boot-profile", id])?.ok()?.text().contains("kernel, up to PID 1"));
    let console = husk(containerd, &["console", id])?.ok()?;
    let expected = format!("husk: the console has ended: the VM is Failed ({cause})");
    ensure!(console.errors().contains(&expected) && !console.text().is_empty(), "{console}");
    // A follower is notified of the sandbox's removal, and exits.
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 137);
    follower.expect("everything has been removed")?;
    let (code, errors) = follower.finish()?;
    ensure!(code == Some(0) && errors.ends_with("husk: the sandbox has ended"), "{code:?} {errors}");
    let gone = husk(containerd, &["status", id])?.expect_code(1)?;
    ensure!(gone.errors() == format!("husk: no sandbox {id:?}; `husk list` shows all sandboxes\n"), "{gone}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_failed_boot_is_shown_with_its_progress() -> Result<()> {
    // The stopped guest does not respond before the timeout, so husk can inspect a booting sandbox.
    let configured = Configured::start("boot_timeout_ms = 4000\nkernel_params = [\"loglevel=7\"]\n")?;
    let containerd = &configured.containerd;
    let id = containerd.id("stuck");
    std::thread::scope(|scope| -> Result<()> {
        let run = scope.spawn(|| containerd.run(&[], &id, &["true"]).output());
        let booting = || containerd.qemu_of(&id).ok();
        wait_for(SOON, "QEMU starts", booting)?.stop();
        let status = wait_for(SOON, "the state Starting is recorded", || {
            status(containerd, &id).ok().filter(|status| status["state"] == "Starting")
        })?;
        ensure!(status["machine"]["alive"] == true && status["machine"]["kernel"].is_null(), "{status:#}");
        ensure!(status["health"].is_null() && status["containers"][0]["creating"] == true, "{status:#}");
        let profile = husk(containerd, &["boot-profile", &id])?.expect_code(1)?;
        ensure!(profile.errors().contains("no boot of "), "{profile}");
        let follower = Follower::start(containerd, &["events", "-f", &id])?;
        follower.expect("to=StartFailed")?;
        let ran = run.join().map_err(|_| anyhow!("the run panicked"))??;
        ensure!(ran.code() != 0 && ran.errors().contains("the VM was not ready after 4000 ms"), "{ran}");
        Ok(())
    })
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_dead_shims_last_state_is_shown_and_marked_as_such() -> Result<()> {
    let configured = Configured::start(VERBOSE)?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "orphan", &["sleep", "1000"])?;
    let id = container.id();
    // A running containerd would clean up at once.
    containerd.stop(Signal::SIGKILL)?;
    let followers =
        [Follower::start(containerd, &["events", "-f", id])?, Follower::start(containerd, &["logs", "-f", id])?];
    followers[0].expect("to=Running")?;
    followers[1].expect("console | ")?;
    let (shim, below) = containerd.shim_of(id)?;
    shim.kill();
    let all_dead = || (!shim.is_alive() && below.iter().all(|process| !process.is_alive())).then_some(());
    wait_for(SOON, "the VM dies with the shim", all_dead)?;
    for follower in followers {
        let (code, errors) = follower.finish()?;
        ensure!(code == Some(0) && errors == "husk: the sandbox's shim has ended", "{code:?} {errors}");
    }

    let list = husk(containerd, &["list"])?.ok()?;
    ensure!(list.text().contains("  Running*  "), "{list}");
    let note = "its shim is dead; showing its last state on disk";
    ensure!(list.errors() == format!("husk: * {id}: {note}\n"), "{list}");
    // QEMU's threads may live a moment longer than its first thread, and /proc shows only that one as a process.
    let page = wait_for(SOON, "QEMU is dead with all its threads", || {
        let page = || Ok::<_, anyhow::Error>(husk(containerd, &["status", id])?.ok()?.text());
        page().map(|page| (!page.contains(", alive;")).then_some(page)).transpose()
    })??;
    let note = "NOTE        its shim is dead; showing its last state on disk, which may be out of date";
    for expected in [note, "health      not known", "Starting -> Running", "kernel, up to PID 1"] {
        ensure!(page.contains(expected), "no {expected:?} in\n{page}");
    }
    ensure!(page.lines().any(|line| line.starts_with("shim        pid ") && line.ends_with(", dead")), "{page}");
    ensure!(page.lines().any(|line| line.starts_with("machine     QEMU, pid ") && line.contains(", dead;")), "{page}");
    let status = status(containerd, id)?;
    ensure!(status["source"] == json!({"from": "disk", "because": "its shim is dead"}), "{status:#}");
    let logs = husk(containerd, &["logs", "--lines", "3", id])?.ok()?;
    ensure!(logs.errors() == "husk: its shim is dead; showing the files on disk\n", "{logs}");
    ensure!(logs.text().lines().filter(|line| line.starts_with("console | ")).count() == 3, "{logs}");
    let events = husk(containerd, &["events", "-f", id])?.ok()?;
    ensure!(events.text().contains("from=Starting to=Running"), "{events}");
    ensure!(events.errors().contains("its shim is dead"), "{events}");
    let profile = husk(containerd, &["boot-profile", id])?.ok()?.text();
    ensure!(profile.contains("kernel, up to PID 1"), "{profile}");
    let console = husk(containerd, &["console", id])?.expect_code(1)?;
    let expected =
        format!("husk: the shim of {id:?} is dead and serves no console; `husk logs {id}` shows the console's output");
    ensure!(console.errors().trim_end() == expected, "{console}");
    // containerd notices the dead shim and cleans up, so nothing remains to be shown.
    containerd.restart()?;
    wait_for(SOON, "the sandbox is removed", || (!folder(containerd, id).exists()).then_some(()))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn husk_does_not_wait_for_a_hanging_shim() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "frozen", &["sleep", "1000"])?;
    let (shim, _) = containerd.shim_of(container.id())?;
    shim.stop();
    let list = husk(&containerd, &["list"]);
    let page = husk(&containerd, &["status", container.id()]);
    shim.resume();
    let (list, page) = (list?.ok()?, page?.ok()?);
    ensure!(list.text().contains("Running*") && list.errors().contains("does not answer in time"), "{list}");
    ensure!(page.text().contains("NOTE        its shim does not answer in time"), "{page}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn ids_can_be_shortened_to_a_unique_prefix() -> Result<()> {
    let containerd = verbose()?;
    let (one, other) = std::thread::scope(|scope| -> Result<_> {
        let other = scope.spawn(|| containerd.detached(&[], "prefix-b", &["sleep", "1000"]));
        let one = containerd.detached(&[], "prefix-a", &["sleep", "1000"])?;
        Ok((one, other.join().map_err(|_| anyhow!("a run panicked"))??))
    })?;
    for (prefix, container) in [("prefix-a", &one), ("prefix-b", &other)] {
        ensure!(status(containerd, prefix)?["sandbox"] == container.id());
        ensure!(status(containerd, &format!("{NAMESPACE}/{prefix}"))?["sandbox"] == container.id());
    }
    let ambiguous = husk(containerd, &["status", "prefix-"])?.expect_code(1)?;
    let expected = format!(
        "husk: \"prefix-\" matches {NAMESPACE}/{}, {NAMESPACE}/{}: use a longer prefix or NAMESPACE/ID\n",
        one.id(),
        other.id()
    );
    ensure!(ambiguous.errors() == expected, "{ambiguous}");
    for command in ["logs", "events", "console", "boot-profile", "status"] {
        let none = husk(containerd, &[command, "no-such-id"])?.expect_code(1)?;
        ensure!(none.errors().contains("no sandbox \"no-such-id\"; `husk list` shows"), "{none}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_steps_of_a_boot_profile_add_up() -> Result<()> {
    let containerd = verbose()?;
    let container = containerd.detached(&[], "profile", &["sleep", "1000"])?;
    let profile = husk_json(containerd, &["boot-profile", "--json", container.id()])?;
    let total = profile["total_us"].as_u64().context("total")?;
    let steps = profile["steps"].as_array().context("steps")?;
    let names: Vec<_> = steps.iter().map(|step| step["milestone"].as_str().unwrap_or_default()).collect();
    for expected in [
        "configured",
        "QEMU started",
        "virtiofsd started",
        "kernel entered",
        "init",
        "ready",
        "hello received",
        "events subscribed",
    ] {
        ensure!(names.contains(&expected), "no {expected} in {names:?}");
    }
    for side in ["host", "guest"] {
        let mut before = None;
        for step in steps.iter().filter(|step| step["side"] == side) {
            let (start, end) = (step["start_us"].as_u64().context("start")?, step["end_us"].as_u64().context("end")?);
            ensure!(start <= end && end <= total && before.is_none_or(|before| before == start), "{profile:#}");
            before = Some(end);
        }
        // The host's steps after the hello are short; most of the time before it is the guest's.
        ensure!(before.is_some_and(|last| last * 10 > total * 5), "{profile:#}");
    }
    // The total equals the time between the transitions, measured with another clock.
    let transitions = status(containerd, container.id())?["transitions"].clone();
    let at = |index: usize| transitions[index]["at_ms"].as_u64().context("at_ms");
    let (began, running) = (at(0)?, at(3)?);
    ensure!((running - began).abs_diff(total / 1000) < 100, "{total} µs, {transitions:#}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn followers_see_events_and_log_lines_as_they_happen() -> Result<()> {
    let containerd = verbose()?;
    let container = containerd.detached(&["--privileged"], "follow", &["sleep", "1000"])?;
    let id = container.id();
    let events = Follower::start(containerd, &["events", "--follow", "--json", id])?;
    let logs = Follower::start(containerd, &["logs", "--follow", "--lines", "1", id])?;
    events.expect("\"to\":\"Running\"")?;
    logs.expect("console | ")?;
    // Output to the guest's serial port appears on the console.
    container.script("mknod /dev/serial c 4 64; printf 'said \\033[31m by a guest\\n' >/dev/serial")?;
    let added: Value = serde_json::from_str(&events.expect("/tasks/exec-added")?)?;
    ensure!(added["kind"] == "task" && added["fields"]["container"] == id, "{added}");
    events.expect("\"exit_status\":0")?;
    ensure!(logs.expect("said ")? == "console | said ^[[31m by a guest");
    container.kill_and_wait()?;
    ensure!(container.delete_task()? == 137);
    for follower in [events, logs] {
        let (code, errors) = follower.finish()?;
        ensure!(code == Some(0) && errors == "husk: the sandbox has ended", "{code:?} {errors}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_hanging_guest_is_reported_before_it_is_killed() -> Result<()> {
    // Long enough for a loaded machine to resume the guest in time.
    let configured = Configured::start("heartbeat_interval_ms = 4000\n")?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "still", &["sleep", "1000"])?;
    let follower = Follower::start(containerd, &["events", "-f", container.id()])?;
    let qemu = containerd.qemu_of(container.id())?;
    qemu.stop();
    let late = follower.expect("a heartbeat is late");
    let page = husk(containerd, &["status", container.id()]);
    qemu.resume();
    ensure!(late?.contains("health      a heartbeat is late heartbeat_interval_ms=4000 missed=1 "));
    let page = page?.ok()?.text();
    ensure!(page.contains("health      heartbeats are missing: last heartbeat "), "{page}");
    follower.expect("the heartbeats have resumed")?;
    ensure!(status(containerd, container.id())?["state"] == "Running");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn check_config_reports_all_problems_as_json() -> Result<()> {
    let containerd = verbose()?;
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), "accel = \"tcg\"\nvcpus = 0\nmemory_mib = 0\n")?;
    let path = file.path().to_str().context("a path")?;
    let wrong = husk(containerd, &["check-config", "--json", path])?.expect_code(1)?;
    let report: Value = serde_json::from_slice(&wrong.stdout)?;
    let problems = report["problems"].as_array().context("problems")?;
    ensure!(report["ok"] == false && report["file"] == path && problems.len() == 2, "{report:#}");
    for (problem, expected) in problems.iter().zip(["memory must be greater", "vCPU count must be greater"]) {
        ensure!(problem.as_str().is_some_and(|problem| problem.contains(expected)), "{report:#}");
    }
    std::fs::write(file.path(), "accel = \"tcg\"\nvcpus = 1\n")?;
    let right = husk_json(containerd, &["check-config", "--json", path])?;
    ensure!(right["ok"] == true && right["file"] == path && right["problems"] == json!([]), "{right:#}");
    let digest = &right["digests"]["kernel_sha256"];
    ensure!(digest["sha256"].as_str().is_some_and(|digest| digest.len() == 64), "{right:#}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn shell_completion_knows_husks_commands() -> Result<()> {
    let containerd = verbose()?;
    let script = husk(containerd, &["completion", "bash"])?.ok()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("husk");
    std::fs::write(&path, &script.stdout)?;
    let table = [
        ("husk st", "status"),
        ("husk boot", "boot-profile"),
        ("husk status --j", "--json"),
        ("husk logs --f", "--follow"),
    ];
    for (typed, expected) in table {
        let words: Vec<String> = typed.split(' ').map(|word| format!("'{word}'")).collect();
        let last = words.len() - 1;
        let complete = format!(
            "source {}; COMP_WORDS=({}); COMP_CWORD={last}; _husk husk {} {}; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            path.display(),
            words.join(" "),
            words[last],
            words[last - 1]
        );
        let mut bash = std::process::Command::new("bash");
        bash.args(["-c", &complete]);
        let completed = husk_tests::command::run(bash, None, SOON)?.ok()?.text();
        ensure!(completed == expected, "{typed}: {completed}");
    }
    for shell in ["zsh", "fish"] {
        ensure!(husk(containerd, &["completion", shell])?.ok()?.text().contains("boot-profile"), "{shell}");
    }
    // Every command has a description and its own help.
    let help = husk(containerd, &["--help"])?.ok()?.text();
    for command in ["list", "status", "logs", "events", "console", "boot-profile", "check-config", "completion"] {
        ensure!(help.lines().any(|line| line.trim_start().starts_with(&format!("{command}  "))), "{command}: {help}");
        let own = husk(containerd, &[command, "--help"])?.ok()?.text();
        ensure!(own.contains("Usage: husk"), "{own}");
    }
    Ok(())
}
