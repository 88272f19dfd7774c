//! How VMs die, and what is told of it: every task ends with status 137, whoever waits is told, the cause is on record, and all can be removed.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, Version, built};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Container, Containerd, NAMESPACE};
use husk_tests::debug::{IN_DEBUG_MODE, panic_kernel, run_in_vm};
use husk_tests::events::Watch;
use husk_tests::leftovers::Leftovers;
use husk_tests::operator;
use husk_tests::process::Process;
use husk_tests::vm::{self, File};

/// For what follows a death.
const SOON: Duration = Duration::from_secs(30);
/// Heartbeats come often, so that their absence is noticed soon; and seldom enough for a machine under load.
const BEATS: &str = "heartbeat_interval_ms = 1000\n";

fn is_husk(test: &str) -> bool {
    Runtime::under_test().is_husk_or_tell(test)
}

/// What an operator does in a death: one command, and its output is kept with the test's.
fn seen(containerd: &Containerd, id: &str, cause: &str) -> Result<()> {
    wait_for(SOON, "the VM has failed", || {
        let listed = operator::listed(containerd, id).ok()?;
        (listed.get("STATE").map(String::as_str) == Some("Failed")).then_some(())
    })
    .with_context(|| containerd.log_tail())?;
    let status = operator::husk(containerd, &["status", id])?.ok()?.text();
    eprintln!("$ husk status {id}\n{status}\n");
    ensure!(status.contains(cause), "no {cause:?} in {status}");
    ensure!(status.contains("Running -> Failed"), "{status}");
    Ok(())
}

/// QEMU of the container's VM.
fn qemu(containerd: &Containerd, id: &str) -> Result<Process> {
    let (shim, below) = containerd.shim_of(id)?;
    let found = below.iter().find(|process| process.name.starts_with("qemu") && process.parent == shim.pid);
    found.cloned().with_context(|| format!("no QEMU: {below:#?}"))
}

/// The cause of the VM's failure, as it was logged.
fn cause(containerd: &Containerd, id: &str) -> Result<String> {
    let failed = || {
        let mut lines = containerd.logged("the VM's state").into_iter();
        lines.find(|line| line.contains(&format!("sandbox={id} ")) && line.contains(" to=Failed "))
    };
    let line = wait_for(SOON, "the VM's failure is logged", failed).with_context(|| containerd.log_tail())?;
    let (_, cause) = line.split_once("cause=\"").context(line.clone())?;
    Ok(cause.trim_end().trim_end_matches('"').to_owned())
}

