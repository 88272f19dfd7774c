//! Forwards the guest's events to their containers. Events are numbered and the guest keeps them: if the stream ends
//! while the VM runs, the shim reopens it after the last event received. If events are lost for good, the shim kills
//! the VM, because the state of its containers is unknown.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use husk_protos::chain::Chain;
use husk_protos::events::Event;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::time::Instant;

use crate::guest::client::{Guest, GuestError, Metering};
use crate::host::rate::{Admitted, Bucket};
use crate::sandbox::container::guest_event;
use crate::sandbox::container::guest_event::{GuestEvent, InvalidEvent};
use crate::sandbox::container::order::IllegalEvent;
use crate::sandbox::registry::Sandbox;
use crate::vm::Vm;

/// How often the stream may end without an event in between. Usually it ends because the VM has died, and the shim
/// notices the death a little later: the pauses between the attempts add up to far more than that delay.
const ATTEMPTS: u32 = 5;
/// Pause before the first attempt to reopen the stream. Each further pause is twice as long.
const PAUSE: Duration = Duration::from_millis(100);
/// Time limit for reading the events that a dead VM has sent: they are all in the host's buffers.
const LAST_EVENTS: Duration = Duration::from_secs(1);
/// Rejected events that are logged at once, and per second in the long run: a hostile guest cannot fill the host's log.
const LOGGED: (f64, f64) = (4.0, 1.0 / 60.0);

/// Why the guest's events are lost.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EventLoss {
    #[error("the guest has dropped its events up to number {dropped}, the last one received is {last}")]
    Gap { last: u64, dropped: u64 },
    #[error("event {number} follows event {last}")]
    Number { last: u64, number: u64 },
    #[error("the stream ended {ATTEMPTS} times after event {last}; the last error: {problem}")]
    Stream { last: u64, problem: String },
}

/// Checks that `event` follows event number `last`.
pub(crate) fn check_sequence(last: u64, event: &Event) -> Result<(), EventLoss> {
    match event.sequence {
        // An event without a topic reports that the guest has dropped events.
        dropped if event.topic.is_empty() => Err(EventLoss::Gap { last, dropped }),
        number if Some(number) == last.checked_add(1) => Ok(()),
        number => Err(EventLoss::Number { last, number }),
    }
}

/// A stream of events that can be reopened.
#[async_trait]
trait EventStream: Send {
    /// The next event; `None` at the end of the stream. If no stream is open, opens one that begins after number
    /// `after`, or returns `None` if `after` is `None`.
    async fn next(&mut self, after: Option<u64>) -> Result<Option<Event>, GuestError>;
}

struct Subscription {
    guest: Arc<Guest>,
    stream: Option<Metering<Event>>,
}

#[async_trait]
impl EventStream for Subscription {
    async fn next(&mut self, after: Option<u64>) -> Result<Option<Event>, GuestError> {
        let stream = match (&mut self.stream, after) {
            (Some(stream), _) => stream,
            (None, Some(after)) => self.stream.insert(self.guest.events(after).await?),
            (None, None) => return Ok(None),
        };
        let next = stream.recv().await;
        if !matches!(next, Ok(Some(_))) {
            self.stream = None;
        }
        Ok(next?)
    }
}

/// Reads every event once, in order.
struct Follower<S> {
    stream: S,
    /// The number of the last event.
    last: u64,
    /// How often the stream has ended since the last event.
    ends: u32,
}

impl<S: EventStream> Follower<S> {
    fn new(stream: S) -> Self {
        Self { stream, last: 0, ends: 0 }
    }

    /// The next event; reopens the stream if necessary. Cancel-safe.
    async fn next(&mut self) -> Result<Event, EventLoss> {
        loop {
            let problem = match self.stream.next(Some(self.last)).await {
                Ok(Some(event)) => return self.accept(event),
                Ok(None) => "the guest closed the stream".to_owned(),
                Err(error) => Chain(&error).to_string(),
            };
            self.ends += 1;
            if self.ends > ATTEMPTS {
                return Err(EventLoss::Stream { last: self.last, problem });
            }
            tracing::debug!(last = self.last, problem, "the guest's stream of events ended");
            tokio::time::sleep(PAUSE * 2u32.pow(self.ends - 1)).await;
        }
    }

