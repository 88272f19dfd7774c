//! When the agent is started, again, and no more. Pure: it is told what happens and when, and answers what is to be done.

use std::collections::VecDeque;
use std::time::Duration;

use husk_protos::extras::SUPERVISOR_GRACE;

/// Waits before the restarts in a row; the last one stays. Seconds.
const WAITS: [u64; 6] = [1, 2, 4, 8, 16, 30];
/// In any such time there are at most [`RESTARTS_MAX`] restarts; and who has run as long is stable: what was before is forgotten.
pub const WINDOW: Duration = Duration::from_secs(5 * 60);
/// Restarts inside a window.
pub const RESTARTS_MAX: usize = 10;

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It runs.
    Started,
    /// It could not be started.
    StartFailed,
    /// It has ended.
    Ended,
    /// The time is over that [`Step::Wait`] or [`Step::Terminate`] has named.
    Elapsed,
    /// The guest ends.
    Stop,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// To start it.
    Start,
    /// To wait for its end.
    Watch,
    /// To wait so long.
    Wait(Duration),
    /// To do without it until the guest ends.
    GiveUp,
    /// To ask it to end, and to wait for that so long.
    Terminate(Duration),
    /// To kill it, and to wait for its end.
    Kill,
    /// Nothing more, ever.
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Starting,
    Running { since: Duration },
    Waiting,
    GivenUp,
    Terminating,
    Killing,
    Over,
}

/// The agent's life so far. Times are since any one moment.
#[derive(Debug)]
pub struct Policy {
    state: State,
    /// Restarts without stable running in between.
    in_a_row: usize,
    /// When the last restarts were, or will be.
    restarts: VecDeque<Duration>,
}

impl Policy {
    /// Of an agent that is to be started now.
    pub fn new() -> (Self, Step) {
        (Self { state: State::Starting, in_a_row: 0, restarts: VecDeque::new() }, Step::Start)
    }

    /// Restarts inside the present window.
    pub fn restarts(&self) -> usize {
        self.restarts.len()
    }

    /// What follows from what has happened `now`; nothing if it cannot have happened.
    pub fn next(&mut self, event: Event, now: Duration) -> Option<Step> {
        let (state, step) = match (self.state, event) {
            (State::Starting, Event::Started) => (State::Running { since: now }, Step::Watch),
            (State::Starting, Event::StartFailed) => self.failed(now),
            (State::Running { since }, Event::Ended) => {
                if now.saturating_sub(since) >= WINDOW {
                    self.in_a_row = 0;
                    self.restarts.clear();
                }
                self.failed(now)
            }
            (State::Running { .. }, Event::Stop) => (State::Terminating, Step::Terminate(SUPERVISOR_GRACE)),
            (State::Waiting, Event::Elapsed) => (State::Starting, Step::Start),
            (State::Terminating, Event::Elapsed) => (State::Killing, Step::Kill),
            (State::Starting | State::Waiting | State::GivenUp, Event::Stop) => (State::Over, Step::Done),
            (State::Terminating | State::Killing, Event::Ended) => (State::Over, Step::Done),
            _ => return None,
        };
        self.state = state;
        Some(step)
    }

