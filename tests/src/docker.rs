//! dockerd on a private machine: it uses the machine's containerd, and all its data are the machine's own.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::artifacts::{Runtime, repository};
use crate::command::{self, Output, wait_for};
use crate::machine::Machine;

/// Deadline for one call, on a loaded machine that emulates its VMs.
const DEADLINE: Duration = Duration::from_secs(90);
/// Deadline for dockerd to start or to end.
const START: Duration = Duration::from_secs(30);
const SOCKET: &str = "unix:///run/docker/docker.sock";
const LOG: &str = "/run/docker/log";
/// The release lines of docker that husk works with: directory names under `.cache/docker`.
pub const VERSIONS: [&str; 2] = ["26.1", "28.5"];

/// The name of the test image in docker.
pub const IMAGE: &str = "husk-busybox";

/// dockerd and its client.
pub struct Docker<'a> {
    machine: &'a Machine,
    folder: PathBuf,
    daemon: Child,
}

impl<'a> Docker<'a> {
    /// Starts this version's dockerd and loads the test image.
    pub fn start(machine: &'a Machine, version: &str) -> Result<Self> {
        let folder = repository().join(".cache/docker").join(version);
        if !folder.join("dockerd").exists() {
            bail!("{} is missing: run `./task test-tools` first", folder.join("dockerd").display());
        }
        let containerd = machine.containerd();
        let config = serde_json::json!({
            "runtimes": {"husk": {"runtimeType": Runtime::Husk.name()}},
            "containerd": "/run/containerd/containerd.sock",
            "data-root": "/run/docker/data",
            "exec-root": "/run/docker/exec",
            "pidfile": "/run/docker/pid",
            "hosts": [SOCKET],
            "storage-driver": "overlay2",
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": format!("/husk-test-{}", containerd.token()),
        });
        containerd.sh("mkdir /run/docker")?;
        std::fs::write(containerd.path("/run/docker/daemon.json"), config.to_string())?;
        let mut command = containerd.enter("sh");
        command.args(["-c", &format!("exec \"$0\" --config-file /run/docker/daemon.json >{LOG} 2>&1")]);
        command.arg(folder.join("dockerd"));
        command.env("PATH", format!("{}:{}", folder.display(), containerd.search_path()));
        let daemon = command.stdin(Stdio::null()).spawn().context("start dockerd")?;
        let docker = Self { machine, folder, daemon };
        wait_for(START, "dockerd answers", || docker.run(&["version"]).ok().filter(|output| output.code() == 0))
            .with_context(|| docker.log_tail())?;
        // The image's tarball is an OCI layout, which docker does not load.
        containerd.sh(&format!("tar -C {} -cf /run/docker/image.tar .", containerd.unpacked_image()?))?;
        docker.ok(&["import", "/run/docker/image.tar", IMAGE])?;
        Ok(docker)
    }

    /// Name of the runtime under test in docker.
    pub fn runtime(&self) -> &'static str {
        match self.machine.containerd().runtime() {
            Runtime::Husk => "husk",
            Runtime::Runc => "runc",
        }
    }

    /// Runs the client until it exits, with any exit code.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        self.run_with(args, None)
    }

    /// Like [`Self::run`], with stdin.
    pub fn run_with(&self, args: &[&str], stdin: Option<&str>) -> Result<Output> {
        let mut command = self.machine.containerd().enter(self.folder.join("docker"));
        command.args(["--host", SOCKET]).args(args).env("HOME", "/run/docker");
        command::run(command, stdin.map(|text| text.as_bytes().to_vec()), DEADLINE)
    }

    /// Runs the client, which must succeed, and returns its output.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.run(args)?.ok().with_context(|| self.log_tail())?.text())
    }

    /// `docker run` with the runtime and the image under test.
    pub fn container(&self, flags: &[&str], process: &[&str]) -> Result<Output> {
        self.container_with(flags, process, None)
    }

    /// Like [`Self::container`], with stdin.
    pub fn container_with(&self, flags: &[&str], process: &[&str], stdin: Option<&str>) -> Result<Output> {
        let args = [&["run", "--runtime", self.runtime()], flags, &[IMAGE], process].concat();
        self.run_with(&args, stdin).with_context(|| self.log_tail())
    }

    /// The last lines of both daemons' logs.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.machine.containerd().path(LOG)).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let mut tail = String::from("dockerd: end of the log:\n");
        for line in &lines[lines.len().saturating_sub(15)..] {
            // Writing to a String cannot fail.
            let _ = writeln!(tail, "{line}");
        }
        tail + &self.machine.containerd().log_tail()
    }

    /// Ends dockerd as its service manager does.
    pub fn stop(mut self) -> Result<()> {
        self.machine.containerd().sh("kill -TERM $(cat /run/docker/pid)")?;
        wait_for(START, "dockerd exits", || self.daemon.try_wait().transpose())??;
        Ok(())
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        // Both fail if the daemon has exited. Its namespace's process 1 would end it later.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
