//! A process of a container, init or exec, and the states that it goes through.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::error::{Error, Kind};
use crate::io::ProcessStreams;
use crate::reaper::Exit;
use crate::worker::client;

/// Where a process is in its life. An exec begins as Added, an init as Created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// An exec that has no process yet.
    Added,
    /// An init that waits for its start.
    Created {
        /// In the guest's pid namespace, as all here.
        pid: i32,
    },
    /// Its start is under way. An exec has no pid yet.
    Starting {
        /// Of an init.
        pid: Option<i32>,
    },
    /// It runs.
    Running {
        /// Its pid.
        pid: i32,
    },
    /// It has ended, or never came to run.
    Stopped {
        /// Zero when it never had one.
        pid: i32,
        /// How it ended.
        exit: Exit,
    },
    /// It is forgotten.
    Deleted,
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A client asked for the start.
    Start,
    /// It was started, with this pid.
    Started(i32),
    /// It has ended, or its start has failed.
    End(Exit),
    /// A client asked for its end as a record.
    Delete,
}

impl State {
    /// The state after `step`.
    ///
    /// # Errors
    /// When the step is not one of this state's.
    pub fn after(self, step: Step) -> Result<Self, Error> {
        match (self, step) {
            (Self::Added, Step::Start) => Ok(Self::Starting { pid: None }),
            (Self::Created { pid }, Step::Start) => Ok(Self::Starting { pid: Some(pid) }),
            (Self::Starting { .. }, Step::Started(pid)) => Ok(Self::Running { pid }),
            // An end during the start is the start's failure: an exit waits until the start is settled.
            (Self::Added | Self::Starting { pid: None }, Step::End(exit)) => Ok(Self::Stopped { pid: 0, exit }),
            (Self::Created { pid } | Self::Starting { pid: Some(pid) } | Self::Running { pid }, Step::End(exit)) => {
                Ok(Self::Stopped { pid, exit })
            }
            (Self::Added | Self::Stopped { .. }, Step::Delete) => Ok(Self::Deleted),
            (Self::Deleted, Step::Delete) => Err(Error::new(Kind::NotFound, "process was deleted")),
            _ => Err(Error::new(Kind::FailedPrecondition, format!("cannot {} a {} process", step.verb(), self.name()))),
        }
    }

    /// Its pid, or zero when it has none.
    pub fn pid(self) -> i32 {
        match self {
            Self::Created { pid } | Self::Running { pid } | Self::Stopped { pid, .. } => pid,
            Self::Starting { pid } => pid.unwrap_or(0),
            Self::Added | Self::Deleted => 0,
        }
    }

    /// As it stands in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Added | Self::Created { .. } => "created",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Stopped { .. } => "stopped",
            Self::Deleted => "deleted",
        }
    }
}

impl Step {
    fn verb(self) -> &'static str {
        match self {
            Self::Start | Self::Started(_) => "start",
            Self::End(_) => "end",
            Self::Delete => "delete",
        }
    }
}

/// What a client said about a process's streams, to be told again by State.
#[derive(Debug, Default, Clone)]
pub struct Stdio {
    /// As in the request.
    pub stdin: String,
    /// As in the request.
    pub stdout: String,
    /// As in the request.
    pub stderr: String,
    /// As in the request.
    pub terminal: bool,
}

/// A process and its record.
#[derive(Debug)]
pub struct Process {
    /// Its container.
    pub container: String,
    /// Its own id; empty for the init.
    pub exec: String,
    /// As the client named them.
    pub stdio: Stdio,
    /// PID 1's ends of its streams.
    pub streams: Arc<ProcessStreams>,
    state: watch::Sender<State>,
    /// Set once, and kept after the delete: a wait that began before it is answered all the same.
    exit: watch::Sender<Option<Exit>>,
    /// The process's own ends, until a worker takes them.
    ends: Mutex<Option<client::Streams>>,
}

