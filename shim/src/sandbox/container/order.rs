//! Which events of the guest are legal in the present state of a container. Pure.
//!
//! containerd acts on events, and its subscribers receive each of them. A process is created, started and ended once,
//! in this order; a container is paused, resumed and deleted only after the host has asked for it. Each legal event
//! therefore costs the host's clients a call, except reports of exhausted memory, which have a rate limit.

use tokio::time::Instant;

use super::guest_event::TaskChange;
use crate::host::rate::{Admitted, Bucket};

/// Reports of exhausted memory at once, and per second in the long run. The guest combines those of one moment.
const OUT_OF_MEMORY: (f64, f64) = (16.0, 1.0);

/// How far the guest has reported the life of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Stage {
    /// Not at all.
    #[default]
    New,
    /// It exists, and waits for its start.
    Created,
    /// It has been started.
    Started,
    /// It has exited.
    Exited,
}

/// Why an event is not legal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IllegalEvent {
    #[error("a process that is {from:?} cannot become {to:?}")]
    Stage { from: Stage, to: Stage },
    #[error("nobody has asked for {0}")]
    NotRequested(&'static str),
    #[error("exhausted memory is reported too often")]
    TooOften,
}

impl Stage {
    /// The stage that follows with `to`.
    fn next(self, to: Self) -> Result<Self, IllegalEvent> {
        let legal = match to {
            Self::New => false,
            Self::Created => self == Self::New,
            Self::Started => self == Self::Created,
            // A process may be killed before its start, or its start may fail.
            Self::Exited => matches!(self, Self::Created | Self::Started),
        };
        if legal { Ok(to) } else { Err(IllegalEvent::Stage { from: self, to }) }
    }
}

/// What the host has asked of a container and the guest has not reported.
#[derive(Debug)]
pub(crate) struct Requested {
    pauses: u32,
    resumes: u32,
    deletion: bool,
    out_of_memory: Bucket,
}

/// A change that the guest reports only after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    Pause,
    Resume,
    Delete,
}

impl Requested {
    pub(crate) fn new(now: Instant) -> Self {
        let out_of_memory = Bucket::new(OUT_OF_MEMORY.0, OUT_OF_MEMORY.1, now);
        Self { pauses: 0, resumes: 0, deletion: false, out_of_memory }
    }

    /// The host is about to ask for a change.
    pub(crate) fn ask(&mut self, request: Request) {
        match request {
            Request::Pause => self.pauses = self.pauses.saturating_add(1),
            Request::Resume => self.resumes = self.resumes.saturating_add(1),
            Request::Delete => self.deletion = true,
        }
    }

    /// The guest has rejected the request: no event follows. A deletion may be repeated.
    pub(crate) fn rejected(&mut self, request: Request) {
        match request {
            Request::Pause => self.pauses = self.pauses.saturating_sub(1),
            Request::Resume => self.resumes = self.resumes.saturating_sub(1),
            Request::Delete => {}
        }
    }

    /// Checks a change of a process at `stage`, and records it.
    pub(crate) fn admit(&mut self, change: &TaskChange, stage: &mut Stage, now: Instant) -> Result<(), IllegalEvent> {
        let take = |count: &mut u32, what| match count.checked_sub(1) {
            Some(rest) => {
                *count = rest;
                Ok(())
            }
            None => Err(IllegalEvent::NotRequested(what)),
        };
        match change {
            TaskChange::Created { .. } | TaskChange::ExecAdded { .. } => *stage = stage.next(Stage::Created)?,
            TaskChange::Started { .. } | TaskChange::ExecStarted { .. } => *stage = stage.next(Stage::Started)?,
            TaskChange::Exited { .. } => *stage = stage.next(Stage::Exited)?,
            TaskChange::Paused => take(&mut self.pauses, "a pause")?,
            TaskChange::Resumed => take(&mut self.resumes, "a resumption")?,
            TaskChange::Deleted { .. } => {
                if *stage != Stage::Exited || !std::mem::take(&mut self.deletion) {
                    return Err(IllegalEvent::NotRequested("a deletion"));
                }
            }
            TaskChange::OutOfMemory => {
                if !matches!(stage, Stage::Created | Stage::Started) {
                    return Err(IllegalEvent::NotRequested("a report of a container that does not run"));
                }
                if self.out_of_memory.admit(now) == Admitted::No {
                    return Err(IllegalEvent::TooOften);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn exited() -> TaskChange {
        TaskChange::Exited { exec: String::new(), pid: 1, status: 0, at: None, output: [0; 2] }
    }

    #[test]
    fn a_process_is_created_started_and_ended_once_and_in_this_order() {
        let now = Instant::now();
        let changes = [TaskChange::Created { pid: 1 }, TaskChange::Started { pid: 1 }, exited()];
        // One row per present stage; one column per change.
        let table = [(Stage::New, "x.."), (Stage::Created, ".xx"), (Stage::Started, "..x"), (Stage::Exited, "...")];
        for (from, row) in table {
            for (change, legal) in changes.iter().zip(row.chars()) {
                let mut stage = from;
                let admitted = Requested::new(now).admit(change, &mut stage, now);
                assert_eq!(admitted.is_ok(), legal == 'x', "{from:?} {change:?}");
                assert_eq!(stage == from, legal == '.', "{from:?} {change:?}");
            }
        }
    }

    #[test]
    fn pauses_resumptions_and_deletions_follow_a_request() {
        let now = Instant::now();
        let deleted = TaskChange::Deleted { pid: 1, status: 0, at: None };
        let cases = [
            (Request::Pause, TaskChange::Paused),
            (Request::Resume, TaskChange::Resumed),
            (Request::Delete, deleted.clone()),
        ];
        for (request, change) in cases {
            let (mut requested, mut stage) = (Requested::new(now), Stage::Exited);
            let mut admitted = |requested: &mut Requested| requested.admit(&change, &mut stage, now).is_ok();
            assert!(!admitted(&mut requested), "{change:?} without a request");
            requested.ask(request);
            assert!(admitted(&mut requested) && !admitted(&mut requested), "{change:?} once");
            requested.ask(request);
            requested.rejected(request);
            assert_eq!(admitted(&mut requested), request == Request::Delete, "{change:?} after a failure");
        }
        let mut requested = Requested::new(now);
        requested.ask(Request::Delete);
        assert!(requested.admit(&deleted, &mut Stage::Started.clone(), now).is_err(), "before the exit");
    }

    #[test]
    fn a_flood_of_reports_of_exhausted_memory_is_limited() {
        let now = Instant::now();
        let mut requested = Requested::new(now);
        let mut admit = |stage: Stage, now| requested.admit(&TaskChange::OutOfMemory, &mut stage.clone(), now).is_ok();
        assert!(!admit(Stage::New, now) && !admit(Stage::Exited, now));
        assert_eq!((0..100_000).filter(|_| admit(Stage::Started, now)).count(), 16);
        let later = now + Duration::from_secs(10);
        assert_eq!((0..100_000).filter(|_| admit(Stage::Started, later)).count(), 10);
    }
}
