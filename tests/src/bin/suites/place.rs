//! Where a test runs: a private containerd's namespaces, with the suites' programs first in PATH.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::artifacts::{Runtime, Version, repository};
use husk_tests::command::{self, Output};
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::process;

/// Temporary files of the tests, in the private `/run`.
const TEMPORARY: &str = "/run/tmp";

/// The folder that `tests/setup-suites` fills.
pub fn suites() -> PathBuf {
    repository().join(".cache/suites")
}

/// The newer containerd, its runc shim and its client's tests.
pub fn bin() -> PathBuf {
    suites().join("containerd")
}

/// One private environment. It ends with everything in it when it is dropped.
pub struct Place {
    /// Its containerd receives the events of shims that a test drives itself.
    pub containerd: Containerd,
    processes: usize,
}

impl Place {
    /// Makes one whose shims are of this runtime.
    pub fn new(runtime: Runtime) -> Result<Self> {
        // A test copies the shim to another folder, where it does not find the guest's files beside itself.
        let husk = format!("image_dir = {:?}\n", repository().join("out"));
        let setup = Setup { runtime: Some(runtime), version: Some(Version::V2_1), husk, ..Setup::default() };
        let containerd = Containerd::with(setup)?;
        // Tests of containerd's client keep their daemon's data in /var/lib.
        containerd.sh(&format!("mount -t tmpfs tmpfs /var/lib && mkdir {TEMPORARY}"))?;
        let processes = process::descendants(containerd.pid()).len();
        Ok(Self { containerd, processes })
    }

    /// Runs a program in a folder until it exits or its deadline expires.
    pub fn run(
        &self,
        folder: &PathBuf,
        program: &PathBuf,
        prepare: impl FnOnce(&mut Command),
        deadline: Duration,
    ) -> Result<Output> {
        let mut command = self.containerd.enter("sh");
        command.args(["-c", r#"cd "$0" && exec "$@""#]).arg(folder).arg(program);
        command.env("PATH", format!("{}:{}", bin().display(), self.containerd.search_path()));
        command.env("TMPDIR", TEMPORARY);
        prepare(&mut command);
        command::run(command, None, deadline)
    }

    /// Whether a test has left nothing running, so that the next one can use this place.
    pub fn is_clean(&self) -> bool {
        process::descendants(self.containerd.pid()).len() == self.processes
    }

    /// The processes that a test has left, in the order of their PIDs.
    pub fn left_running(&self) -> String {
        let mut processes = process::descendants(self.containerd.pid());
        processes.sort_by_key(|process| process.pid);
        let lines = processes.iter().skip(self.processes).map(|process| format!("{} {}", process.pid, process.command));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The shim's binary.
    pub fn shim(&self) -> Result<PathBuf> {
        match self.containerd.runtime() {
            Runtime::Husk => husk_tests::artifacts::built(Runtime::Husk.shim()),
            Runtime::Runc => bin().join(Runtime::Runc.shim()).canonicalize().context("runc's shim"),
        }
    }
}
