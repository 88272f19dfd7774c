//! The life of a VM as a type: its states, which of them may follow which, and its last transitions with their causes.
//!
//! Nothing happens here: who makes a transition is in `vm::boot` and `sandbox`, that it is kept and logged in `journal`.

use std::collections::VecDeque;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Transitions that are kept: far more than one life has, unless its boot is tried again and again.
pub const KEPT: usize = 64;
/// Longest cause that is kept, in bytes: part of it may be a guest's words.
const MAX_CAUSE: usize = 512;

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// No container has needed it yet.
    Pending,
    /// Its vsock device, console and cgroup are being made.
    Provisioning,
    /// All that its machine will be started with is there.
    Configured,
    /// The machine's process runs, and the guest has not answered yet.
    Starting,
    /// The guest has answered.
    Running,
    /// Its end was asked for.
    Stopping,
    /// It has ended because that was asked for, or was never needed.
    Stopped,
    /// It did not come up. The next container may try again.
    StartFailed,
    /// It died, or could not be ended.
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
            // Its death is expected now, and is no failure; that it does not die is one.
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

/// A transition that is not in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a VM that is {from} cannot become {to}")]
pub struct Illegal {
    /// What the VM is.
    pub from: VmState,
    /// What it was to become.
    pub to: VmState,
}

/// One step in a VM's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// What the VM was.
    pub from: VmState,
    /// What it became.
    pub to: VmState,
    /// Why.
    pub cause: String,
    /// When, by the host's clock: milliseconds since the epoch (1970-01-01T00:00:00Z).
    pub at_ms: u64,
}

/// A VM's state, and how it came to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    state: VmState,
    /// The last [`KEPT`], the oldest first.
    transitions: VecDeque<Transition>,
}

impl Default for Life {
    fn default() -> Self {
        Self { state: VmState::Pending, transitions: VecDeque::new() }
    }
}

impl Life {
    /// What the VM is now.
    pub fn state(&self) -> VmState {
        self.state
    }

    /// The last [`KEPT`] transitions, the oldest first.
    pub fn transitions(&self) -> impl ExactSizeIterator<Item = &Transition> {
        self.transitions.iter()
    }

    /// Makes a transition. The end of a very long cause is dropped.
    ///
    /// # Errors
    /// [`Illegal`], and then nothing has changed.
    pub fn enter(&mut self, to: VmState, cause: &str, at_ms: u64) -> Result<(), Illegal> {
        let from = self.state;
        if !from.next().contains(&to) {
            return Err(Illegal { from, to });
        }
        let cause = cause[..cause.floor_char_boundary(MAX_CAUSE)].to_owned();
        while self.transitions.len() >= KEPT {
            self.transitions.pop_front();
        }
        self.transitions.push_back(Transition { from, to, cause, at_ms });
        self.state = to;
        Ok(())
    }
}

/// The host's time as transitions have it, in milliseconds since the epoch.
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
    fn every_pair_of_states_is_legal_or_an_error_that_names_both() {
        // A row for each state, a column for what it is to become, in the order of ALL.
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
            for (to, legal) in ALL.into_iter().zip(row.chars()) {
                let before = Life { state: from, transitions: VecDeque::new() };
                let mut life = before.clone();
                let entered = life.enter(to, "a test", 7);
                if legal == 'x' {
                    assert_eq!(entered, Ok(()), "{from} {to}");
                    assert_eq!(life.state(), to);
                    let kept: Vec<_> = life.transitions().cloned().collect();
                    assert_eq!(kept, [Transition { from, to, cause: "a test".into(), at_ms: 7 }]);
                } else {
                    assert_eq!(entered, Err(Illegal { from, to }));
                    assert_eq!(life, before);
                    let wanted = format!("a VM that is {from:?} cannot become {to:?}");
                    assert_eq!(Illegal { from, to }.to_string(), wanted);
                }
            }
        }
    }

    #[test]
    fn the_last_transitions_are_kept_in_order() {
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
    fn a_cause_is_bounded_and_stays_text() {
        // The 512th byte is the first half of a letter.
        let long = format!("{}ä{}", "x".repeat(511), "y".repeat(10_000));
        let mut life = Life::default();
        life.enter(Provisioning, &long, 0).unwrap();
        assert_eq!(life.transitions().next().unwrap().cause, "x".repeat(511));
    }

    #[test]
    fn it_reads_back_as_it_was_written() {
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
