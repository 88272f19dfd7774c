//! Restart policy of the supervisor agent: backoff with a restart limit. Pure: it maps what happened and when to the
//! next action.

use std::collections::VecDeque;
use std::time::Duration;

use husk_protos::extras::SUPERVISOR_GRACE;

/// Pauses before consecutive restarts, seconds. The last one repeats.
const RESTART_BACKOFF: [u64; 6] = [1, 2, 4, 8, 16, 30];
/// Any window of this length contains at most [`RESTARTS_MAX`] restarts. An agent that has run for as long is stable:
/// backoff and restart count start over.
pub(super) const WINDOW: Duration = Duration::from_secs(5 * 60);
/// Most restarts within a window.
pub(super) const RESTARTS_MAX: usize = 10;

/// What happened to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AgentEvent {
    Started,
    StartFailed,
    Exited,
    /// The time of [`Action::Pause`] or [`Action::Terminate`] is over.
    Elapsed,
    /// The guest is shutting down.
    Stop,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Start,
    /// Wait for the agent's exit.
    Watch,
    /// Wait before the next start.
    Pause(Duration),
    /// Run no agent until the guest shuts down.
    GiveUp,
    /// Send SIGTERM and wait this long for the exit.
    Terminate(Duration),
    /// Kill the agent and wait for its exit.
    Kill,
    /// Nothing more.
    Finish,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Starting,
    Running { since: Duration },
    Paused,
    GivenUp,
    Terminating,
    Killing,
    Finished,
}

/// The state of the agent and its recent restarts. All times count from the same arbitrary moment.
#[derive(Debug)]
pub(super) struct Policy {
    state: State,
    /// Restarts since the agent last ran stably.
    consecutive: usize,
    /// Times of the restarts within the window. The last one may be in the future.
    restarts: VecDeque<Duration>,
}

impl Policy {
    /// The initial state and the first action.
    pub(super) fn new() -> (Self, Action) {
        (Self { state: State::Starting, consecutive: 0, restarts: VecDeque::new() }, Action::Start)
    }

    /// Restarts within the current window.
    pub(super) fn restarts(&self) -> usize {
        self.restarts.len()
    }

    /// The action after an event at time `now`. None when the event is impossible in the current state.
    pub(super) fn next(&mut self, event: AgentEvent, now: Duration) -> Option<Action> {
        let (state, action) = match (self.state, event) {
            (State::Starting, AgentEvent::Started) => (State::Running { since: now }, Action::Watch),
            (State::Starting, AgentEvent::StartFailed) => self.restart_later(now),
            (State::Running { since }, AgentEvent::Exited) => {
                if now.saturating_sub(since) >= WINDOW {
                    self.consecutive = 0;
                    self.restarts.clear();
                }
                self.restart_later(now)
            }
            (State::Running { .. }, AgentEvent::Stop) => (State::Terminating, Action::Terminate(SUPERVISOR_GRACE)),
            (State::Paused, AgentEvent::Elapsed) => (State::Starting, Action::Start),
            (State::Terminating, AgentEvent::Elapsed) => (State::Killing, Action::Kill),
            (State::Starting | State::Paused | State::GivenUp, AgentEvent::Stop) => (State::Finished, Action::Finish),
            (State::Terminating | State::Killing, AgentEvent::Exited) => (State::Finished, Action::Finish),
            _ => return None,
        };
        self.state = state;
        Some(action)
    }