impl Process {
    /// A process in its first state.
    pub fn new(
        container: &str,
        exec: &str,
        stdio: Stdio,
        streams: Arc<ProcessStreams>,
        state: State,
        ends: Option<client::Streams>,
    ) -> Arc<Self> {
        Arc::new(Self {
            container: container.into(),
            exec: exec.into(),
            stdio,
            streams,
            state: watch::Sender::new(state),
            exit: watch::Sender::new(None),
            ends: Mutex::new(ends),
        })
    }

    /// Where it is now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Takes a step, and answers the state after it.
    ///
    /// # Errors
    /// When the state does not allow it.
    pub fn step(&self, step: Step) -> Result<State, Error> {
        let mut result = self.state().after(step);
        self.state.send_if_modified(|state| {
            result = state.after(step);
            match &result {
                Ok(next) => {
                    *state = *next;
                    true
                }
                Err(_) => false,
            }
        });
        result
    }

    /// Records how it ended, for all who wait. Waits until a start that is under way is settled, so that nobody hears of the
    /// exit before the start.
    pub async fn ended(&self, exit: Exit) {
        // The sender lives in self: the wait cannot fail.
        let _ = self.state.subscribe().wait_for(|state| !matches!(state, State::Starting { .. })).await;
        self.end(exit);
    }

    /// Records the end at once: of a start that failed.
    pub fn end(&self, exit: Exit) {
        if let Err(error) = self.step(Step::End(exit)) {
            tracing::error!(container = self.container, exec = self.exec, %error, "record an exit");
        }
        self.streams.exited();
        self.exit.send_replace(Some(exit));
        // Whatever happens, nobody will start it any more: its streams must come to their end.
        drop(self.take_ends());
    }

    /// How it ended, as soon as it has.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            // The sender lives in self: the wait cannot fail.
            let _ = exit.changed().await;
        }
    }

    /// The process's own ends of its streams: once.
    pub fn take_ends(&self) -> client::Streams {
        self.ends.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    const EXIT: Exit = Exit { status: 3, at: SystemTime::UNIX_EPOCH };
    const REFUSED: Result<State, Kind> = Err(Kind::FailedPrecondition);

    #[test]
    fn each_state_takes_its_steps_and_no_others() {
        let stopped = State::Stopped { pid: 5, exit: EXIT };
        let states = [
            (
                State::Added,
                [
                    Ok(State::Starting { pid: None }),
                    REFUSED,
                    Ok(State::Stopped { pid: 0, exit: EXIT }),
                    Ok(State::Deleted),
                ],
            ),
            (State::Created { pid: 5 }, [Ok(State::Starting { pid: Some(5) }), REFUSED, Ok(stopped), REFUSED]),
            (
                State::Starting { pid: None },
                [REFUSED, Ok(State::Running { pid: 5 }), Ok(State::Stopped { pid: 0, exit: EXIT }), REFUSED],
            ),
            (State::Starting { pid: Some(5) }, [REFUSED, Ok(State::Running { pid: 5 }), Ok(stopped), REFUSED]),
            (State::Running { pid: 5 }, [REFUSED, REFUSED, Ok(stopped), REFUSED]),
            (stopped, [REFUSED, REFUSED, REFUSED, Ok(State::Deleted)]),
            (State::Deleted, [REFUSED, REFUSED, REFUSED, Err(Kind::NotFound)]),
        ];
        for (state, wants) in states {
            for (step, want) in [Step::Start, Step::Started(5), Step::End(EXIT), Step::Delete].into_iter().zip(wants) {
                assert_eq!(state.after(step).map_err(|error| error.kind), want, "{state:?} {step:?}");
            }
        }
    }

    #[tokio::test]
    async fn an_exit_during_the_start_is_recorded_after_it() {
        let (streams, ends) = ProcessStreams::new(Default::default()).unwrap();
        let process = Process::new("c", "", Stdio::default(), streams, State::Created { pid: 5 }, Some(ends));
        process.step(Step::Start).unwrap();
        let exits = tokio::spawn({
            let process = process.clone();
            async move { process.ended(EXIT).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(process.state(), State::Starting { pid: Some(5) });
        process.step(Step::Started(5)).unwrap();
        assert_eq!(process.wait().await, EXIT);
        exits.await.unwrap();
        assert_eq!(process.state(), State::Stopped { pid: 5, exit: EXIT });
    }
}