    /// The next event that a dead guest has sent.
    async fn next_of_dead_guest(&mut self) -> Option<Event> {
        let event = self.stream.next(None).await.ok()??;
        self.accept(event).ok()
    }

    fn accept(&mut self, event: Event) -> Result<Event, EventLoss> {
        check_sequence(self.last, &event)?;
        self.last = event.sequence;
        self.ends = 0;
        Ok(event)
    }
}

/// The guest's events that are dropped. The first are logged; later ones are counted in a line from time to time, and
/// in one at the end.
struct Rejections {
    invalid: Bucket,
    /// Separate, because a guest that does nothing wrong may report processes that are gone.
    unknown: Bucket,
    total: u64,
}

impl Rejections {
    fn new(now: Instant) -> Self {
        let bucket = || Bucket::new(LOGGED.0, LOGGED.1, now);
        Self { invalid: bucket(), unknown: bucket(), total: 0 }
    }

    fn reject(&mut self, sequence: u64, rejected: &Rejected) {
        let error = Chain(rejected);
        // For example of a container whose creation timed out and that was deleted then.
        if matches!(rejected, Rejected::Invalid(InvalidEvent::UnknownProcess { .. })) {
            if let Admitted::Yes { held_back } = self.unknown.admit(Instant::now()) {
                tracing::debug!(sequence, %error, not_logged = held_back, "dropped an event of the guest");
            }
            return;
        }
        self.total += 1;
        if let Admitted::Yes { held_back } = self.invalid.admit(Instant::now()) {
            tracing::warn!(sequence, %error, not_logged = held_back, "rejected an event of the guest");
        }
    }
}

impl Drop for Rejections {
    fn drop(&mut self) {
        if self.invalid.held_back() > 0 {
            let (total, not_logged) = (self.total, self.invalid.held_back());
            tracing::warn!(total, not_logged, "rejected more events of the guest than are logged");
        }
    }
}

/// Why an event is dropped.
#[derive(Debug, thiserror::Error)]
enum Rejected {
    #[error(transparent)]
    Invalid(#[from] InvalidEvent),
    #[error("{topic} of container {container:?}, exec {exec:?}")]
    Illegal { topic: String, container: String, exec: String, source: IllegalEvent },
}

impl Sandbox {
    /// Forwards the guest's events to their containers until the VM is dead, then records the end of all containers.
    /// `last` is the number of the last event that somebody else has read.
    pub(super) async fn forward_events(self: Arc<Self>, vm: Arc<Vm>, events: Metering<Event>, last: u64) {
        let mut follower = Follower::new(Subscription { guest: vm.guest.clone(), stream: Some(events) });
        follower.last = last;
        let mut rejections = Rejections::new(Instant::now());
        let cause = loop {
            tokio::select! {
                next = follower.next() => match next {
                    Ok(event) => self.forward_event(event, &mut rejections).await,
                    Err(lost) => {
                        vm.fail(format!("the guest's events are lost: {}", Chain(&lost)));
                        break vm.died().await;
                    }
                },
                cause = vm.died() => break cause,
            }
        };
        let rest = async {
            while let Some(event) = follower.next_of_dead_guest().await {
                self.forward_event(event, &mut rejections).await;
            }
        };
        if tokio::time::timeout(LAST_EVENTS, rest).await.is_err() {
            tracing::warn!("the VM's last events were not read in time");
        }
        // Once the exits are known, a client may stop the VM.
        let stopping = vm.stopping();
        for container in self.containers() {
            container.vm_died(Timestamp::now());
        }
        if !stopping {
            let processes = vm.last_words().await;
            tracing::error!(cause, console = vm.console_tail(), processes, "the VM died");
        }
        // Last: it writes a file, and the exits must not wait for that.
        self.record_vm_death(&cause);
    }

    /// Forwards one event, or drops it. Waits for nothing but space in the publisher's queue.
    async fn forward_event(&self, event: Event, rejections: &mut Rejections) {
        if let Err(rejected) = self.try_forward(&event).await {
            rejections.reject(event.sequence, &rejected);
        }
    }

