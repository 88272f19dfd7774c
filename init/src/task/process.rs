//! A container's process, init or exec, and its state machine.

use std::sync::{Arc, Mutex};

use husk_protos::lock::lock;
use tokio::sync::watch;

use crate::error::{CallError, FailureKind};
use crate::io::ProcessStreams;
use crate::reaper::Exit;
use crate::spawn::ChildStreams;

/// An exec starts as `Added`, an init as `Created`. PIDs are those of the guest's PID namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProcessState {
    /// An exec that has no process yet.
    Added,
    /// An init that waits for its start.
    Created {
        pid: i32,
    },
    /// Start is in progress. Only an init has a PID.
    Starting {
        pid: Option<i32>,
    },
    Running {
        pid: i32,
    },
    /// Exited, or failed to start. A process that never had a PID has zero.
    Stopped {
        pid: i32,
        exit: Exit,
    },
    Deleted,
}

/// A change of a process's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transition {
    /// A client requested the start.
    Start,
    /// The process was started with this PID.
    Started(i32),
    /// The process exited, or its start failed.
    End(Exit),
    /// A client requested the deletion.
    Delete,
}

impl ProcessState {
    /// Returns the next state, or FailedPrecondition if the transition is not allowed. A deleted process is NotFound.
    pub(crate) fn after(self, transition: Transition) -> Result<Self, CallError> {
        match (self, transition) {
            (Self::Added, Transition::Start) => Ok(Self::Starting { pid: None }),
            (Self::Created { pid }, Transition::Start) => Ok(Self::Starting { pid: Some(pid) }),
            (Self::Starting { .. }, Transition::Started(pid)) => Ok(Self::Running { pid }),
            // An end while starting is a failed start: exits are held back until the start has completed.
            (Self::Added | Self::Starting { pid: None }, Transition::End(exit)) => Ok(Self::Stopped { pid: 0, exit }),
            (
                Self::Created { pid } | Self::Starting { pid: Some(pid) } | Self::Running { pid },
                Transition::End(exit),
            ) => Ok(Self::Stopped { pid, exit }),
            (Self::Added | Self::Stopped { .. }, Transition::Delete) => Ok(Self::Deleted),
            (Self::Deleted, Transition::Delete) => Err(CallError::new(FailureKind::NotFound, "process was deleted")),
            _ => {
                let what = format!("cannot {} a {} process", transition.verb(), self.name());
                Err(CallError::new(FailureKind::FailedPrecondition, what))
            }
        }
    }

    /// Zero if the process has no PID.
    pub(crate) fn pid(self) -> i32 {
        match self {
            Self::Created { pid } | Self::Running { pid } | Self::Stopped { pid, .. } => pid,
            Self::Starting { pid } => pid.unwrap_or(0),
            Self::Added | Self::Deleted => 0,
        }
    }

    /// The state's name in error messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Added | Self::Created { .. } => "created",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Stopped { .. } => "stopped",
            Self::Deleted => "deleted",
        }
    }
}

impl Transition {
    fn verb(self) -> &'static str {
        match self {
            Self::Start | Self::Started(_) => "start",
            Self::End(_) => "end",
            Self::Delete => "delete",
        }
    }
}

