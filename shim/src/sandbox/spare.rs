//! A VM from the pool, before a sandbox uses it.

use std::sync::Arc;

use husk_protos::events::Event;

use crate::console::GuestLogs;
use crate::guest::client::Metering;
use crate::network::PrivateNamespace;
use crate::rootfs::share::Share;
use crate::state::Boot;
use crate::vm::Vm;

/// A booted VM without a sandbox.
pub(crate) struct Spare {
    pub(crate) vm: Arc<Vm>,
    pub(crate) events: Metering<Event>,
    /// The number of the last event that was read.
    pub(crate) last_event: u64,
    /// The key of the sandboxes that it may serve.
    pub(crate) key: String,
    /// The milestones of its boot.
    pub(crate) boot: Boot,
}

/// What a shim has that has waited.
pub(crate) struct Waited {
    pub(crate) spare: Spare,
    pub(crate) share: Share,
    pub(crate) network: PrivateNamespace,
    pub(crate) logs: GuestLogs,
}