/// What must hold of a container and its exec once `kill` has killed their VM; answers the cause that is on record.
fn dies(
    containerd: &Containerd,
    name: &str,
    flags: &[&str],
    kill: impl FnOnce(&Container<'_>) -> Result<()>,
) -> Result<String> {
    let first = containerd.id("first");
    containerd.run(&[], &first, &["true"]).ok()?;
    let before = Leftovers::now(containerd);
    // A client that waits for the container.
    let id = containerd.id(name);
    let mut waiting = containerd.run(flags, &id, &["sleep", "1000"]).command();
    let mut waiting = waiting.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let container = containerd.adopt(&id);
    container.await_status("RUNNING").with_context(|| containerd.log_tail())?;
    containerd.ctr(["task", "exec", "--detach", "--exec-id", "second", &id, "sleep", "2000"]).ok()?;
    let events = Watch::start(containerd)?;
    kill(&container)?;
    let killed = Instant::now();
    // The init's comes after that of its exec.
    let told = events
        .collect(container.id(), SOON, |event| event.topic == "/tasks/exit" && event.text("id") == container.id())?;
    eprintln!("{name}: the exits were told within {:?} of the kill", killed.elapsed());
    let exits: Vec<_> = told.iter().filter(|event| event.topic == "/tasks/exit").collect();
    ensure!(exits.len() == 2 && exits.iter().all(|exit| exit.fields["exit_status"] == 137), "{told:#?}");
    let status = wait_for(SOON, "the client has ended", || waiting.try_wait().transpose())??;
    ensure!(status.code() == Some(137), "{status}");
    let cause = cause(containerd, container.id())?;
    drop(events);
    // What a client leaves that has gone its way is not the shim's.
    before.expect_none_since_but(containerd, |line| line.contains(" /run/containerd/fifo/"))?;
    Ok(cause)
}

#[test]
fn a_vm_whose_qemu_is_killed_is_told_as_ended() -> Result<()> {
    if !is_husk("a_vm_whose_qemu_is_killed_is_told_as_ended") {
        return Ok(());
    }
    let containerd = Containerd::start(Version::default_for_tests())?;
    let cause = dies(&containerd, "killed", &[], |container| {
        qemu(&containerd, container.id())?.kill();
        Ok(())
    })?;
    ensure!(cause == "QEMU was killed by signal 9", "{cause}");
    Ok(())
}

#[test]
fn a_guest_whose_kernel_panics_is_told_as_ended() -> Result<()> {
    if !is_husk("a_guest_whose_kernel_panics_is_told_as_ended") {
        return Ok(());
    }
    let containerd = Containerd::start(Version::default_for_tests())?;
    let cause = dies(&containerd, "panicked", &IN_DEBUG_MODE, |container| {
        panic_kernel(&containerd, container.id())?.expect_code(125).map(drop)
    })?;
    let wanted = "QEMU exited with status 0 after guest-reset; its console says: Kernel panic - not syncing: sysrq triggered crash";
    ensure!(cause == wanted, "{cause}");
    Ok(())
}

#[test]
fn a_guest_that_is_out_of_memory_for_good_is_told_as_ended() -> Result<()> {
    if !is_husk("a_guest_that_is_out_of_memory_for_good_is_told_as_ended") {
        return Ok(());
    }
    let containerd = Containerd::start(Version::default_for_tests())?;
    // Files in memory, which no kill gives back; the kernel ends when there is nobody left whose death could help.
    let eat = "echo 2 > /proc/sys/vm/panic_on_oom; mount -o remount,size=100% /dev/shm; dd if=/dev/zero of=/dev/shm/all bs=1M";
    let cause = dies(&containerd, "full", &IN_DEBUG_MODE, |container| {
        run_in_vm(&containerd, container.id(), &["sh", "-c", eat], None)?.expect_code(125).map(drop)
    })?;
    let wanted =
        "QEMU exited with status 0 after guest-reset; its console says: Kernel panic - not syncing: Out of memory";
    ensure!(cause.starts_with(wanted), "{cause}");
    Ok(())
}

#[test]
fn one_command_tells_an_operator_what_a_vm_has_died_of() -> Result<()> {
    if !is_husk("one_command_tells_an_operator_what_a_vm_has_died_of") {
        return Ok(());
    }
    type Kill = fn(&Containerd, &str) -> Result<()>;
    let kill: Kill = |containerd, id| qemu(containerd, id).map(|qemu| qemu.kill());
    let stop: Kill = |containerd, id| qemu(containerd, id).map(|qemu| qemu.stop());
    let share: Kill = |containerd, id| {
        let (shim, below) = containerd.shim_of(id)?;
        let found = below.iter().find(|process| process.name.starts_with("virtiofsd") && process.parent == shim.pid);
        found.with_context(|| format!("{below:#?}")).map(Process::kill)
    };
    let panic: Kill = |containerd, id| panic_kernel(containerd, id)?.expect_code(125).map(drop);
    let configured = Configured::start(BEATS)?;
    let containerd = &configured.containerd;
    for (name, kill, cause, last_words) in [
        ("killed", kill, "QEMU was killed by signal 9", None),
        ("unshared", share, "virtiofsd was killed by signal 9", None),
        ("stopped", stop, "the guest has not sent a heartbeat for ", None),
        (
            "panicked",
            panic,
            "guest-reset; its console says: Kernel panic - not syncing: sysrq triggered crash",
            Some("Kernel panic"),
        ),
    ] {
        let container = containerd.detached(&IN_DEBUG_MODE, name, &["sleep", "1000"])?;
        kill(containerd, container.id())?;
        seen(containerd, container.id(), cause)?;
        if let Some(words) = last_words {
            let logs = operator::husk(containerd, &["logs", container.id()])?.ok()?.text();
            ensure!(logs.contains(words), "{logs}");
        }
    }
    Ok(())
}

#[test]
fn a_call_that_the_vm_dies_under_says_what_it_died_of() -> Result<()> {
    if !is_husk("a_call_that_the_vm_dies_under_says_what_it_died_of") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "under", &["sleep", "1000"])?;
    let qemu = qemu(containerd, container.id())?;
    // It answers no more, so that the call is under way when it dies, or comes after.
    qemu.stop();
    let called = std::thread::scope(|scope| {
        let call = scope.spawn(|| container.exec(&["true"]).output());
        wait_for(SOON, "the shim is asked", || containerd.ctr(["task", "ls"]).ok().is_ok().then_some(()))?;
        qemu.kill();
        call.join().unwrap_or_else(|_| anyhow::bail!("the call panicked"))
    })?;
    ensure!(called.code() != 0 && called.errors().contains("the VM is gone: QEMU was killed by signal 9"), "{called}");
    Ok(())
}