/// A process's streams as the client named them. The State call returns these values unchanged.
#[derive(Debug, Default, Clone)]
pub(crate) struct StdioRequest {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

#[derive(Debug)]
pub(crate) struct Process {
    /// The container's ID.
    pub(crate) container: String,
    /// The exec's ID; empty for the init.
    pub(crate) exec: String,
    pub(crate) stdio: StdioRequest,
    /// PID 1's ends of the streams.
    pub(crate) streams: Arc<ProcessStreams>,
    state: watch::Sender<ProcessState>,
    /// Set once and kept after the deletion: a Wait that began before the deletion still returns.
    exit: watch::Sender<Option<Exit>>,
    /// The process's ends of the streams, until a worker takes them.
    ends: Mutex<Option<ChildStreams>>,
}

impl Process {
    pub(crate) fn new(
        container: &str,
        exec: &str,
        stdio: StdioRequest,
        streams: Arc<ProcessStreams>,
        state: ProcessState,
        ends: Option<ChildStreams>,
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

    pub(crate) fn state(&self) -> ProcessState {
        *self.state.borrow()
    }

    /// Changes the state and returns the new one. Fails like [`ProcessState::after`], and then the state is unchanged.
    pub(crate) fn apply(&self, transition: Transition) -> Result<ProcessState, CallError> {
        let mut result = self.state().after(transition);
        self.state.send_if_modified(|state| {
            result = state.after(transition);
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

    /// Records the exit as soon as no start is in progress, so that nobody sees the exit before the start.
    pub(crate) async fn exited(&self, exit: Exit) {
        // Cannot fail: self owns the sender.
        let _ = self.state.subscribe().wait_for(|state| !matches!(state, ProcessState::Starting { .. })).await;
        self.end(exit);
    }

    /// Records the exit immediately: for a start that failed.
    pub(crate) fn end(&self, exit: Exit) {
        if let Err(error) = self.apply(Transition::End(exit)) {
            tracing::error!(container = self.container, exec = self.exec, %error, "failed to record an exit");
        }
        self.streams.exited();
        self.exit.send_replace(Some(exit));
        // The process cannot be started any more. Without this, the readers of its streams would never see the end.
        drop(self.take_ends());
    }

    /// Waits for the exit.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            // Cannot fail: self owns the sender.
            let _ = exit.changed().await;
        }
    }

    /// Takes the process's ends of the streams. Later calls return empty ones.
    pub(crate) fn take_ends(&self) -> ChildStreams {
        lock(&self.ends).take().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    const EXIT: Exit = Exit { status: 3, at: SystemTime::UNIX_EPOCH };
    const REJECTED: Result<ProcessState, FailureKind> = Err(FailureKind::FailedPrecondition);

    #[test]
    fn each_state_allows_only_its_transitions() {
        let stopped = ProcessState::Stopped { pid: 5, exit: EXIT };
        let states = [
            (
                ProcessState::Added,
                [
                    Ok(ProcessState::Starting { pid: None }),
                    REJECTED,
                    Ok(ProcessState::Stopped { pid: 0, exit: EXIT }),
                    Ok(ProcessState::Deleted),
                ],
            ),
            (
                ProcessState::Created { pid: 5 },
                [Ok(ProcessState::Starting { pid: Some(5) }), REJECTED, Ok(stopped), REJECTED],
            ),
            (
                ProcessState::Starting { pid: None },
                [
                    REJECTED,
                    Ok(ProcessState::Running { pid: 5 }),
                    Ok(ProcessState::Stopped { pid: 0, exit: EXIT }),
                    REJECTED,
                ],
            ),
            (
                ProcessState::Starting { pid: Some(5) },
                [REJECTED, Ok(ProcessState::Running { pid: 5 }), Ok(stopped), REJECTED],
            ),
            (ProcessState::Running { pid: 5 }, [REJECTED, REJECTED, Ok(stopped), REJECTED]),
            (stopped, [REJECTED, REJECTED, REJECTED, Ok(ProcessState::Deleted)]),
            (ProcessState::Deleted, [REJECTED, REJECTED, REJECTED, Err(FailureKind::NotFound)]),
        ];
        for (state, expected) in states {
            for (transition, expected) in
                [Transition::Start, Transition::Started(5), Transition::End(EXIT), Transition::Delete]
                    .into_iter()
                    .zip(expected)
            {
                assert_eq!(state.after(transition).map_err(|error| error.kind), expected, "{state:?} {transition:?}");
            }
        }
    }

    #[tokio::test]
    async fn an_exit_during_the_start_is_recorded_after_the_start() {
        let (streams, ends) = ProcessStreams::new(Default::default()).unwrap();
        let process =
            Process::new("c", "", StdioRequest::default(), streams, ProcessState::Created { pid: 5 }, Some(ends));
        process.apply(Transition::Start).unwrap();
        let exits = tokio::spawn({
            let process = process.clone();
            async move { process.exited(EXIT).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(process.state(), ProcessState::Starting { pid: Some(5) });
        process.apply(Transition::Started(5)).unwrap();
        assert_eq!(process.wait().await, EXIT);
        exits.await.unwrap();
        assert_eq!(process.state(), ProcessState::Stopped { pid: 5, exit: EXIT });
    }
}
