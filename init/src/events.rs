//! What happened in the guest: a numbered ring that a subscriber can read from where it left off.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use husk_protos::events::Event;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

/// Events that are kept for a subscriber that was away. About 150 bytes each.
const KEPT: usize = 4096;

/// Package of containerd's event messages.
const PACKAGE: &str = "containerd.events";

/// The ring, and the number of its newest event for who waits for the next.
#[derive(Debug)]
pub struct Events {
    ring: Mutex<Ring>,
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    kept: VecDeque<Event>,
    newest: u64,
}

/// What a subscriber gets next.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// This event, whose number is the one after the subscriber's, or that tells of a gap.
    Event(Box<Event>),
    /// It has them all.
    Nothing,
    /// Its number is one that was never given.
    Unknown,
}

impl Default for Events {
    fn default() -> Self {
        Self { ring: Mutex::default(), newest: watch::Sender::new(0) }
    }
}

impl Events {
    /// Numbers an event, one of containerd's, and keeps it. Never waits for anybody.
    pub fn publish<M: Message>(&self, topic: &str, event: &M) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(topic, %error, "encode event"),
        };
        // Not from the message's descriptor: parsing one costs millions of instructions.
        let any = Any { type_url: format!("{PACKAGE}.{}", M::NAME), value, ..Default::default() };
        let newest = {
            let mut ring = self.ring();
            ring.push(topic, any, KEPT);
            ring.newest
        };
        self.newest.send_replace(newest);
    }

    /// What follows the event of number `after`.
    pub fn next(&self, after: u64) -> Next {
        self.ring().next(after)
    }

    /// Changes with each new event.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Ring {
    fn push(&mut self, topic: &str, event: Any, most: usize) {
        self.newest += 1;
        self.kept.push_back(Event {
            sequence: self.newest,
            timestamp: Some(Timestamp::now()).into(),
            topic: topic.into(),
            event: Some(event).into(),
            ..Default::default()
        });
        if self.kept.len() > most {
            self.kept.pop_front();
        }
    }

    fn next(&self, after: u64) -> Next {
        if after >= self.newest {
            return if after == self.newest { Next::Nothing } else { Next::Unknown };
        }
        let oldest = self.newest - self.kept.len() as u64 + 1;
        if after + 1 < oldest {
            return Next::Event(Box::new(Event { sequence: oldest - 1, ..Default::default() }));
        }
        match self.kept.get((after + 1 - oldest) as usize) {
            Some(event) => Next::Event(Box::new(event.clone())),
            None => Next::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(next: Next) -> Option<(u64, String)> {
        match next {
            Next::Event(event) => Some((event.sequence, event.topic)),
            _ => None,
        }
    }

    #[test]
    fn a_subscriber_gets_what_it_missed_or_is_told_of_a_gap() {
        let mut ring = Ring::default();
        assert_eq!(ring.next(0), Next::Nothing);
        assert_eq!(ring.next(1), Next::Unknown);
        for topic in ["a", "b", "c", "d", "e"] {
            ring.push(topic, Any::new(), 3);
        }
        let got = |after| sequence(ring.next(after));
        assert_eq!(got(0), Some((2, String::new())), "1 and 2 are forgotten");
        assert_eq!(got(1), Some((2, String::new())));
        assert_eq!(got(2), Some((3, "c".into())));
        assert_eq!(got(3), Some((4, "d".into())));
        assert_eq!(got(4), Some((5, "e".into())));
        assert_eq!(ring.next(5), Next::Nothing);
        assert_eq!(ring.next(6), Next::Unknown);
    }

    #[test]
    fn an_event_carries_containerds_full_type_name() {
        let events = Events::default();
        let exit = containerd_shim_protos::events::task::TaskExit { exit_status: 7, ..Default::default() };
        events.publish("/tasks/exit", &exit);
        let Next::Event(event) = events.next(0) else { panic!("no event") };
        assert_eq!(
            (event.topic.as_str(), event.event.type_url.as_str()),
            ("/tasks/exit", "containerd.events.TaskExit")
        );
        assert_eq!(*events.newest().borrow(), 1);
    }
}