    fn restart_later(&mut self, now: Duration) -> (State, Action) {
        let pause = Duration::from_secs(RESTART_BACKOFF[self.consecutive.min(RESTART_BACKOFF.len() - 1)]);
        let restart = now + pause;
        while self.restarts.front().is_some_and(|earlier| *earlier + WINDOW <= restart) {
            self.restarts.pop_front();
        }
        if self.restarts.len() == RESTARTS_MAX {
            return (State::GivenUp, Action::GiveUp);
        }
        self.restarts.push_back(restart);
        self.consecutive += 1;
        (State::Paused, Action::Pause(pause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a script: an event, the seconds since the previous event, and the expected action.
    fn run(script: &[(AgentEvent, u64, Option<Action>)]) -> Policy {
        let (mut policy, first) = Policy::new();
        assert_eq!(first, Action::Start);
        let mut clock = Duration::ZERO;
        for (index, (event, after, expected)) in script.iter().enumerate() {
            clock += Duration::from_secs(*after);
            assert_eq!(policy.next(*event, clock), *expected, "step {index}: {event:?} at {clock:?}, {script:?}");
        }
        policy
    }

    fn pause(seconds: u64) -> Option<Action> {
        Some(Action::Pause(Duration::from_secs(seconds)))
    }

    /// A script in which the agent runs for `ran` seconds each time, with these pauses before its restarts.
    fn runs(ran: u64, pauses: &[u64]) -> Vec<(AgentEvent, u64, Option<Action>)> {
        let mut script = vec![(AgentEvent::Started, 0, Some(Action::Watch))];
        for seconds in pauses {
            script.push((AgentEvent::Exited, ran, pause(*seconds)));
            script.push((AgentEvent::Elapsed, *seconds, Some(Action::Start)));
            script.push((AgentEvent::Started, 0, Some(Action::Watch)));
        }
        script
    }

    const TEN_PAUSES: [u64; 10] = [1, 2, 4, 8, 16, 30, 30, 30, 30, 30];

    #[test]
    fn an_agent_that_exits_at_once_is_restarted_ten_times_and_then_given_up() {
        let mut script = runs(0, &TEN_PAUSES);
        script.push((AgentEvent::Exited, 0, Some(Action::GiveUp)));
        assert_eq!(run(&script).restarts(), 10);
    }

    #[test]
    fn a_failed_start_counts_as_an_exit() {
        let mut script = Vec::new();
        for seconds in TEN_PAUSES {
            script.push((AgentEvent::StartFailed, 0, pause(seconds)));
            script.push((AgentEvent::Elapsed, seconds, Some(Action::Start)));
        }
        script.push((AgentEvent::StartFailed, 0, Some(Action::GiveUp)));
        run(&script);

        let mixed = [
            (AgentEvent::StartFailed, 0, pause(1)),
            (AgentEvent::Elapsed, 1, Some(Action::Start)),
            (AgentEvent::Started, 0, Some(Action::Watch)),
            (AgentEvent::Exited, 0, pause(2)),
            (AgentEvent::Elapsed, 2, Some(Action::Start)),
            (AgentEvent::StartFailed, 0, pause(4)),
        ];
        assert_eq!(run(&mixed).restarts(), 3);
    }

    #[test]
    fn only_restarts_within_the_window_count() {
        // Restarts are 60 s apart, so no window contains more than five.
        let slow = [&[1, 2, 4, 8, 16][..], &[30; 40]].concat();
        assert!(run(&runs(30, &slow)).restarts() <= 5);
        // The first restart is at 1 s, the tenth at 181 s. The eleventh follows `last_run` + 30 s later; at 301 s or
        // more the first one has left the window.
        let edge = |last_run| {
            let mut script = runs(0, &TEN_PAUSES);
            script.push((AgentEvent::Exited, last_run, if last_run < 90 { Some(Action::GiveUp) } else { pause(30) }));
            run(&script)
        };
        assert_eq!(edge(89).restarts(), 10);
        assert_eq!(edge(90).restarts(), 10);
        assert_eq!(edge(92).restarts(), 9);
    }

    #[test]
    fn backoff_and_count_start_over_after_stable_running() {
        let mut script = runs(0, &TEN_PAUSES);
        script.extend([(AgentEvent::Exited, 300, pause(1)), (AgentEvent::Elapsed, 1, Some(Action::Start))]);
        assert_eq!(run(&script).restarts(), 1);
        // One second less is not stable: the backoff continues.
        let mut script = runs(0, &TEN_PAUSES);
        script.push((AgentEvent::Exited, 299, pause(30)));
        run(&script);
        // Time spent starting does not count as running.
        let mut script = runs(0, &TEN_PAUSES[..3]);
        script.pop();
        script.extend([(AgentEvent::StartFailed, 400, pause(8))]);
        run(&script);
    }

    #[test]
    fn at_shutdown_the_agent_is_terminated_and_then_killed() {
        let terminate = Some(Action::Terminate(Duration::from_secs(5)));
        let table: &[&[(AgentEvent, u64, Option<Action>)]] = &[
            // The agent exits on SIGTERM; the agent ignores SIGTERM.
            &[
                (AgentEvent::Started, 0, Some(Action::Watch)),
                (AgentEvent::Stop, 9, terminate),
                (AgentEvent::Exited, 1, Some(Action::Finish)),
            ],
            &[
                (AgentEvent::Started, 0, Some(Action::Watch)),
                (AgentEvent::Stop, 9, terminate),
                (AgentEvent::Elapsed, 5, Some(Action::Kill)),
                (AgentEvent::Exited, 0, Some(Action::Finish)),
            ],
            // During a pause. Later events start nothing.
            &[
                (AgentEvent::Started, 0, Some(Action::Watch)),
                (AgentEvent::Exited, 0, pause(1)),
                (AgentEvent::Stop, 0, Some(Action::Finish)),
                (AgentEvent::Elapsed, 1, None),
                (AgentEvent::Stop, 1, None),
            ],
            &[
                (AgentEvent::StartFailed, 0, pause(1)),
                (AgentEvent::Stop, 0, Some(Action::Finish)),
                (AgentEvent::Elapsed, 1, None),
            ],
            // Before the first start.
            &[(AgentEvent::Stop, 0, Some(Action::Finish)), (AgentEvent::Started, 0, None)],
        ];
        for script in table {
            run(script);
        }
        let mut given_up = runs(0, &TEN_PAUSES);
        given_up
            .extend([(AgentEvent::Exited, 0, Some(Action::GiveUp)), (AgentEvent::Stop, 1000, Some(Action::Finish))]);
        run(&given_up);
    }
}
