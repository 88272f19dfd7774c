//! Debug mode (`husk.debug=1`): a shell on a console of its own, and processes in the guest itself for `husk exec`.
//! Without the parameter, nothing here runs and the Debug service does not exist.
//!
//! All of it runs in separate cgroups: it is neither accounted nor protected like PID 1, and shutdown kills it at once.

mod environment;
mod process;
mod service;
mod shell;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use husk_protos::chain::Chain;
use tokio::task::AbortHandle;
use ttrpc::r#async::Service;

use crate::cgroup;
use crate::io::Streams;
use crate::reaper::Reaper;

/// What runs only in debug mode.
pub(crate) struct Debug {
    shell: AbortHandle,
    processes: Arc<process::Processes>,
}

impl Debug {
    /// Starts the shell in the background.
    ///
    /// # Errors
    /// When the cgroup cannot be created.
    pub(crate) fn start(reaper: &Arc<Reaper>, streams: &Arc<Streams>) -> io::Result<Self> {
        std::fs::create_dir(cgroup::DEBUG)?;
        let shell = tokio::spawn(shell::respawn(reaper.clone())).abort_handle();
        Ok(Self { shell, processes: Arc::new(process::Processes::new(reaper.clone(), streams.clone())) })
    }

    pub(crate) fn service(&self) -> HashMap<String, Service> {
        husk_protos::debug_ttrpc::create_debug(Arc::new(service::DebugService(self.processes.clone())))
    }

    /// Kills everything. Must run before the file systems are synced, so that nothing is written afterwards.
    pub(crate) fn end(self) {
        self.shell.abort();
        if let Err(error) = cgroup::kill(Path::new(cgroup::DEBUG)) {
            tracing::warn!(error = %Chain(&error), "failed to kill debug mode's processes");
        }
    }
}