    async fn try_forward(&self, event: &Event) -> Result<(), Rejected> {
        let exists = |container: &str, exec: &str| self.process(container, exec).is_ok();
        let now = Timestamp::now();
        let GuestEvent { container, at, change } = guest_event::parse(event, &now, exists)?;
        // The container may have been deleted since. Then nobody needs the event.
        let Ok(container) = self.container(&container) else { return Ok(()) };
        container.admit(&change).map_err(|source| Rejected::Illegal {
            topic: event.topic.clone(),
            container: container.id.clone(),
            exec: change.exec().to_owned(),
            source,
        })?;
        container.apply(change, at.unwrap_or(now)).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn event(sequence: u64) -> Event {
        Event { sequence, topic: "/tasks/oom".into(), ..Default::default() }
    }

    fn gap(sequence: u64) -> Event {
        Event { sequence, ..Default::default() }
    }

    #[test]
    fn a_missing_or_repeated_number_is_a_loss() {
        let table = [
            (0, event(1), Ok(())),
            (7, event(8), Ok(())),
            (7, event(9), Err(EventLoss::Number { last: 7, number: 9 })),
            (7, event(7), Err(EventLoss::Number { last: 7, number: 7 })),
            (7, event(0), Err(EventLoss::Number { last: 7, number: 0 })),
            (u64::MAX, event(0), Err(EventLoss::Number { last: u64::MAX, number: 0 })),
            (7, gap(9), Err(EventLoss::Gap { last: 7, dropped: 9 })),
            (7, gap(8), Err(EventLoss::Gap { last: 7, dropped: 8 })),
        ];
        for (last, event, expected) in table {
            assert_eq!(check_sequence(last, &event), expected, "{last} {event:?}");
        }
    }

    /// Streams, each with the number after which it must be opened and its events.
    struct Streams {
        streams: VecDeque<(u64, Vec<Event>)>,
        current: Option<VecDeque<Event>>,
    }

    #[async_trait]
    impl EventStream for Streams {
        async fn next(&mut self, after: Option<u64>) -> Result<Option<Event>, GuestError> {
            if self.current.is_none() && after.is_some() {
                let refused = || ttrpc::Error::Others("connection refused".to_owned());
                let (begin, events) = self.streams.pop_front().ok_or_else(refused)?;
                assert_eq!(after, Some(begin));
                self.current = Some(events.into());
            }
            let next = self.current.as_mut().and_then(VecDeque::pop_front);
            if next.is_none() {
                self.current = None;
            }
            Ok(next)
        }
    }

    fn follow<const N: usize>(streams: [(u64, Vec<Event>); N]) -> Follower<Streams> {
        Follower::new(Streams { streams: streams.into(), current: None })
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_ends_is_reopened_after_the_last_event() {
        let empty = |after| (after, Vec::new());
        let mut follower = follow([
            (0, vec![event(1), event(2)]),
            empty(2),
            empty(2),
            empty(2),
            empty(2),
            (2, vec![event(3)]),
            // The count starts again at each event.
            empty(3),
            empty(3),
            empty(3),
            empty(3),
            (3, vec![event(4)]),
        ]);
        for sequence in 1..=4 {
            assert_eq!(follower.next().await, Ok(event(sequence)));
        }
        let problem = "connection refused".to_owned();
        let lost = follower.next().await.unwrap_err();
        assert!(matches!(&lost, EventLoss::Stream { last: 4, problem: last } if last.contains(&problem)), "{lost:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn events_of_a_dead_guest_are_read_without_reopening_the_stream() {
        let mut follower = follow([(0, vec![event(1), event(2), event(3)]), (3, vec![event(4)])]);
        assert_eq!(follower.next().await, Ok(event(1)));
        assert_eq!(follower.next_of_dead_guest().await, Some(event(2)));
        assert_eq!(follower.next_of_dead_guest().await, Some(event(3)));
        assert_eq!(follower.next_of_dead_guest().await, None);
        assert_eq!(follower.next_of_dead_guest().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_gap_is_a_loss() {
        let mut follower = follow([(0, vec![event(1)]), (1, vec![gap(5), event(6)])]);
        assert_eq!(follower.next().await, Ok(event(1)));
        assert_eq!(follower.next().await, Err(EventLoss::Gap { last: 1, dropped: 5 }));
    }
}