    fn failed(&mut self, now: Duration) -> (State, Step) {
        let wait = Duration::from_secs(WAITS[self.in_a_row.min(WAITS.len() - 1)]);
        let restart = now + wait;
        while self.restarts.front().is_some_and(|earlier| *earlier + WINDOW <= restart) {
            self.restarts.pop_front();
        }
        if self.restarts.len() == RESTARTS_MAX {
            return (State::GivenUp, Step::GiveUp);
        }
        self.restarts.push_back(restart);
        self.in_a_row += 1;
        (State::Waiting, Step::Wait(wait))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A life under a clock of its own: what happens, how many seconds after what happened before, and what is to be done then.
    fn live(script: &[(Event, u64, Option<Step>)]) -> Policy {
        let (mut policy, first) = Policy::new();
        assert_eq!(first, Step::Start);
        let mut clock = Duration::ZERO;
        for (index, (event, after, wanted)) in script.iter().enumerate() {
            clock += Duration::from_secs(*after);
            assert_eq!(policy.next(*event, clock), *wanted, "step {index}: {event:?} at {clock:?}, {script:?}");
        }
        policy
    }

    fn wait(seconds: u64) -> Option<Step> {
        Some(Step::Wait(Duration::from_secs(seconds)))
    }

    /// An agent that runs for `ran` seconds each time, waited for so long before each restart.
    fn runs(ran: u64, waits: &[u64]) -> Vec<(Event, u64, Option<Step>)> {
        let mut script = vec![(Event::Started, 0, Some(Step::Watch))];
        for seconds in waits {
            script.push((Event::Ended, ran, wait(*seconds)));
            script.push((Event::Elapsed, *seconds, Some(Step::Start)));
            script.push((Event::Started, 0, Some(Step::Watch)));
        }
        script
    }

    const TEN: [u64; 10] = [1, 2, 4, 8, 16, 30, 30, 30, 30, 30];

    #[test]
    fn one_that_ends_at_once_is_started_ten_times_more_and_then_given_up() {
        let mut script = runs(0, &TEN);
        script.push((Event::Ended, 0, Some(Step::GiveUp)));
        assert_eq!(live(&script).restarts(), 10);
    }

    #[test]
    fn a_start_that_fails_counts_as_an_end() {
        let mut script = Vec::new();
        for seconds in TEN {
            script.push((Event::StartFailed, 0, wait(seconds)));
            script.push((Event::Elapsed, seconds, Some(Step::Start)));
        }
        script.push((Event::StartFailed, 0, Some(Step::GiveUp)));
        live(&script);

        let mixed = [
            (Event::StartFailed, 0, wait(1)),
            (Event::Elapsed, 1, Some(Step::Start)),
            (Event::Started, 0, Some(Step::Watch)),
            (Event::Ended, 0, wait(2)),
            (Event::Elapsed, 2, Some(Step::Start)),
            (Event::StartFailed, 0, wait(4)),
        ];
        assert_eq!(live(&mixed).restarts(), 3);
    }

    #[test]
    fn ten_restarts_count_only_inside_a_window() {
        // Restarts are 60 s apart, so no window ever has more than five.
        let slow = [&[1, 2, 4, 8, 16][..], &[30; 40]].concat();
        assert!(live(&runs(30, &slow)).restarts() <= 5);
        // The eleventh would be 12 s + 30 s after the tenth: 300 s after the first, and so no longer in its window.
        let edge = |last_run| {
            let mut script = runs(0, &TEN);
            script.push((Event::Ended, last_run, if last_run < 90 { Some(Step::GiveUp) } else { wait(30) }));
            live(&script)
        };
        // The first was at 1 s, the tenth at 181 s.
        assert_eq!(edge(89).restarts(), 10);
        assert_eq!(edge(90).restarts(), 10);
        assert_eq!(edge(92).restarts(), 9);
    }

    #[test]
    fn who_has_run_stably_begins_anew() {
        let mut script = runs(0, &TEN);
        script.extend([(Event::Ended, 300, wait(1)), (Event::Elapsed, 1, Some(Step::Start))]);
        assert_eq!(live(&script).restarts(), 1);
        // A second less is not stable: the waits stay long.
        let mut script = runs(0, &TEN);
        script.push((Event::Ended, 299, wait(30)));
        live(&script);
        // And being started does not count as running.
        let mut script = runs(0, &TEN[..3]);
        script.pop();
        script.extend([(Event::StartFailed, 400, wait(8))]);
        live(&script);
    }

    #[test]
    fn the_end_of_the_guest_is_asked_for_then_insisted_on() {
        let terminate = Some(Step::Terminate(Duration::from_secs(5)));
        let table: &[&[(Event, u64, Option<Step>)]] = &[
            // Willing, and deaf.
            &[(Event::Started, 0, Some(Step::Watch)), (Event::Stop, 9, terminate), (Event::Ended, 1, Some(Step::Done))],
            &[
                (Event::Started, 0, Some(Step::Watch)),
                (Event::Stop, 9, terminate),
                (Event::Elapsed, 5, Some(Step::Kill)),
                (Event::Ended, 0, Some(Step::Done)),
            ],
            // During a wait; what comes after it starts nothing.
            &[
                (Event::Started, 0, Some(Step::Watch)),
                (Event::Ended, 0, wait(1)),
                (Event::Stop, 0, Some(Step::Done)),
                (Event::Elapsed, 1, None),
                (Event::Stop, 1, None),
            ],
            &[(Event::StartFailed, 0, wait(1)), (Event::Stop, 0, Some(Step::Done)), (Event::Elapsed, 1, None)],
            // Before it is started at all.
            &[(Event::Stop, 0, Some(Step::Done)), (Event::Started, 0, None)],
        ];
        for script in table {
            live(script);
        }
        let mut given_up = runs(0, &TEN);
        given_up.extend([(Event::Ended, 0, Some(Step::GiveUp)), (Event::Stop, 1000, Some(Step::Done))]);
        live(&given_up);
    }
}
