//! A guest in debug mode (`husk.debug=1`): a shell on the serial console, and processes in the guest itself for `husk exec`. Without the word, nothing
//! here runs or answers.
//!
//! All of it is in cgroups of its own, so that it is neither counted nor protected as PID 1 is, and goes at once when the guest ends.

mod process;
mod service;
mod shell;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio::task::AbortHandle;
use ttrpc::r#async::Service;

use crate::cgroup;
use crate::io::Streams;
use crate::reaper::Reaper;

/// What is set in a program's environment that its caller has not set. The terminal is a guess that every terminal understands.
const ENVIRONMENT: [(&str, &str); 3] = [("PATH", "/bin:/sbin:/usr/bin:/usr/sbin"), ("HOME", "/"), ("TERM", "vt100")];

/// What runs only in debug mode.
pub struct Debug {
    shell: AbortHandle,
    processes: Arc<process::Processes>,
}

impl Debug {
    /// Starts the shell. It is not waited for.
    ///
    /// # Errors
    /// When there can be no cgroup for it.
    pub fn start(reaper: &Arc<Reaper>, streams: &Arc<Streams>) -> io::Result<Self> {
        std::fs::create_dir(cgroup::DEBUG)?;
        let shell = tokio::spawn(shell::keep(reaper.clone())).abort_handle();
        Ok(Self { shell, processes: Arc::new(process::Processes::new(reaper.clone(), streams.clone())) })
    }

    /// The Debug service.
    pub fn service(&self) -> HashMap<String, Service> {
        husk_protos::debug_ttrpc::create_debug(Arc::new(service::Service(self.processes.clone())))
    }

    /// Kills all of it. Before the file systems are synced: what it writes shall not come after.
    pub fn end(self) {
        self.shell.abort();
        if let Err(error) = cgroup::kill(Path::new(cgroup::DEBUG)) {
            tracing::warn!(%error, "kill what debug mode has started");
        }
    }
}

/// `given`, and what it lacks of [`ENVIRONMENT`].
fn environment(given: &[String]) -> Vec<String> {
    let has = |name: &str| given.iter().any(|one| one.split_once('=').is_some_and(|(given, _)| given == name));
    let lacking = ENVIRONMENT.iter().filter(|(name, _)| !has(name));
    given.iter().cloned().chain(lacking.map(|(name, value)| format!("{name}={value}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_caller_sets_stays_and_the_rest_is_filled_in() {
        let given = ["TERM=xterm", "PATHS=x", "HOME="].map(String::from);
        let want = ["TERM=xterm", "PATHS=x", "HOME=", "PATH=/bin:/sbin:/usr/bin:/usr/sbin"];
        assert_eq!(environment(&given), want);
    }
}
