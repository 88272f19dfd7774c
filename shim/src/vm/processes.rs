//! The processes of a VM on the host, and what explains their end.

use std::sync::Arc;
use std::time::Duration;

use crate::console::{Attached, HelperLog};
use crate::host::child::Child;
use crate::host::process::ProcessId;
use crate::vmm::Machine;

/// The machine's exit may be noticed this much later than that of its sockets.
pub(super) const MACHINE_DELAY: Duration = Duration::from_millis(200);
/// Lines of the console that explain an end.
pub(super) const CONSOLE_LINES: usize = 24;
/// How long the console's last output may take to arrive after the machine's exit.
pub(super) const CONSOLE_DEADLINE: Duration = Duration::from_millis(500);

/// The processes of a VM, and what explains their end.
pub(super) struct Processes {
    pub(super) machine: Arc<dyn Machine>,
    pub(super) share: Arc<Child>,
    pub(super) console: Attached,
    /// The output of the two processes.
    pub(super) logs: [HelperLog; 2],
}

impl Processes {
    /// Waits until one of the processes prints without end: the guest has driven it into an endless loop. Returns a
    /// cause of death.
    pub(super) async fn flooded(&self) -> String {
        let [machine, share] = &self.logs;
        tokio::select! {
            cause = machine.flooded() => cause,
            cause = share.flooded() => cause,
        }
    }

    /// Kills all processes.
    pub(super) fn kill(&self, share_workers: &[ProcessId]) {
        self.machine.kill();
        kill_share(&self.share, share_workers);
    }
}

/// The last lines that the processes have printed, once they have ended.
pub(super) async fn last_words(logs: &[HelperLog]) -> String {
    let mut words = String::new();
    for log in logs {
        words = format!("{words}\n{}", log.tail(MACHINE_DELAY).await).trim().to_owned();
    }
    words
}

/// Kills virtiofsd with its workers. It would exit some time after the machine has closed its socket, or never if it is
/// in an endless loop. If virtiofsd itself has exited, its workers may still run.
pub(super) fn kill_share(share: &Child, workers: &[ProcessId]) {
    share.kill();
    for worker in workers {
        if let Err(error) = worker.send_kill() {
            tracing::warn!(pid = worker.pid, %error, "failed to kill virtiofsd's worker");
        }
    }
}
