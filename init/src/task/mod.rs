//! Containers and their processes. [`service`] maps the calls of containerd's Task service onto [`Tasks`].

mod container;
mod copy_back;
mod create;
mod delete;
mod events;
mod exec;
mod kill;
mod pause;
mod process;
mod resources;
pub(crate) mod service;
mod start;
mod streams;
mod terminal;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use husk_protos::lock::lock;

use crate::disks::Disks;
use crate::error::{CallError, FailureKind};
use crate::events::Events;
use crate::forward::socket::Sockets;
use crate::io::Streams;
use crate::reaper::Reaper;
use crate::worker::client::Workers;

use container::Container;

/// All containers of the guest.
#[derive(Debug)]
pub(crate) struct Tasks {
    reaper: Arc<Reaper>,
    workers: Workers,
    events: Arc<Events>,
    streams: Arc<Streams>,
    sockets: Arc<Sockets>,
    disks: Arc<Disks>,
    /// By ID. `None` reserves the ID of a container that is being created.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
}

impl Tasks {
    pub(crate) fn new(
        reaper: Arc<Reaper>,
        workers: Workers,
        events: Arc<Events>,
        streams: Arc<Streams>,
        sockets: Arc<Sockets>,
        disks: Arc<Disks>,
    ) -> Arc<Self> {
        Arc::new(Self { reaper, workers, events, streams, sockets, disks, containers: Mutex::default() })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, CallError> {
        self.table()
            .get(id)
            .cloned()
            .flatten()
            .ok_or_else(|| CallError::new(FailureKind::NotFound, format!("container {id} does not exist")))
    }

    fn all(&self) -> Vec<Arc<Container>> {
        self.table().values().flatten().cloned().collect()
    }

    /// Whether a container has this ID, or is being created with it.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.table().contains_key(id)
    }

    fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation, CallError> {
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(CallError::new(FailureKind::AlreadyExists, format!("container {id} already exists")));
        }
        table.insert(id.into(), None);
        Ok(Reservation { tasks: self.clone(), id: id.into() })
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        lock(&self.containers)
    }
}

/// The ID of a container that is being created. Dropped without a container, it frees the ID.
struct Reservation {
    tasks: Arc<Tasks>,
    id: String,
}

impl Reservation {
    fn fill(self, container: Arc<Container>) {
        self.tasks.table().insert(self.id.clone(), Some(container));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut table = self.tasks.table();
        if let Some(None) = table.get(&self.id) {
            table.remove(&self.id);
        }
    }
}
