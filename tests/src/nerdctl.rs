//! nerdctl for a private containerd: its data, its networks and the CNI plugins' data are the daemon's own.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::artifacts::repository;
use crate::cni::Plugins;
use crate::command::{self, Output};
use crate::containerd::{Containerd, NAMESPACE};

/// Deadline for one call, on a loaded machine that emulates its VMs.
pub const DEADLINE: Duration = Duration::from_secs(90);
/// nerdctl's data directory, in the daemon's own /run.
pub const DATA: &str = "/run/nerdctl";

/// nerdctl for one containerd.
pub struct Nerdctl<'a> {
    containerd: &'a Containerd,
    program: PathBuf,
}

impl<'a> Nerdctl<'a> {
    /// Where the setup of the tests has put nerdctl.
    pub fn program() -> Result<PathBuf> {
        let program = repository().join(".cache/nerdctl/nerdctl");
        ensure!(program.exists(), "{} is missing: run `./task test-tools` first", program.display());
        Ok(program)
    }

    /// nerdctl for this daemon.
    pub fn new(containerd: &'a Containerd, program: PathBuf) -> Self {
        Self { containerd, program }
    }

    /// The daemon.
    pub fn containerd(&self) -> &'a Containerd {
        self.containerd
    }

    /// A call, with these arguments after the options that select the daemon.
    pub fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = self.containerd.enter(&self.program);
        command.args(["--address", "/run/containerd/containerd.sock", "--namespace", NAMESPACE, "--data-root", DATA]);
        command.args(["--cni-netconfpath", "/run/cni/net.d", "--cni-path"]).arg(Plugins::newest()?.folder).args(args);
        command.env("PATH", self.containerd.search_path());
        Ok(command)
    }

    /// Runs nerdctl until it exits, with any exit code.
    pub fn run(&self, args: &[&str], stdin: Option<&str>) -> Result<Output> {
        command::run(self.command(args)?, stdin.map(|text| text.as_bytes().to_vec()), DEADLINE)
    }

    /// Runs nerdctl, which must succeed, and returns its output.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.run(args, None)?.ok().with_context(|| self.containerd.log_tail())?.text())
    }

    /// The arguments of `run` on this network, with the runtime and the image under test.
    pub fn run_args<'b>(&'b self, network: &'b str, flags: &[&'b str], process: &[&'b str]) -> Vec<&'b str> {
        let mut args = vec!["run", "--runtime", self.containerd.runtime().name(), "--network", network];
        args.extend(flags);
        args.push(self.containerd.image());
        args.extend(process);
        args
    }

    /// The directories that nerdctl keeps for its containers.
    pub fn folders(&self) -> Result<String> {
        Ok(self.containerd.sh(&format!("find {DATA} -path '*/containers/*/*' -prune -print"))?.text())
    }
}
