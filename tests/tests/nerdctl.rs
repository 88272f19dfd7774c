//! husk through nerdctl: containers are run, inspected, paused, updated, stopped, restarted and removed.
//!
//! nerdctl needs host hooks, `binary://` outputs and a stdin that can be closed once.

use std::time::Duration;

use anyhow::{Result, ensure};
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::nerdctl::Nerdctl;
use husk_tests::pty::Pty;

const DEADLINE: Duration = Duration::from_secs(60);

fn nerdctl() -> Result<Nerdctl<'static>> {
    Ok(Nerdctl::new(Containerd::shared()?, Nerdctl::program()?))
}

#[test]
fn nerdctl_run_supports_input_limits_and_exit_status() -> Result<()> {
    let nerdctl = nerdctl()?;
    let through = nerdctl.run(&nerdctl.run_args("none", &["--rm", "-i"], &["cat"]), Some("through stdin"))?.ok()?;
    ensure!(through.text() == "through stdin", "{through}");
    nerdctl.run(&nerdctl.run_args("none", &["--rm"], &["sh", "-c", "exit 7"]), None)?.expect_code(7)?;

    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("file"), "of the host")?;
    let volume = format!("{}:/volume", folder.path().display());
    let flags = ["--rm", "-m", "100m", "--cpus", "1.5", "--pids-limit", "50", "-e", "A=b", "-w", "/tmp", "-u", "1000"];
    let more = ["--hostname", "inside", "--read-only", "--tmpfs", "/scratch", "--cap-drop", "ALL", "-v", &volume];
    let script = "id -u; pwd; echo $A; hostname; cat /volume/file; echo; cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; \
        grep CapEff /proc/self/status; touch /scratch/a && ! touch /a 2>/dev/null && echo read-only";
    let output = nerdctl.ok(&nerdctl.run_args("none", &[&flags[..], &more[..]].concat(), &["sh", "-c", script]))?;
    let lines: Vec<&str> = output.lines().collect();
    let expected = ["1000", "/tmp", "b", "inside", "of the host", "104857600", "150000 100000", "50"];
    ensure!(lines.len() == 10 && lines[..8] == expected, "{output}");
    ensure!(lines[8].ends_with("0000000000000000") && lines[9] == "read-only", "{output}");

    let mut shell = Pty::spawn(nerdctl.command(&nerdctl.run_args("none", &["--rm", "-it"], &["sh"]))?, 24, 80)?;
    shell.send("tty; exit 3\r")?;
    let (shown, status) = shell.finish(DEADLINE)?;
    ensure!(status == 3 && shown.contains("/dev/pts/0"), "{status}: {shown}");
    Ok(())
}

#[test]
fn nerdctl_can_exec_pause_update_stop_restart_and_remove_a_container() -> Result<()> {
    let nerdctl = nerdctl()?;
    let id = nerdctl.containerd().id("nerdctl");
    let script = "echo out; echo err >&2; trap 'echo bye; exit 5' TERM; while :; do sleep 0.1; done";
    nerdctl.ok(&nerdctl.run_args("none", &["-d", "--name", &id], &["sh", "-c", script]))?;
    let logged = |expected: &[&str]| {
        wait_for(DEADLINE, "the output is in nerdctl's log", || {
            let logs = nerdctl.run(&["logs", &id], None).ok()?;
            let all = logs.text() + &logs.errors();
            expected.iter().all(|word| all.contains(word)).then_some(())
        })
    };
    logged(&["out", "err"])?;
    ensure!(nerdctl.ok(&["exec", &id, "cat", "/proc/1/comm"])? == "sh");
    ensure!(nerdctl.run(&["exec", "-i", &id, "cat"], Some("to the exec"))?.ok()?.text() == "to the exec");
    let failed = nerdctl.run(&["exec", &id, "sh", "-c", "exit 9"], None)?;
    ensure!(failed.code() != 0 && failed.errors().contains("exit code 9"), "{failed}");

    let status = || nerdctl.ok(&["inspect", "--format", "{{.State.Status}}", &id]);
    nerdctl.ok(&["pause", &id])?;
    ensure!(status()? == "paused", "{}", status()?);
    nerdctl.ok(&["unpause", &id])?;
    ensure!(status()? == "running", "{}", status()?);
    nerdctl.ok(&["update", "--memory", "200m", &id])?;
    ensure!(nerdctl.ok(&["exec", &id, "cat", "/sys/fs/cgroup/memory.max"])? == "209715200");

    nerdctl.ok(&["stop", &id])?;
    ensure!(status()? == "exited", "{}", status()?);
    ensure!(nerdctl.ok(&["inspect", "--format", "{{.State.ExitCode}}", &id])? == "5");
    logged(&["bye"])?;
    nerdctl.ok(&["start", &id])?;
    ensure!(status()? == "running", "{}", status()?);
    nerdctl.ok(&["rm", "-f", &id])?;
    let folders = nerdctl.folders()?;
    ensure!(!folders.contains(&id) && nerdctl.run(&["inspect", &id], None)?.code() != 0, "{folders}");
    Ok(())
}
