//! The latest events of a sandbox for its operator: state changes of the VM, events sent to containerd, problems. They
//! are numbered, bounded and kept in memory.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use husk_protos::lock::lock;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::state::life::now_ms;

pub mod task;

/// How many events are kept.
const KEPT: usize = 1024;
/// How much memory they may take, in bytes: enough for [`KEPT`] events of containers with long ids.
const KEPT_BYTES: usize = 512 * 1024;
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

/// An event as it is kept: a map of values would take several times as much memory as its JSON.
#[derive(Debug)]
struct Kept {
    number: u64,
    at_ms: u64,
    kind: EventKind,
    what: Box<str>,
    fields: Box<str>,
}

impl Kept {
    /// In bytes.
    fn size(&self) -> usize {
        size_of::<Self>() + self.what.len() + self.fields.len()
    }

    fn event(&self) -> Event {
        // Cannot fail: the text was written from such a value.
        let fields = serde_json::from_str(&self.fields);
        let fields = fields.unwrap_or_else(|error| json!({"unreadable": error.to_string()}));
        Event { number: self.number, at_ms: self.at_ms, kind: self.kind, what: self.what.to_string(), fields }
    }
}

/// The kept events, oldest first.
#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Kept>,
    /// In bytes.
    size: usize,
}

impl Queue {
    /// Adds an event, and drops the oldest ones that are too many.
    fn push(&mut self, event: Kept) {
        self.size += event.size();
        self.events.push_back(event);
        while self.events.len() > KEPT || self.size > KEPT_BYTES {
            match self.events.pop_front() {
                Some(dropped) => self.size -= dropped.size(),
                None => break,
            }
        }
    }
}

/// The latest events of one sandbox. Clones share them.
#[derive(Clone, Debug)]
pub struct Recent {
    queue: Arc<Mutex<Queue>>,
    /// The latest event's number; 0 if there is none.
    last: Arc<watch::Sender<u64>>,
}

impl Default for Recent {
    fn default() -> Self {
        Self { queue: Arc::default(), last: Arc::new(watch::channel(0).0) }
    }
}

impl Recent {
    /// Records an event. `fields` is an object with a few short values. Does not block.
    pub(crate) fn note(&self, kind: EventKind, what: &str, fields: Value) {
        let mut queue = self.lock();
        let number = *self.last.borrow() + 1;
        let what = truncate(what).into();
        let fields = truncate_fields(fields).to_string().into();
        queue.push(Kept { number, at_ms: now_ms(), kind, what, fields });
        self.last.send_replace(number);
    }

    /// The events after number `after`, oldest first, at most `limit`. If the first number is not `after + 1`, the
    /// events in between were dropped.
    pub(crate) fn after(&self, after: u64, limit: usize) -> Vec<Event> {
        let queue = self.lock();
        let first = queue.events.front().map_or(0, |event| event.number);
        let skip = (after.saturating_add(1)).saturating_sub(first).min(queue.events.len() as u64) as usize;
        queue.events.iter().skip(skip).take(limit).map(Kept::event).collect()
    }

    /// Waits for an event after number `after`.
    pub(crate) async fn grown(&self, after: u64) {
        // Cannot fail: self holds the sender.
        let _ = self.last.subscribe().wait_for(|last| *last > after).await;
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }
}

fn truncate(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT)]
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

    #[test]
    fn the_kept_events_take_a_bounded_amount_of_memory() {
        let recent = Recent::default();
        let long = "x".repeat(MAX_TEXT);
        let count = 4 * KEPT as u64;
        for _ in 0..count {
            recent.note(EventKind::Task, &long, json!({"container": long, "exec": long, "bundle": long}));
        }
        let size = recent.lock().size;
        assert!((KEPT_BYTES - 5 * MAX_TEXT..=KEPT_BYTES).contains(&size), "{size}");
        let kept = recent.after(0, usize::MAX);
        let first = count - kept.len() as u64 + 1;
        assert_eq!(numbers(&kept), (first..=count).collect::<Vec<_>>());
        assert_eq!(size, recent.lock().events.iter().map(Kept::size).sum::<usize>());
        // Events of usual length are all kept.
        let id = "0123456789abcdef".repeat(4);
        let bundle = format!("/run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}");
        for _ in 0..KEPT {
            let fields = json!({"container": id, "exec": id, "pid": 1 << 22, "exit_status": 137, "bundle": bundle});
            recent.note(EventKind::Task, "/tasks/exec-started", fields);
        }
        assert_eq!(recent.after(0, usize::MAX).len(), KEPT);
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