#[test]
fn a_vm_that_stands_still_is_killed_for_its_missing_heartbeats() -> Result<()> {
    if !is_husk("a_vm_that_stands_still_is_killed_for_its_missing_heartbeats") {
        return Ok(());
    }
    let configured = Configured::start(BEATS)?;
    let containerd = &configured.containerd;
    let cause = dies(containerd, "stopped", &[], |container| {
        qemu(containerd, container.id())?.stop();
        Ok(())
    })?;
    ensure!(
        cause.starts_with("the guest has not sent a heartbeat for ") && cause.ends_with(" ms, due every 1000 ms"),
        "{cause}"
    );
    Ok(())
}

#[test]
fn a_shim_that_stood_still_finds_its_vm_alive() -> Result<()> {
    if !is_husk("a_shim_that_stood_still_finds_its_vm_alive") {
        return Ok(());
    }
    let configured = Configured::start(BEATS)?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "patient", &["sleep", "1000"])?;
    let (shim, _) = containerd.shim_of(container.id())?;
    shim.stop();
    // What is tested: longer than the heartbeats that a VM may miss.
    std::thread::sleep(Duration::from_secs(6));
    shim.go_on();
    ensure!(container.script("echo alive")? == "alive");
    // A heartbeat later it is still so.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(container.script("echo alive")? == "alive", "{}", containerd.log_tail());
    ensure!(container.status()?.as_deref() == Some("RUNNING"));
    Ok(())
}

#[test]
fn an_init_that_fails_its_boot_says_why_and_the_create_too() -> Result<()> {
    if !is_husk("an_init_that_fails_its_boot_says_why_and_the_create_too") {
        return Ok(());
    }
    // A file stands where it wants to mount.
    let in_the_way = File { path: "tmp".into(), content: b"x".to_vec(), link: false };
    let folder = tempfile::tempdir()?;
    let initrd = folder.path().join("initrd.img");
    std::fs::write(&initrd, vm::cpio(&std::fs::read(built("husk-init")?)?, &[in_the_way]))?;
    let configured = Configured::start(&format!("initrd = {initrd:?}\n"))?;
    let containerd = &configured.containerd;
    let id = containerd.id("stillborn");
    let before = Leftovers::now(containerd);
    let ran = containerd.run(&[], &id, &["true"]).output()?;
    ensure!(ran.code() != 0, "{ran}");
    let errors = ran.errors();
    for wanted in [
        "the VM ended while it booted",
        "QEMU exited with status 0 after guest-reset; its console says: husk: fatal: create the mount point /tmp",
        "husk: fatal: create the mount point /tmp",
    ] {
        ensure!(errors.contains(wanted), "no {wanted:?} in {errors}");
    }
    // The first use of a containerd leaves folders of its own.
    before.expect_none_since_but(containerd, |line| line.starts_with("folder ") || line.starts_with("cgroup "))
}

#[test]
fn a_guest_whose_memory_is_eaten_loses_the_eater_and_nothing_else() -> Result<()> {
    if !is_husk("a_guest_whose_memory_is_eaten_loses_the_eater_and_nothing_else") {
        return Ok(());
    }
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "frugal", &["sleep", "1000"])?;
    let events = Watch::start(&containerd)?;
    // It holds all that comes, and more comes than the guest has.
    let eaten = container.exec(&["sh", "-c", "exec tail /dev/zero"]).output()?;
    ensure!(eaten.code() == 137, "{eaten}");
    events.collect(container.id(), SOON, |event| event.topic == "/tasks/oom")?;
    ensure!(container.script("echo alive")? == "alive", "{}", containerd.log_tail());
    ensure!(container.status()?.as_deref() == Some("RUNNING"));
    Ok(())
}

#[test]
fn what_the_guests_init_logs_is_in_the_hosts_log_from_its_first_line_on() -> Result<()> {
    if !is_husk("what_the_guests_init_logs_is_in_the_hosts_log_from_its_first_line_on") {
        return Ok(());
    }
    // This line comes before there is a vsock.
    let configured = Configured::start("log_level = \"info\"\n")?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "told", &["sleep", "1000"])?;
    let wanted = "the guest is set up";
    let line = wait_for(SOON, "the guest's line is in the log", || containerd.logged(wanted).into_iter().next())
        .with_context(|| containerd.log_tail())?;
    for part in ["level=info", "from=guest", " version=", &format!("sandbox={}", container.id())] {
        ensure!(line.contains(part), "no {part} in {line}");
    }
    let folder = containerd.path("/run/husk").join(NAMESPACE).join(container.id());
    let kept = std::fs::read_to_string(folder.join("guest.log"))?;
    ensure!(kept.lines().any(|line| line.contains(" info: ") && line.contains(wanted)), "{kept}");
    let console = std::fs::read_to_string(folder.join("console.log"))?;
    ensure!(!console.contains(wanted), "it is on the console too: {console}");
    Ok(())
}
