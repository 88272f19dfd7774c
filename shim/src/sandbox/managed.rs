//! What a sandbox has that containerd's Sandbox API manages, besides its containers and its VM.

use std::collections::HashMap;
use std::sync::Arc;

use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::prepare::{PodFile, Prepared};

/// When and how a sandbox ended.
#[derive(Debug, Clone)]
pub(crate) struct SandboxExit {
    pub(crate) status: u32,
    pub(crate) at: Timestamp,
}

/// The running sandbox, as StartSandbox reports it.
#[derive(Debug, Clone)]
pub(crate) struct Started {
    /// PID of the process that represents the sandbox on the host.
    pub(crate) pid: u32,
    /// PID of the process that holds the sandbox's namespaces in the guest.
    pub(crate) guest_pid: u32,
    pub(crate) at: Timestamp,
}

/// The only call of StartSandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StartCall {
    /// Nobody has called it.
    Missing,
    /// The VM boots.
    Running,
    /// It has succeeded or failed.
    Ended,
}

/// Records the end of StartSandbox, however it ends.
pub(super) struct Starting(pub(super) watch::Sender<StartCall>);

impl Drop for Starting {
    fn drop(&mut self) {
        self.0.send_replace(StartCall::Ended);
    }
}

/// What SandboxStatus reports.
#[derive(Debug)]
pub(crate) struct SandboxState {
    pub(crate) started: Option<Started>,
    pub(crate) exit: Option<SandboxExit>,
}

/// The sandbox's own part, besides its containers and its VM.
#[derive(Clone)]
pub(super) struct Managed {
    pub(super) prepared: Arc<Prepared>,
    /// Its spec, JSON.
    pub(super) spec: Vec<u8>,
    /// The files that a pod's containers find in `/etc`.
    pub(super) files: Arc<[PodFile]>,
    /// A pod's sysctls.
    pub(super) sysctls: HashMap<String, String>,
    pub(super) start: watch::Sender<StartCall>,
    pub(super) started: Option<Started>,
    pub(super) exit: watch::Sender<Option<SandboxExit>>,
}

impl Managed {
    /// Whether StartSandbox has succeeded and the sandbox has not ended.
    pub(super) fn is_ready(&self) -> bool {
        self.started.is_some() && self.exit.borrow().is_none()
    }

    /// Records the exit, unless one is recorded.
    pub(super) fn record_exit(&self, status: u32) {
        self.exit.send_if_modified(|exit| {
            let is_first = exit.is_none();
            if is_first {
                *exit = Some(SandboxExit { status, at: Timestamp::now() });
            }
            is_first
        });
    }
}
