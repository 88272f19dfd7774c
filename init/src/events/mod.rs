//! containerd's task events: a ring of numbered events. A subscriber resumes after the last event that it has.

pub(crate) mod service;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use husk_protos::chain::Chain;
use husk_protos::events::Event;
use husk_protos::lock::lock;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

/// Capacity of the ring, for subscribers that reconnect. An event takes about 150 bytes.
const KEPT: usize = 4096;

/// Package of containerd's event messages.
const PACKAGE: &str = "containerd.events";

/// The guest's events.
#[derive(Debug)]
pub(crate) struct Events {
    ring: Mutex<Ring>,
    /// Number of the newest event. Subscribers wait for it to change.
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    kept: VecDeque<Event>,
    newest: u64,
}

/// What a subscriber receives next.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// The event after the subscriber's last one, or, without a topic, the last event of a gap.
    Event(Box<Event>),
    /// The subscriber has every event.
    Nothing,
    /// No event has had the subscriber's number yet.
    Unknown,
}

impl Default for Events {
    fn default() -> Self {
        Self { ring: Mutex::default(), newest: watch::Sender::new(0) }
    }
}

impl Events {
    /// Adds one of containerd's events to the ring. Never waits for subscribers.
    pub(crate) fn publish<M: Message>(&self, topic: &str, event: &M) {
        self.publish_with_output(topic, event, [0; 2]);
    }

    /// Like [`Self::publish`], with the bytes of stdout and stderr that precede the event.
    pub(crate) fn publish_with_output<M: Message>(&self, topic: &str, event: &M, output: [u64; 2]) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(topic, error = %Chain(&error), "failed to encode an event"),
        };
        // Any::pack would parse the message's descriptor, which costs millions of instructions.
        let any = Any { type_url: format!("{PACKAGE}.{}", M::NAME), value, ..Default::default() };
        self.add(topic, any, output);
    }

    /// Adds an encoded event to the ring.
    pub(crate) fn add(&self, topic: &str, event: Any, output: [u64; 2]) {
        let newest = {
            let mut ring = self.ring();
            ring.push(topic, event, output, KEPT);
            ring.newest
        };
        self.newest.send_replace(newest);
    }

    /// Returns what follows event number `after`.
    pub(crate) fn next(&self, after: u64) -> Next {
        self.ring().next(after)
    }

    /// The number of the newest event, which changes with each event.
    pub(crate) fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        lock(&self.ring)
    }
}

impl Ring {
    fn push(&mut self, topic: &str, event: Any, [stdout_bytes, stderr_bytes]: [u64; 2], capacity: usize) {
        self.newest += 1;
        self.kept.push_back(Event {
            sequence: self.newest,
            timestamp: Some(Timestamp::now()).into(),
            topic: topic.into(),
            event: Some(event).into(),
            stdout_bytes,
            stderr_bytes,
            ..Default::default()
        });
        if self.kept.len() > capacity {
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
    fn a_subscriber_receives_missed_events_or_a_gap() {
        let mut ring = Ring::default();
        assert_eq!(ring.next(0), Next::Nothing);
        assert_eq!(ring.next(1), Next::Unknown);
        for topic in ["a", "b", "c", "d", "e"] {
            ring.push(topic, Any::new(), [0; 2], 3);
        }
        let next = |after| sequence(ring.next(after));
        assert_eq!(next(0), Some((2, String::new())), "events 1 and 2 are no longer in the ring");
        assert_eq!(next(1), Some((2, String::new())));
        assert_eq!(next(2), Some((3, "c".into())));
        assert_eq!(next(3), Some((4, "d".into())));
        assert_eq!(next(4), Some((5, "e".into())));
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
