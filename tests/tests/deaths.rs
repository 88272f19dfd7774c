//! How VMs die, and what is reported: every task exits with status 137, waiting clients return, the cause is recorded,
//! and everything can be removed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Version, built};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Container, Containerd, NAMESPACE};
use husk_tests::debug::{IN_DEBUG_MODE, panic_kernel, run_in_vm};
use husk_tests::events::Watch;
use husk_tests::leftovers::Leftovers;
use husk_tests::operator;
use husk_tests::vm::{self, InitramfsFile};

/// Deadline for the consequences of a death.
const SOON: Duration = Duration::from_secs(60);
/// Heartbeats frequent enough to detect their absence soon, and rare enough for a loaded machine.
const FAST_HEARTBEATS: &str = "heartbeat_interval_ms = 1000\n";

/// Checks what an operator sees of a failed VM with one command, and prints it.
fn expect_failure_in_status(containerd: &Containerd, id: &str, cause: &str) -> Result<()> {
    wait_for(SOON, "the VM is in state Failed", || {
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

/// The logged cause of the VM's failure.
fn cause(containerd: &Containerd, id: &str) -> Result<String> {
    let failed = || {
        let mut lines = containerd.logged("the VM's state").into_iter();
        lines.find(|line| line.contains(&format!("sandbox={id} ")) && line.contains(" to=Failed "))
    };
    let line = wait_for(SOON, "the VM's failure is logged", failed).with_context(|| containerd.log_tail())?;
    let (_, cause) = line.split_once("cause=\"").context(line.clone())?;
    Ok(cause.trim_end().trim_end_matches('"').to_owned())
}

/// Starts a container with an exec, lets `kill` kill their VM, and checks what a client sees. Returns the recorded
/// cause.
fn expect_death(
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
    let started = Instant::now();
    // The init's exit follows the exec's.
    let published = events
        .collect(container.id(), SOON, |event| event.topic == "/tasks/exit" && event.text("id") == container.id())?;
    eprintln!("{name}: the exits were published within {:?} of the kill", started.elapsed());
    let exits: Vec<_> = published.iter().filter(|event| event.topic == "/tasks/exit").collect();
    ensure!(exits.len() == 2 && exits.iter().all(|exit| exit.fields["exit_status"] == 137), "{published:#?}");
    let status = wait_for(SOON, "the client exits", || waiting.try_wait().transpose())??;
    ensure!(status.code() == Some(137), "{status}");
    let cause = cause(containerd, container.id())?;
    drop(events);
    // The shim is not responsible for fifos that a departed client leaves behind.
    before.expect_none_since_but(containerd, |line| line.contains(" /run/containerd/fifo/"))?;
    Ok(cause)
}

/// A program in place of one of husk's.
fn program(folder: &Path, script: &str) -> Result<PathBuf> {
    let program = folder.join("program");
    fs::write(&program, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_killed_qemu_is_reported_as_the_cause_with_what_it_has_said() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let program = program(folder.path(), "echo 'an assertion failed' >&2; exec qemu-system-x86_64 \"$@\"")?;
    let configured = Configured::start(&format!("qemu = {:?}\n", program.display().to_string()))?;
    let containerd = &configured.containerd;
    let cause = expect_death(containerd, "killed", &[], |container| {
        containerd.qemu_of(container.id())?.kill();
        Ok(())
    })?;
    ensure!(cause == "QEMU was killed by signal 9", "{cause}");
    let logged = containerd.await_logged("the VM died", 1)?;
    ensure!(logged[0].contains(" processes=\"an assertion failed\""), "{logged:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_virtiofsd_in_an_endless_loop_of_errors_is_reported_as_the_cause_and_ends() -> Result<()> {
    // A hostile guest can drive virtiofsd into such a loop, in which it does not notice QEMU's end.
    let folder = tempfile::tempdir()?;
    let begin = folder.path().join("begin");
    let endless = "while :; do echo '[ERROR virtiofsd] an error in a loop'; done";
    let script = format!(
        "(while [ ! -e {} ]; do sleep 0.1; done; {endless}) & exec {} \"$@\"",
        begin.display(),
        built("virtiofsd")?.display()
    );
    let program = program(folder.path(), &script)?;
    let configured = Configured::start(&format!("virtiofsd = {:?}\n", program.display().to_string()))?;
    let cause = expect_death(&configured.containerd, "loop", &[], |_| Ok(fs::write(&begin, "")?))?;
    ensure!(cause.starts_with("virtiofsd prints errors without end: "), "{cause}");
    ensure!(cause.ends_with("the last one: [ERROR virtiofsd] an error in a loop"), "{cause}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_kernel_panic_is_reported_as_the_cause() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let cause = expect_death(&containerd, "panicked", &IN_DEBUG_MODE, |container| {
        panic_kernel(&containerd, container.id())?.expect_code(125).map(drop)
    })?;
    let expected =
        "QEMU exited with status 0 after guest-reset; console: Kernel panic - not syncing: sysrq triggered crash";
    ensure!(cause == expected, "{cause}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_guest_out_of_memory_is_reported_as_the_cause() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    // Memory of tmpfs files is not freed by killing processes; the kernel panics when no process is left to kill.
    let eat = "echo 2 > /proc/sys/vm/panic_on_oom; mount -o remount,size=100% /dev/shm; dd if=/dev/zero of=/dev/shm/all bs=1M";
    let cause = expect_death(&containerd, "full", &IN_DEBUG_MODE, |container| {
        run_in_vm(&containerd, container.id(), &["sh", "-c", eat], None)?.expect_code(125).map(drop)
    })?;
    let expected = "QEMU exited with status 0 after guest-reset; console: Kernel panic - not syncing: Out of memory";
    ensure!(cause.starts_with(expected), "{cause}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn husk_status_shows_the_cause_of_a_vms_death() -> Result<()> {
    type Kill = fn(&Containerd, &str) -> Result<()>;
    let kill: Kill = |containerd, id| containerd.qemu_of(id).map(|qemu| qemu.kill());
    let stop: Kill = |containerd, id| containerd.qemu_of(id).map(|qemu| qemu.stop());
    let share: Kill = |containerd, id| containerd.shim_child(id, "virtiofsd").map(|virtiofsd| virtiofsd.kill());
    let panic: Kill = |containerd, id| panic_kernel(containerd, id)?.expect_code(125).map(drop);
    let configured = Configured::start(FAST_HEARTBEATS)?;
    let containerd = &configured.containerd;
    for (name, kill, cause, log_line) in [
        ("killed", kill, "QEMU was killed by signal 9", None),
        ("unshared", share, "virtiofsd was killed by signal 9", None),
        ("stopped", stop, "the guest has not sent a heartbeat for ", None),
        (
            "panicked",
            panic,
            "guest-reset; console: Kernel panic - not syncing: sysrq triggered crash",
            Some("Kernel panic"),
        ),
    ] {
        let container = containerd.detached(&IN_DEBUG_MODE, name, &["sleep", "1000"])?;
        kill(containerd, container.id())?;
        expect_failure_in_status(containerd, container.id(), cause)?;
        if let Some(log_line) = log_line {
            let logs = operator::husk(containerd, &["logs", container.id()])?.ok()?.text();
            ensure!(logs.contains(log_line), "{logs}");
        }
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_call_interrupted_by_the_vms_death_reports_the_cause() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "under", &["sleep", "1000"])?;
    let qemu = containerd.qemu_of(container.id())?;
    // A stopped QEMU keeps the call pending until it dies, unless the call comes later.
    qemu.stop();
    let called = std::thread::scope(|scope| {
        let call = scope.spawn(|| container.exec(&["true"]).output());
        wait_for(SOON, "the shim receives a call", || containerd.ctr(["task", "ls"]).ok().is_ok().then_some(()))?;
        qemu.kill();
        call.join().unwrap_or_else(|_| anyhow::bail!("the call panicked"))
    })?;
    ensure!(called.code() != 0 && called.errors().contains("the VM is gone: QEMU was killed by signal 9"), "{called}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_hanging_vm_is_killed_after_missed_heartbeats() -> Result<()> {
    let configured = Configured::start(FAST_HEARTBEATS)?;
    let containerd = &configured.containerd;
    let cause = expect_death(containerd, "stopped", &[], |container| {
        containerd.qemu_of(container.id())?.stop();
        Ok(())
    })?;
    ensure!(
        cause.starts_with("the guest has not sent a heartbeat for ") && cause.ends_with(" ms, due every 1000 ms"),
        "{cause}"
    );
    Ok(())
}

/// A program that takes the CPU time of a VM, until this is dropped.
struct Hog {
    program: std::process::Child,
    machine: String,
}

impl Hog {
    /// Confines a VM's machine to one CPU, of which a program in the VM's cgroup takes nearly everything: the machine's
    /// threads run only when nobody else wants to (SCHED_IDLE, sched(7)). All others, the VM's shim among them, have the
    /// CPU time that they always have.
    fn start(machine: i32) -> Result<Self> {
        let groups = fs::read_to_string(format!("/proc/{machine}/cgroup"))?;
        let find = |name: &str| groups.lines().find_map(|line| line.split_once(name).map(|(_, path)| path.to_owned()));
        // The hierarchy of the CPU controller: cgroup v1, or v2.
        let (root, group) = match find(":cpu,cpuacct:").or_else(|| find(":cpu:")) {
            Some(group) => ("/sys/fs/cgroup/cpu", group),
            None => ("/sys/fs/cgroup", find("0::").context(groups.clone())?),
        };
        let group = Path::new(root).join(group.trim_start_matches('/'));
        let script = format!("echo $$ > {}/cgroup.procs && while :; do :; done", group.display());
        let program = Command::new("taskset").args(["-c", "0", "sh", "-c", &script]).spawn();
        let hog = Self { program: program.context("start the hog")?, machine: machine.to_string() };
        hog.schedule("--idle", "0")?;
        Ok(hog)
    }

    /// Gives the machine's threads this policy and these CPUs.
    fn schedule(&self, policy: &str, cpus: &str) -> Result<()> {
        for command in [&["chrt", "--all-tasks", policy, "--pid", "0"][..], &["taskset", "-apc", cpus]] {
            let mut command =
                Command::new(command[0]).args(&command[1..]).arg(&self.machine).stdout(Stdio::null()).spawn()?;
            ensure!(command.wait()?.success(), "{policy} {cpus}: the machine's threads keep their schedule");
        }
        Ok(())
    }

    /// Gives the VM its share and its CPUs back.
    fn end(self) -> Result<()> {
        self.schedule("--other", "0-1023")
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_without_cpu_time_on_the_host_is_shown_as_starved_and_not_killed() -> Result<()> {
    let configured = Configured::start(FAST_HEARTBEATS)?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "starved", &["sh", "-c", "while :; do :; done"])?;
    let hog = Hog::start(containerd.qemu_of(container.id())?.pid)?;
    // A VM that hangs would be killed now.
    wait_for(SOON, "the VM is starved", || containerd.logged("the VM is starved").pop())
        .with_context(|| containerd.log_tail())?;
    // Now and then, a heartbeat gets through.
    let mut page = String::new();
    let shown = wait_for(SOON, "the status shows it", || {
        page = operator::husk(containerd, &["status", container.id()]).ok()?.text();
        page.contains("health      starved: the host gives the VM too little CPU time: last").then_some(())
    });
    hog.end()?;
    shown.with_context(|| page)?;
    let resumed = || {
        let events = operator::husk(containerd, &["events", container.id()]).ok()?.text();
        (events.contains("the VM is starved") && events.contains("the heartbeats have resumed")).then_some(())
    };
    wait_for(SOON, "the VM is no longer starved", resumed).with_context(|| containerd.log_tail())?;
    ensure!(container.script("echo alive")? == "alive", "{}", containerd.log_tail());
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_suspended_shim_does_not_kill_its_vm_when_it_resumes() -> Result<()> {
    let configured = Configured::start(FAST_HEARTBEATS)?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "patient", &["sleep", "1000"])?;
    let (shim, _) = containerd.shim_of(container.id())?;
    shim.stop();
    // Longer than the heartbeats that a VM may miss.
    std::thread::sleep(Duration::from_secs(6));
    shim.resume();
    ensure!(container.script("echo alive")? == "alive");
    // And still after the next heartbeat.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(container.script("echo alive")? == "alive", "{}", containerd.log_tail());
    ensure!(container.status()?.as_deref() == Some("RUNNING"));
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_failed_boot_is_explained_on_the_console_and_in_the_create_error() -> Result<()> {
    // A file in place of a mount point.
    let obstacle = InitramfsFile { path: "tmp".into(), content: b"x".to_vec(), link: false };
    let folder = tempfile::tempdir()?;
    let initrd = folder.path().join("initrd.img");
    std::fs::write(&initrd, vm::cpio(&std::fs::read(built("husk-init")?)?, &[obstacle]))?;
    let configured = Configured::start(&format!("initrd = {initrd:?}\n"))?;
    let containerd = &configured.containerd;
    let id = containerd.id("failed-boot");
    let before = Leftovers::now(containerd);
    let ran = containerd.run(&[], &id, &["true"]).output()?;
    ensure!(ran.code() != 0, "{ran}");
    let errors = ran.errors();
    for expected in [
        "the VM ended while it booted",
        "QEMU exited with status 0 after guest-reset; console: husk: fatal: create the mount point /tmp",
        "husk: fatal: create the mount point /tmp",
    ] {
        ensure!(errors.contains(expected), "no {expected:?} in {errors}");
    }
    // A new containerd creates directories on first use.
    before.expect_none_since_but(containerd, |line| line.starts_with("folder ") || line.starts_with("cgroup "))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_oom_killer_ends_only_the_process_that_eats_the_memory() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    let container = containerd.detached(&[], "frugal", &["sleep", "1000"])?;
    let events = Watch::start(&containerd)?;
    // tail keeps all its input, more than the guest's memory.
    let eaten = container.exec(&["sh", "-c", "exec tail /dev/zero"]).output()?;
    ensure!(eaten.code() == 137, "{eaten}");
    events.collect(container.id(), SOON, |event| event.topic == "/tasks/oom")?;
    ensure!(container.script("echo alive")? == "alive", "{}", containerd.log_tail());
    ensure!(container.status()?.as_deref() == Some("RUNNING"));
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_hosts_log_contains_all_lines_of_the_guests_init() -> Result<()> {
    // The init writes this line before vsock is available.
    let configured = Configured::start("log_level = \"info\"\n")?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "logged", &["sleep", "1000"])?;
    let expected = "the guest is set up";
    let line = wait_for(SOON, "the guest's line is in the log", || containerd.logged(expected).into_iter().next())
        .with_context(|| containerd.log_tail())?;
    for part in ["level=info", "from=guest", " guest.version=", &format!("sandbox={}", container.id())] {
        ensure!(line.contains(part), "no {part} in {line}");
    }
    let folder = containerd.path("/run/husk").join(NAMESPACE).join(container.id());
    let kept = std::fs::read_to_string(folder.join("guest.log"))?;
    ensure!(kept.lines().any(|line| line.contains(" info: ") && line.contains(expected)), "{kept}");
    let console = std::fs::read_to_string(folder.join("console.log"))?;
    ensure!(!console.contains(expected), "the line is on the console too: {console}");
    Ok(())
}
