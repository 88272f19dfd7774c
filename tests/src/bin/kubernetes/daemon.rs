//! A daemon of the node that can be killed alone and started again.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::command;
use husk_tests::process::{self, Process};

/// Deadline for `nsenter` to start the program.
const START: Duration = Duration::from_secs(10);

/// A daemon, started by `nsenter`, which waits for it.
pub struct Daemon {
    command: Command,
    child: Child,
}

impl Daemon {
    /// Starts a daemon that appends its output to the file `log`.
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        Ok(Self { command, child })
    }

    /// Whether it has exited.
    pub fn has_exited(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// The daemon itself.
    pub fn process(&self) -> Result<Process> {
        let nsenter = self.child.id() as i32;
        command::wait_for(START, "the daemon is started", || process::all().into_iter().find(|p| p.parent == nsenter))
    }

    /// Kills it with SIGKILL, but no process that it has started.
    pub fn kill(&mut self) -> Result<()> {
        self.process()?.kill();
        self.wait();
        Ok(())
    }

    /// Starts it again after [`Self::kill`].
    pub fn start_again(&mut self) -> Result<()> {
        self.child = self.command.spawn().with_context(|| format!("start {:?} again", self.command))?;
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&mut self) {
        // It has been killed: there is no other result.
        let _ = self.child.wait();
    }
}
