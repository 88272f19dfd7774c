//! Containers and their processes, as containerd's Task service sees them. [`service`] maps the calls onto what is here.

mod container;
mod create;
mod delete;
mod exec;
mod kill;
mod pause;
mod process;
mod resources;
pub mod service;
mod start;
mod tell;
mod terminal;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::{Error, Kind};
use crate::events::Events;
use crate::io::Streams;
use crate::reaper::Reaper;
use crate::worker::client::Workers;

use container::Container;

/// All containers of the guest.
#[derive(Debug)]
pub struct Tasks {
    reaper: Arc<Reaper>,
    workers: Workers,
    events: Arc<Events>,
    streams: Arc<Streams>,
    /// None for an id whose container is being made.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
}

impl Tasks {
    /// None yet.
    pub fn new(reaper: Arc<Reaper>, workers: Workers, events: Arc<Events>, streams: Arc<Streams>) -> Arc<Self> {
        Arc::new(Self { reaper, workers, events, streams, containers: Mutex::default() })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.table()
            .get(id)
            .cloned()
            .flatten()
            .ok_or_else(|| Error::new(Kind::NotFound, format!("container {id} does not exist")))
    }

    fn all(&self) -> Vec<Arc<Container>> {
        self.table().values().flatten().cloned().collect()
    }

    /// Whether the id has a container, or is about to have one.
    pub fn has(&self, id: &str) -> bool {
        self.table().contains_key(id)
    }

    /// Keeps an id for a container that is being made.
    fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation, Error> {
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(Error::new(Kind::AlreadyExists, format!("container {id} exists")));
        }
        table.insert(id.into(), None);
        Ok(Reservation { tasks: self.clone(), id: id.into() })
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// An id whose container is being made. Free again when dropped without one.
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
