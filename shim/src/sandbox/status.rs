//! The sandbox as an operator sees it.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::console::GuestLogs;
use crate::ctl::{Answer, RpcError};
use crate::guest::report;
use crate::sandbox::registry::{ContainerSlot, Sandbox, VmSlot};
use crate::state::State;
use crate::state::recent::Recent;
use crate::state::status;
use crate::vm::Vm;

impl Sandbox {
    /// What has happened to it lately.
    pub fn recent(&self) -> &Recent {
        self.journal.recent()
    }

    /// The guest's console and the log of its init.
    pub fn guest_logs(&self) -> &GuestLogs {
        &self.guest_logs
    }

    /// All that is known of it.
    pub fn status(&self) -> Answer {
        let mut status = self.noted(status::of)?;
        self.add(&mut status);
        let (health, supervisor) = self.reported();
        status["health"] = health;
        status["supervisor"] = supervisor;
        Ok(status)
    }

    /// The same in short, as the only one of a list.
    pub fn listed(&self) -> Answer {
        let mut summary = self.noted(status::summary)?;
        self.add(&mut summary);
        Ok(json!({"sandboxes": [summary]}))
    }

    /// The VM, if it may be looked into.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn vm_in_debug_mode(&self) -> Result<Arc<Vm>, RpcError> {
        let vm = self.live_vm().map_err(|error| RpcError::refused(error.to_string()))?;
        if vm.debug {
            return Ok(vm);
        }
        Err(RpcError::refused(
            "the VM is not in debug mode, and one that is up cannot be switched to it: create the sandbox with the annotation io.husk.debug=true, or with debug = true in husk's configuration",
        ))
    }

    fn noted(&self, read: impl Fn(&State) -> Value) -> Answer {
        self.journal
            .with(|state| Ok(read(state)))
            .map_err(|_| RpcError::refused("everything of this sandbox has been removed, and its shim is about to end"))
    }

    /// What the shim knows better than the disk.
    fn add(&self, status: &mut Value) {
        let inner = self.lock();
        let listed = inner.containers.iter().map(|(id, slot)| match slot {
            ContainerSlot::Creating => json!({"id": id, "creating": true}),
            ContainerSlot::Ready(container) => json!({"id": id, "processes": container.processes_seen()}),
        });
        let mut containers: Vec<Value> = listed.collect();
        containers.sort_by(|a, b| a["id"].as_str().cmp(&b["id"].as_str()));
        status["containers"] = json!(containers);
    }

    /// What the guest has said of itself last: its health and its supervisor, null where nothing is known.
    fn reported(&self) -> (Value, Value) {
        match &self.lock().vm {
            VmSlot::Up(vm) => {
                let cause = vm.cause_of_death();
                let mut health = report::in_json(vm.health().snapshot());
                health["alive"] = json!(cause.is_none());
                health["cause_of_death"] = json!(cause);
                let supervisor = vm.health().supervisor().borrow().as_ref().map(report::supervisor_in_json);
                (health, json!(supervisor))
            }
            VmSlot::Empty | VmSlot::Booting(_) | VmSlot::Stopping => (Value::Null, Value::Null),
        }
    }
}
