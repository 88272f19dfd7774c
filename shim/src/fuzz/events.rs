//! The guest's events, and the state machine that admits them.

use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::events::Event;
use protobuf::Message;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::time::Instant;

use super::checks::harmless;
use crate::host::text::LONGEST;
use crate::sandbox::container::guest_event::{self, TaskChange};
use crate::sandbox::container::order::{Request, Requested, Stage};
use crate::sandbox::events::check_sequence;

/// The host's time.
const NOW: i64 = 1_700_000_000;
/// The container, and its exec.
const CONTAINER: &str = "c";
const EXEC: &str = "e";
/// Reports of exhausted memory at once; in the long run, one per second.
const OUT_OF_MEMORY: u32 = 16;

/// How often something was asked for, and how often it was admitted.
#[derive(Debug, Default)]
struct Counts {
    asked: [u32; 3],
    paused: u32,
    resumed: u32,
    deleted: u32,
    out_of_memory: u32,
    /// Of the init process and the exec.
    created: [u32; 2],
    started: [u32; 2],
    exited: [u32; 2],
}

/// Steps: two bytes, which select what happens and give the length of the event that may follow.
pub fn events(bytes: &[u8]) {
    let began = Instant::now();
    let (mut requested, mut stages, mut counts) = (Requested::new(began), [Stage::New; 2], Counts::default());
    let (mut rest, mut now, mut last) = (bytes, began, 0);
    while let [step, length, after @ ..] = rest {
        rest = after;
        match step % 8 {
            0..5 => {
                let (event, after) = rest.split_at(rest.len().min(usize::from(*length)));
                rest = after;
                let Ok(mut event) = Event::parse_from_bytes(event) else { continue };
                if step % 8 != 0 {
                    event.sequence = last + 1;
                }
                match check_sequence(last, &event) {
                    Ok(()) => last = event.sequence,
                    // The VM is killed.
                    Err(lost) => return harmless(&Chain(&lost).to_string(), LONGEST),
                }
                take(&event, &mut requested, &mut stages, &mut counts, now);
                counts.check(now - began);
            }
            5 => {
                let request = [Request::Pause, Request::Resume, Request::Delete][usize::from(length % 3)];
                requested.ask(request);
                counts.asked[usize::from(length % 3)] += 1;
            }
            6 => {
                let request = [Request::Pause, Request::Resume, Request::Delete][usize::from(length % 3)];
                requested.rejected(request);
            }
            _ => now += Duration::from_millis(u64::from(*length)),
        }
    }
}

/// An event as the sandbox takes it.
fn take(event: &Event, requested: &mut Requested, stages: &mut [Stage; 2], counts: &mut Counts, now: Instant) {
    let time = Timestamp { seconds: NOW, ..Default::default() };
    let exists = |container: &str, exec: &str| container == CONTAINER && ["", EXEC].contains(&exec);
    let parsed = match guest_event::parse(event, &time, exists) {
        Ok(parsed) => parsed,
        // Quoted, and so perhaps escaped.
        Err(invalid) => return harmless(&Chain(&invalid).to_string(), 25 * LONGEST),
    };
    assert!(parsed.container == CONTAINER && parsed.at.iter().all(is_plausible), "{parsed:?}");
    let process = usize::from(!parsed.change.exec().is_empty());
    if let Err(illegal) = requested.admit(&parsed.change, &mut stages[process], now) {
        return harmless(&Chain(&illegal).to_string(), LONGEST);
    }
    let count = match &parsed.change {
        TaskChange::Created { .. } | TaskChange::ExecAdded { .. } => &mut counts.created[process],
        TaskChange::Started { .. } | TaskChange::ExecStarted { .. } => &mut counts.started[process],
        TaskChange::Exited { status, at, .. } => {
            assert!(*status <= 255 && at.iter().all(is_plausible), "{parsed:?}");
            &mut counts.exited[process]
        }
        TaskChange::Deleted { status, at, .. } => {
            assert!(*status <= 255 && at.iter().all(|at| at.seconds >= 0 && is_not_later(at)), "{parsed:?}");
            assert_eq!(counts.exited[0], 1, "deleted before its exit");
            &mut counts.deleted
        }
        TaskChange::Paused => &mut counts.paused,
        TaskChange::Resumed => &mut counts.resumed,
        TaskChange::OutOfMemory => &mut counts.out_of_memory,
    };
    *count += 1;
}

fn is_plausible(at: &Timestamp) -> bool {
    at.seconds >= NOW - 3600 && is_not_later(at)
}

fn is_not_later(at: &Timestamp) -> bool {
    at.seconds <= NOW + 60 && (0..1_000_000_000).contains(&at.nanos)
}

impl Counts {
    /// Checks that containerd receives no more than the host has asked for, and each step of a process once.
    fn check(&self, passed: Duration) {
        let [pauses, resumes, deletions] = self.asked;
        assert!(self.paused <= pauses && self.resumed <= resumes && self.deleted <= deletions, "{self:?}");
        assert!(self.out_of_memory <= OUT_OF_MEMORY + passed.as_secs() as u32 + 1, "{self:?}");
        for process in 0..2 {
            let [created, started, exited] = [self.created, self.started, self.exited].map(|counts| counts[process]);
            assert!(created <= 1 && started <= created && exited <= created, "{self:?}");
        }
    }
}
