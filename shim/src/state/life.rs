//! The VM's lifecycle: its states, the allowed transitions, and the latest transitions with their causes.
//!
//! Pure: `vm` and `sandbox` make the transitions, `journal` records and logs them.

use std::collections::VecDeque;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::host::text::clean;

/// How many transitions are kept. Only a VM whose boot is retried many times has more.
const KEPT: usize = 64;

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// No container has requested the VM yet.
    Pending,
    /// The shim creates the vsock device, the console and the cgroup.
    Provisioning,
    /// Everything that the machine needs exists.
    Configured,
    /// The machine's process runs; the guest has not answered yet.
    Starting,
    /// The guest has answered.
    Running,
    /// A stop was requested.
    Stopping,
    /// The VM stopped on request, or was never booted.
    Stopped,
    /// The boot failed. The next container may retry.
    StartFailed,
    /// The VM died, or could not be stopped.
    Failed,
}

impl VmState {
    /// The states that may follow this one.
    pub fn next(self) -> &'static [Self] {
        match self {
            Self::Pending => &[Self::Provisioning, Self::Stopped],
            Self::Provisioning => &[Self::Configured, Self::StartFailed],
            Self::Configured => &[Self::Starting, Self::StartFailed],
            Self::Starting => &[Self::Running, Self::StartFailed],
            Self::Running => &[Self::Stopping, Self::Failed],
            // A stopping VM is expected to die. It fails only if it survives.
            Self::Stopping => &[Self::Stopped, Self::Failed],
            Self::StartFailed => &[Self::Provisioning],
            Self::Stopped | Self::Failed => &[],
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A transition that the table does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a VM that is {from} cannot become {to}")]
pub struct InvalidTransition {
    /// The present state.
    pub from: VmState,
    /// The requested state.
    pub to: VmState,
}

/// One change of the VM's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// The old state.
    pub from: VmState,
    /// The new state.
    pub to: VmState,
    /// The reason.
    pub cause: String,
    /// When, by the host's clock: milliseconds since the epoch (1970-01-01T00:00:00Z).
    pub at_ms: u64,
}

/// A VM's state and its latest transitions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    state: VmState,
    /// The last [`KEPT`], oldest first.
    transitions: VecDeque<Transition>,
}

impl Default for Life {
    fn default() -> Self {
        Self { state: VmState::Pending, transitions: VecDeque::new() }
    }
}

impl Life {
    /// The present state.
    pub fn state(&self) -> VmState {
        self.state
    }

    /// The latest transitions, at most 64, oldest first.
    pub fn transitions(&self) -> impl ExactSizeIterator<Item = &Transition> {
        self.transitions.iter()
    }

    /// Makes a transition. A very long cause is cut.
    ///
    /// # Errors
    /// [`InvalidTransition`]; the state is unchanged then.
    pub(crate) fn enter(&mut self, to: VmState, cause: &str, at_ms: u64) -> Result<(), InvalidTransition> {
        let from = self.state;
        if !from.next().contains(&to) {
            return Err(InvalidTransition { from, to });
        }
        // The guest may have written part of it.
        let cause = clean(cause);
        while self.transitions.len() >= KEPT {
            self.transitions.pop_front();
        }
        self.transitions.push_back(Transition { from, to, cause, at_ms });
        self.state = to;
        Ok(())
    }
}

/// The host's time in milliseconds since the epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::VmState::*;
    use super::*;

    const ALL: [VmState; 9] =
        [Pending, Provisioning, Configured, Starting, Running, Stopping, Stopped, StartFailed, Failed];

    #[test]
    fn a_transition_is_in_the_table_or_an_error_that_names_both_states() {
        // One row per present state and one column per requested state, both in the order of ALL.
        let table = [
            ".x....x..", // Pending
            "..x....x.", // Provisioning
            "...x...x.", // Configured
            "....x..x.", // Starting
            ".....x..x", // Running
            "......x.x", // Stopping
            ".........", // Stopped
            ".x.......", // StartFailed
            ".........", // Failed
        ];
        for (from, row) in ALL.into_iter().zip(table) {
            for (to, allowed) in ALL.into_iter().zip(row.chars()) {
                let before = Life { state: from, transitions: VecDeque::new() };
                let mut life = before.clone();
                let entered = life.enter(to, "a test", 7);
                if allowed == 'x' {
                    assert_eq!(entered, Ok(()), "{from} {to}");
                    assert_eq!(life.state(), to);
                    let kept: Vec<_> = life.transitions().cloned().collect();
                    assert_eq!(kept, [Transition { from, to, cause: "a test".into(), at_ms: 7 }]);
                } else {
                    assert_eq!(entered, Err(InvalidTransition { from, to }));
                    assert_eq!(life, before);
                    let expected = format!("a VM that is {from:?} cannot become {to:?}");
                    assert_eq!(InvalidTransition { from, to }.to_string(), expected);
                }
            }
        }
    }

    #[test]
    fn the_latest_transitions_are_kept_in_order() {
        let mut life = Life::default();
        for at_ms in 0..100 {
            let to = if at_ms % 2 == 0 { Provisioning } else { StartFailed };
            life.enter(to, &format!("cause {at_ms}"), at_ms).unwrap();
        }
        assert_eq!(life.transitions().len(), 64);
        for (transition, at_ms) in life.transitions().zip(36..) {
            assert_eq!((transition.at_ms, &transition.cause), (at_ms, &format!("cause {at_ms}")));
        }
    }

    #[test]
    fn a_cause_that_a_guest_has_written_is_short_and_harmless() {
        let hostile = format!("died:\n\x1b[2J{}", "ä".repeat(10_000));
        let mut life = Life::default();
        life.enter(Provisioning, &hostile, 0).unwrap();
        let cause = &life.transitions().next().unwrap().cause;
        assert!(cause.starts_with("died: [2Jää") && cause.chars().count() == 1000, "{cause}");
    }

    #[test]
    fn a_life_reads_back_as_written() {
        let mut life = Life::default();
        life.enter(Provisioning, "a container needs it", 1_795_256_789_012).unwrap();
        let json = serde_json::to_value(&life).unwrap();
        let transition = serde_json::json!(
            {"from": "Pending", "to": "Provisioning", "cause": "a container needs it", "at_ms": 1_795_256_789_012_u64}
        );
        assert_eq!(json, serde_json::json!({"state": "Provisioning", "transitions": [transition]}));
        assert_eq!(serde_json::from_value::<Life>(json).unwrap(), life);
    }
}
