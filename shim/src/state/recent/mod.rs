//! The latest events of a sandbox for its operator: state changes of the VM, events sent to containerd, problems. They
//! are numbered, bounded and kept in memory.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use husk_protos::lock::lock;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use crate::state::life::now_ms;

pub mod task;

/// How many events are kept.
const KEPT: usize = 1024;
/// Longest text that is kept, in bytes: the guest may have written part of it.
const MAX_TEXT: usize = 1024;

/// The subject of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The VM's state.
    Vm,
    /// A container or one of its processes; containerd receives the same event.
    Task,
    /// The guest's heartbeats.
    Health,
    /// The guest's supervisor agent.
    Supervisor,
    /// The sandbox as a whole.
    Sandbox,
}

/// The name in JSON.
impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vm => "vm",
            Self::Task => "task",
            Self::Health => "health",
            Self::Supervisor => "supervisor",
            Self::Sandbox => "sandbox",
        })
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Starts at 1 and increases by one.
    pub number: u64,
    /// When, by the host's clock, in milliseconds since the epoch.
    pub at_ms: u64,
    /// The subject.
    pub kind: EventKind,
    /// A description, without the values in the fields.
    pub what: String,
    /// The values: an object.
    pub fields: Value,
}

/// The latest events of one sandbox. Clones share them.
#[derive(Clone, Debug)]
pub struct Recent {
    events: Arc<Mutex<VecDeque<Event>>>,
    /// The latest event's number; 0 if there is none.
    last: Arc<watch::Sender<u64>>,
}

impl Default for Recent {
    fn default() -> Self {
        Self { events: Arc::default(), last: Arc::new(watch::channel(0).0) }
    }
}

impl Recent {
    /// Records an event. `fields` is an object with a few short values. Does not block.
    pub(crate) fn note(&self, kind: EventKind, what: &str, fields: Value) {
        let mut events = self.lock();
        let number = *self.last.borrow() + 1;
        while events.len() >= KEPT {
            events.pop_front();
        }
        let fields = truncate_fields(fields);
        events.push_back(Event { number, at_ms: now_ms(), kind, what: truncate(what), fields });
        self.last.send_replace(number);
    }

    /// The events after number `after`, oldest first, at most `limit`. If the first number is not `after + 1`, the
    /// events in between were dropped.
    pub(crate) fn after(&self, after: u64, limit: usize) -> Vec<Event> {
        let events = self.lock();
        let first = events.front().map_or(0, |event| event.number);
        let skip = (after.saturating_add(1)).saturating_sub(first).min(events.len() as u64) as usize;
        events.iter().skip(skip).take(limit).cloned().collect()
    }

    /// Waits for an event after number `after`.
    pub(crate) async fn grown(&self, after: u64) {
        // Cannot fail: self holds the sender.
        let _ = self.last.subscribe().wait_for(|last| *last > after).await;
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Event>> {
        lock(&self.events)
    }
}

fn truncate(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}

fn truncate_fields(mut fields: Value) -> Value {
    for value in fields.as_object_mut().into_iter().flat_map(|fields| fields.values_mut()) {
        if let Value::String(text) = value {
            text.truncate(text.floor_char_boundary(MAX_TEXT));
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn numbers(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.number).collect()
    }

    #[test]
    fn a_follower_gets_the_events_after_the_last_one_it_has() {
        let recent = Recent::default();
        assert!(recent.after(0, 10).is_empty() && *recent.last.borrow() == 0);
        for n in 1..=KEPT as u64 + 10 {
            recent.note(EventKind::Task, &format!("event {n}"), json!({}));
        }
        let last = KEPT as u64 + 10;
        let table: [(u64, usize, Vec<u64>); 7] = [
            (0, 2, vec![11, 12]),
            (10, 2, vec![11, 12]),
            (11, 2, vec![12, 13]),
            (last - 1, 10, vec![last]),
            (last, 10, vec![]),
            (u64::MAX, 10, vec![]),
            (last - 3, 2, vec![last - 2, last - 1]),
        ];
        for (after, limit, expected) in table {
            assert_eq!(numbers(&recent.after(after, limit)), expected, "after {after}");
        }
        assert_eq!(recent.after(0, usize::MAX).len(), KEPT);
    }

    #[test]
    fn long_texts_of_an_event_are_cut() {
        let recent = Recent::default();
        recent.note(EventKind::Vm, &"ä".repeat(10_000), json!({"cause": "x".repeat(10_000), "pid": 7}));
        let event = &recent.after(0, 1)[0];
        assert_eq!((event.what.len(), event.fields["cause"].as_str().unwrap().len()), (MAX_TEXT, MAX_TEXT));
        assert_eq!(event.fields["pid"], 7);
    }

    #[tokio::test]
    async fn a_new_event_wakes_its_followers() {
        let recent = Recent::default();
        let follower = tokio::spawn({
            let recent = recent.clone();
            async move { recent.grown(1).await }
        });
        recent.note(EventKind::Vm, "one", json!({}));
        tokio::task::yield_now().await;
        assert!(!follower.is_finished());
        recent.note(EventKind::Vm, "two", json!({}));
        tokio::time::timeout(std::time::Duration::from_secs(10), follower).await.expect("woken").unwrap();
    }
}
