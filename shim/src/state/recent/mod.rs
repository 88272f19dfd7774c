//! What has happened to a sandbox lately, for its operator: its VM's states, what containerd is told, problems. Numbered, bounded, in memory.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

use crate::state::life::now_ms;

pub mod task;

/// Events that are kept.
pub const KEPT: usize = 1024;
/// Longest text of an event that is kept, in bytes: part of it may be a guest's words.
const LONGEST: usize = 1024;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The VM's state.
    Vm,
    /// A container or a process of it; containerd is told the same.
    Task,
    /// How the VM is.
    Health,
    /// The supervisor agent in the guest.
    Supervisor,
    /// The sandbox as a whole.
    Sandbox,
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// Starts at 1 and grows by one.
    pub number: u64,
    /// When, by the host's clock, milliseconds since the epoch.
    pub at_ms: u64,
    /// What it is about.
    pub kind: Kind,
    /// In words, without what is in the fields.
    pub what: String,
    /// The particulars: an object.
    pub fields: Value,
}

/// The last events of one sandbox. Clones share them.
#[derive(Clone, Debug)]
pub struct Recent {
    events: Arc<Mutex<VecDeque<Event>>>,
    /// The number of the last one.
    last: Arc<watch::Sender<u64>>,
}

impl Default for Recent {
    fn default() -> Self {
        Self { events: Arc::default(), last: Arc::new(watch::channel(0).0) }
    }
}

impl Recent {
    /// Notes an event. `fields` is an object of a few short values. Waits for nobody.
    pub fn note(&self, kind: Kind, what: &str, fields: Value) {
        let mut events = self.lock();
        let number = *self.last.borrow() + 1;
        while events.len() >= KEPT {
            events.pop_front();
        }
        let fields = shortened(fields);
        events.push_back(Event { number, at_ms: now_ms(), kind, what: short(what), fields });
        self.last.send_replace(number);
    }

    /// The events after number `after`, the oldest first, at most `most`. When some of them are forgotten, the first number is not the next one.
    pub fn after(&self, after: u64, most: usize) -> Vec<Event> {
        let events = self.lock();
        let first = events.front().map_or(0, |event| event.number);
        // Both far below the ring's length, or at its end.
        let skip = (after.saturating_add(1)).saturating_sub(first).min(events.len() as u64) as usize;
        events.iter().skip(skip).take(most).cloned().collect()
    }

    /// The number of the last one; 0 if there is none.
    pub fn last(&self) -> u64 {
        *self.last.borrow()
    }

    /// Waits until there is one after number `after`.
    pub async fn grown(&self, after: u64) {
        // The sender is in self, so it cannot be gone.
        let _ = self.last.subscribe().wait_for(|last| *last > after).await;
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.events.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn short(text: &str) -> String {
    text[..text.floor_char_boundary(LONGEST)].to_owned()
}

fn shortened(mut fields: Value) -> Value {
    for value in fields.as_object_mut().into_iter().flat_map(|fields| fields.values_mut()) {
        if let Value::String(text) = value {
            text.truncate(text.floor_char_boundary(LONGEST));
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
    fn each_follower_gets_what_comes_after_what_it_has() {
        let recent = Recent::default();
        assert!(recent.after(0, 10).is_empty() && recent.last() == 0);
        for n in 1..=KEPT as u64 + 10 {
            recent.note(Kind::Task, &format!("event {n}"), json!({}));
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
        for (after, most, wanted) in table {
            assert_eq!(numbers(&recent.after(after, most)), wanted, "after {after}");
        }
        assert_eq!(recent.after(0, usize::MAX).len(), KEPT);
    }

    #[test]
    fn what_is_kept_of_an_event_is_bounded() {
        let recent = Recent::default();
        recent.note(Kind::Vm, &"ä".repeat(10_000), json!({"cause": "x".repeat(10_000), "pid": 7}));
        let event = &recent.after(0, 1)[0];
        assert_eq!((event.what.len(), event.fields["cause"].as_str().unwrap().len()), (LONGEST, LONGEST));
        assert_eq!(event.fields["pid"], 7);
    }

    #[tokio::test]
    async fn a_follower_is_woken() {
        let recent = Recent::default();
        let follower = tokio::spawn({
            let recent = recent.clone();
            async move { recent.grown(1).await }
        });
        recent.note(Kind::Vm, "one", json!({}));
        tokio::task::yield_now().await;
        assert!(!follower.is_finished());
        recent.note(Kind::Vm, "two", json!({}));
        tokio::time::timeout(std::time::Duration::from_secs(10), follower).await.expect("woken").unwrap();
    }
}
