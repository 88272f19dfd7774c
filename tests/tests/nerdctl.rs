//! husk through nerdctl: the way of a container that is run, looked into, stopped, started again and removed by it.
//!
//! nerdctl stands on the host's hooks, on `binary://` outputs and on a stdin that it asks to be closed once.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use husk_tests::artifacts::repository;
use husk_tests::command::{self, Output, wait_for};
use husk_tests::containerd::{Containerd, NAMESPACE};
use husk_tests::pty::Pty;

const DEADLINE: Duration = Duration::from_secs(60);
/// All that nerdctl keeps, in the daemon's own /run.
const DATA: &str = "/run/nerdctl";

/// nerdctl for one containerd.
struct Nerdctl {
    containerd: &'static Containerd,
    program: PathBuf,
}

impl Nerdctl {
    /// None, and a word on why, where setting up the tests has found that nerdctl cannot be had.
    fn or_tell(test: &str) -> Result<Option<Self>> {
        let folder = repository().join(".cache/nerdctl");
        if let Ok(why) = std::fs::read_to_string(folder.join("missing")) {
            eprintln!("{test}: not tried, there is no nerdctl here: {}", why.trim());
            return Ok(None);
        }
        let program = folder.join("nerdctl");
        if !program.exists() {
            bail!("{} is missing: run `./task test-tools` first", program.display());
        }
        Ok(Some(Self { containerd: Containerd::shared()?, program }))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.containerd.enter(&self.program);
        command.args(["--address", "/run/containerd/containerd.sock", "--namespace", NAMESPACE, "--data-root", DATA]);
        command.args(["--cni-netconfpath", "/run/cni/net.d", "--cni-path", "/run/cni/bin"]).args(args);
        command.env("PATH", self.containerd.search_path());
        command
    }

    fn run(&self, args: &[&str], stdin: Option<&str>) -> Result<Output> {
        command::run(self.command(args), stdin.map(|text| text.as_bytes().to_vec()), DEADLINE)
    }

    /// What it prints, if it goes well.
    fn ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.run(args, None)?.ok()?.text())
    }

    /// The arguments of a `run` without a network.
    fn run_args<'a>(&'a self, flags: &[&'a str], process: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["run", "--runtime", self.containerd.runtime().name(), "--network", "none"];
        args.extend(flags);
        args.push(self.containerd.image());
        args.extend(process);
        args
    }

    /// The folders that it keeps for its containers.
    fn folders(&self) -> Result<String> {
        let found = self.containerd.sh(&format!("find {DATA} -path '*/containers/*/*' -prune -print"))?.text();
        Ok(found)
    }
}

#[test]
fn a_container_runs_with_its_input_its_limits_and_its_exit_status() -> Result<()> {
    let name = "a_container_runs_with_its_input_its_limits_and_its_exit_status";
    let Some(nerdctl) = Nerdctl::or_tell(name)? else { return Ok(()) };
    let through = nerdctl.run(&nerdctl.run_args(&["--rm", "-i"], &["cat"]), Some("through stdin"))?.ok()?;
    ensure!(through.text() == "through stdin", "{through}");
    nerdctl.run(&nerdctl.run_args(&["--rm"], &["sh", "-c", "exit 7"]), None)?.expect_code(7)?;

    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("file"), "of the host")?;
    let volume = format!("{}:/volume", folder.path().display());
    let flags = ["--rm", "-m", "100m", "--cpus", "1.5", "--pids-limit", "50", "-e", "A=b", "-w", "/tmp", "-u", "1000"];
    let more = ["--hostname", "inside", "--read-only", "--tmpfs", "/scratch", "--cap-drop", "ALL", "-v", &volume];
    let script = "id -u; pwd; echo $A; hostname; cat /volume/file; echo; cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; \
        grep CapEff /proc/self/status; touch /scratch/a && ! touch /a 2>/dev/null && echo read-only";
    let seen = nerdctl.ok(&nerdctl.run_args(&[&flags[..], &more[..]].concat(), &["sh", "-c", script]))?;
    let lines: Vec<&str> = seen.lines().collect();
    let wanted = ["1000", "/tmp", "b", "inside", "of the host", "104857600", "150000 100000", "50"];
    ensure!(lines.len() == 10 && lines[..8] == wanted, "{seen}");
    ensure!(lines[8].ends_with("0000000000000000") && lines[9] == "read-only", "{seen}");

    let mut shell = Pty::spawn(nerdctl.command(&nerdctl.run_args(&["--rm", "-it"], &["sh"])), 24, 80)?;
    shell.send("tty; exit 3\r")?;
    let (shown, status) = shell.finish(DEADLINE)?;
    ensure!(status == 3 && shown.contains("/dev/pts/0"), "{status}: {shown}");
    Ok(())
}

#[test]
fn a_container_is_looked_into_paused_changed_stopped_started_again_and_removed() -> Result<()> {
    let name = "a_container_is_looked_into_paused_changed_stopped_started_again_and_removed";
    let Some(nerdctl) = Nerdctl::or_tell(name)? else { return Ok(()) };
    let id = nerdctl.containerd.id("nerdctl");
    let script = "echo out; echo err >&2; trap 'echo bye; exit 5' TERM; while :; do sleep 0.1; done";
    nerdctl.ok(&nerdctl.run_args(&["-d", "--name", &id], &["sh", "-c", script]))?;
    let logged = |wanted: &[&str]| {
        wait_for(DEADLINE, "the output is in nerdctl's log", || {
            let logs = nerdctl.run(&["logs", &id], None).ok()?;
            let all = logs.text() + &logs.errors();
            wanted.iter().all(|word| all.contains(word)).then_some(())
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
