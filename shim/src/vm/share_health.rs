//! Whether virtiofsd serves the share, and that a virtiofsd in an endless loop ends its VM. The shim looks at its
//! threads: a request through the guest would depend on the guest, and virtiofsd accepts no second client.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::lock::lock;
use serde_json::json;
use tokio::sync::watch;

use crate::host::blocked::{Observer, Trouble};
use crate::host::process::ProcessId;
use crate::state::recent::{EventKind, Recent};

/// How often the shim looks.
const INTERVAL: Duration = Duration::from_secs(5);

/// The health of virtiofsd's worker processes.
#[derive(Debug)]
pub(super) struct ShareHealth {
    workers: Vec<ProcessId>,
    observers: Mutex<HashMap<u32, Observer>>,
}

impl ShareHealth {
    pub(super) fn new(workers: &[ProcessId]) -> Arc<Self> {
        Arc::new(Self { workers: workers.to_vec(), observers: Mutex::default() })
    }

    /// Why virtiofsd does not serve the share now; `None` if it does, as far as is known.
    pub(super) fn problem(&self) -> Option<String> {
        self.trouble().map(|trouble| trouble.text)
    }

    fn trouble(&self) -> Option<Trouble> {
        let mut observers = lock(&self.observers);
        self.workers.iter().find_map(|worker| {
            observers.entry(worker.pid).or_default().look(*worker).unwrap_or_else(|error| {
                // A worker that has exited ends the VM, which is noticed elsewhere.
                tracing::debug!(pid = worker.pid, %error, "failed to look at virtiofsd");
                None
            })
        })
    }

    /// Looks again and again until the VM is dead, and reports each change. An endless loop is the VM's failure.
    pub(super) async fn watch(
        self: Arc<Self>,
        recent: Recent,
        mut dead: watch::Receiver<Option<String>>,
        failure: watch::Sender<Option<String>>,
    ) {
        let mut reported = false;
        loop {
            tokio::select! {
                // An error means that the VM's handle was dropped.
                _ = dead.wait_for(Option::is_some) => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
            let trouble = self.trouble();
            if let Some(Trouble { text, endless: true }) = &trouble {
                failure.send_replace(Some(format!("virtiofsd {text}")));
                return;
            }
            if trouble.is_some() != reported {
                report(&recent, trouble.as_ref().map(|trouble| trouble.text.as_str()));
                reported = trouble.is_some();
            }
        }
    }
}

fn report(recent: &Recent, problem: Option<&str>) {
    match problem {
        Some(problem) => {
            tracing::warn!(problem, "the share does not respond");
            recent.note(EventKind::Vm, "the share does not respond", json!({"problem": problem}));
        }
        None => {
            tracing::info!("the share responds again");
            recent.note(EventKind::Vm, "the share responds again", json!({}));
        }
    }
}
