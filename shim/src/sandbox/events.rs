//! The guest's events on their way to their containers. They are numbered, and the guest keeps them: when their stream ends while the VM lives,
//! it is taken up again where it stopped. A VM of which some are lost for good is ended, because what its containers do is not known any more.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use husk_protos::events::Event;

use crate::guest::client::{Guest, GuestError, Metering};
use crate::sandbox::container::guest_event as told;
use crate::sandbox::container::guest_event::Refused;
use crate::sandbox::{Sandbox, now};
use crate::vm::Vm;

/// Attempts to take the stream up again, without an event between them. Their pauses add up to far more than the end of a VM takes to be noticed
/// after that of its connections: that is the usual reason.
const ATTEMPTS: u32 = 5;
/// Pause before the first of them; each is twice the one before.
const PAUSE: Duration = Duration::from_millis(100);
/// How long what a VM that is gone has still sent may take to be read: it is all on this side of the connection.
const LAST_EVENTS: Duration = Duration::from_secs(1);
/// Events that are refused with a warning each. A guest that goes on has made its point, and shall not fill the host's log.
const WARNINGS: u32 = 16;

/// Why what happens in a guest is not known any more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Lost {
    #[error("those up to number {forgotten} are forgotten, and only {last} had come")]
    Gap { last: u64, forgotten: u64 },
    #[error("after number {last} came {number}")]
    Number { last: u64, number: u64 },
    #[error("their stream ended {ATTEMPTS} times after number {last}, at last because {problem}")]
    Stream { last: u64, problem: String },
}

/// What follows the event of number `last` is the next one, or some are missing.
fn check(last: u64, event: &Event) -> Result<(), Lost> {
    match event.sequence {
        forgotten if event.topic.is_empty() => Err(Lost::Gap { last, forgotten }),
        number if Some(number) == last.checked_add(1) => Ok(()),
        number => Err(Lost::Number { last, number }),
    }
}

/// Where events come from.
#[async_trait]
trait Source: Send {
    /// The next event; none at the stream's end. Without a stream, one is opened that begins after number `after`; or if that is none, this is an
    /// end too.
    async fn next(&mut self, after: Option<u64>) -> Result<Option<Event>, GuestError>;
}

struct Subscription {
    guest: Arc<Guest>,
    stream: Option<Metering<Event>>,
}

#[async_trait]
impl Source for Subscription {
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
    source: S,
    last: u64,
    /// Ends of the stream since an event came.
    ends: u32,
}

impl<S: Source> Follower<S> {
    fn new(source: S) -> Self {
        Self { source, last: 0, ends: 0 }
    }

    /// The next event, however many streams it takes. May be dropped while it waits, and called again.
    async fn next(&mut self) -> Result<Event, Lost> {
        loop {
            let problem = match self.source.next(Some(self.last)).await {
                Ok(Some(event)) => return self.take(event),
                Ok(None) => "the guest closed it".to_owned(),
                Err(error) => error.to_string(),
            };
            self.ends += 1;
            if self.ends > ATTEMPTS {
                return Err(Lost::Stream { last: self.last, problem });
            }
            tracing::debug!(last = self.last, problem, "the stream of events ended");
            tokio::time::sleep(PAUSE * 2u32.pow(self.ends - 1)).await;
        }
    }

    /// The next of those that came before the guest was gone.
    async fn left(&mut self) -> Option<Event> {
        let event = self.source.next(None).await.ok()??;
        self.take(event).ok()
    }

    fn take(&mut self, event: Event) -> Result<Event, Lost> {
        check(self.last, &event)?;
        self.last = event.sequence;
        self.ends = 0;
        Ok(event)
    }
}

impl Sandbox {
    /// Carries the guest's events to their containers until the VM is gone; then tells the containers.
    pub(super) async fn route_events(self: Arc<Self>, vm: Arc<Vm>, events: Metering<Event>) {
        let mut follower = Follower::new(Subscription { guest: vm.guest.clone(), stream: Some(events) });
        let mut refused = 0;
        let cause = loop {
            tokio::select! {
                next = follower.next() => match next {
                    Ok(event) => self.route(event, &mut refused).await,
                    Err(lost) => {
                        vm.fail(format!("the guest's events are lost: {lost}"));
                        break vm.died().await;
                    }
                },
                cause = vm.died() => break cause,
            }
        };
        let rest = async {
            while let Some(event) = follower.left().await {
                self.route(event, &mut refused).await;
            }
        };
        if tokio::time::timeout(LAST_EVENTS, rest).await.is_err() {
            tracing::warn!("the last events of the VM are left unread");
        }
        if !vm.stopping() {
            tracing::error!(cause, console = vm.console_tail(), "the VM died");
        }
        for container in self.containers() {
            container.died(now());
        }
        // Last: the exits wait for no file.
        self.vm_died(&cause);
    }

    /// Waits for nobody but the publisher.
    async fn route(&self, event: Event, refused: &mut u32) {
        let knows = |container: &str, exec: &str| self.process(container, exec).is_ok();
        match told::read(&event, knows) {
            Ok(told) => {
                // It may be on its way out, but then nobody asks for what is told of it.
                if let Ok(container) = self.container(&told.container) {
                    container.told(told.news, told.at.unwrap_or_else(now)).await;
                }
            }
            // As of a container that was not created in time, and was deleted then.
            Err(gone @ Refused::Unknown { .. }) => tracing::debug!(sequence = event.sequence, %gone, "event not told"),
            Err(problem) => {
                *refused += 1;
                if *refused <= WARNINGS {
                    tracing::warn!(sequence = event.sequence, %problem, last = *refused == WARNINGS, "an event of the guest's is not believed");
                }
            }
        }
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
    fn numbers_follow_each_other_or_something_is_lost() {
        let table = [
            (0, event(1), Ok(())),
            (7, event(8), Ok(())),
            (7, event(9), Err(Lost::Number { last: 7, number: 9 })),
            (7, event(7), Err(Lost::Number { last: 7, number: 7 })),
            (7, event(0), Err(Lost::Number { last: 7, number: 0 })),
            (u64::MAX, event(0), Err(Lost::Number { last: u64::MAX, number: 0 })),
            (7, gap(9), Err(Lost::Gap { last: 7, forgotten: 9 })),
            (7, gap(8), Err(Lost::Gap { last: 7, forgotten: 8 })),
        ];
        for (last, event, wanted) in table {
            assert_eq!(check(last, &event), wanted, "{last} {event:?}");
        }
    }

    /// Streams, each with where it has to begin and what comes out of it.
    struct Streams {
        streams: VecDeque<(u64, Vec<Event>)>,
        current: Option<VecDeque<Event>>,
    }

    #[async_trait]
    impl Source for Streams {
        async fn next(&mut self, after: Option<u64>) -> Result<Option<Event>, GuestError> {
            if self.current.is_none() && after.is_some() {
                let refused = || ttrpc::Error::Others("nobody listens".to_owned());
                let (begins, events) = self.streams.pop_front().ok_or_else(refused)?;
                assert_eq!(after, Some(begins));
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
    async fn a_stream_that_ends_is_taken_up_where_it_stopped() {
        let nothing = |after| (after, Vec::new());
        let mut follower = follow([
            (0, vec![event(1), event(2)]),
            nothing(2),
            nothing(2),
            nothing(2),
            nothing(2),
            (2, vec![event(3)]),
            // Counted from the last event, so none of these is one too many.
            nothing(3),
            nothing(3),
            nothing(3),
            nothing(3),
            (3, vec![event(4)]),
        ]);
        for sequence in 1..=4 {
            assert_eq!(follower.next().await, Ok(event(sequence)));
        }
        let problem = "nobody listens".to_owned();
        let lost = follower.next().await.unwrap_err();
        assert!(matches!(&lost, Lost::Stream { last: 4, problem: told } if told.contains(&problem)), "{lost:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_before_the_end_of_the_guest_is_read_and_no_more() {
        let mut follower = follow([(0, vec![event(1), event(2), event(3)]), (3, vec![event(4)])]);
        assert_eq!(follower.next().await, Ok(event(1)));
        assert_eq!(follower.left().await, Some(event(2)));
        assert_eq!(follower.left().await, Some(event(3)));
        assert_eq!(follower.left().await, None);
        assert_eq!(follower.left().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_gap_is_not_passed_over() {
        let mut follower = follow([(0, vec![event(1)]), (1, vec![gap(5), event(6)])]);
        assert_eq!(follower.next().await, Ok(event(1)));
        assert_eq!(follower.next().await, Err(Lost::Gap { last: 1, forgotten: 5 }));
    }
}
