//! What is noted of a sandbox's machine for its operator: what it was started with, and when its boot reached what.

use std::time::Instant;

use husk_protos::system::Hello;
use serde::{Deserialize, Serialize};

use crate::host::process::ProcessId;
use crate::state::life::now_ms;

/// Most milestones that are kept of a guest's; an honest one has eight.
const GUEST_MILESTONES: usize = 32;
/// Longest name or version that is kept of a guest's words, in characters.
const GUEST_WORD: usize = 64;

/// The machine that a VM runs, or ran, on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// Its process.
    pub process: ProcessId,
    /// The guest's address on vsock.
    pub cid: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// The guest's memory, MiB.
    pub memory_mib: u64,
    /// How guest instructions are executed.
    pub accel: String,
    /// The board.
    pub board: String,
    /// The kernel's file.
    pub kernel_file: String,
    /// The initramfs's file.
    pub initrd_file: String,
    /// The guest is in debug mode.
    #[serde(default)]
    pub debug: bool,
    /// The kernel's version in the guest's words, once it has said so.
    pub kernel: Option<String>,
    /// The init's version in its own words.
    pub init: Option<String>,
}

/// Whose step it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The shim's.
    Host,
    /// The guest's.
    Guest,
}

/// Something that a boot has reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Milestone {
    /// Whose.
    pub side: Side,
    /// What.
    pub name: String,
    /// Microseconds since the boot began.
    pub at_us: u64,
}

/// What a boot has reached so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// When it began, milliseconds since the epoch.
    pub began_ms: u64,
    /// In the order in which they were reached.
    pub milestones: Vec<Milestone>,
    /// By which they are measured; nothing in a boot that was read back.
    #[serde(skip)]
    began: Option<Instant>,
}

impl Boot {
    /// One that begins now.
    pub fn begin() -> Self {
        Self { began_ms: now_ms(), milestones: Vec::new(), began: Some(Instant::now()) }
    }

    /// Notes that this was reached now.
    pub fn reached(&mut self, name: &str) {
        let at_us = self.now_us();
        self.milestones.push(Milestone { side: Side::Host, name: name.to_owned(), at_us });
    }

    fn now_us(&self) -> u64 {
        self.began.map_or(0, |began| began.elapsed().as_micros() as u64)
    }

    /// The guest's hello has come, and in it its own milestones, by a clock that began with its kernel. The last of them was reached as good
    /// as now. What cannot be, such as before the machine's start, is put where it can.
    pub fn heard(&mut self, hello: &Hello) {
        let now = self.now_us();
        let earliest = self.milestones.last().map_or(0, |last| last.at_us);
        let last_ns = hello.timeline.iter().map(|milestone| milestone.boottime_ns).max().unwrap_or(0);
        let place = |ns: u64| now.saturating_sub((last_ns - ns.min(last_ns)) / 1000).max(earliest);
        let of_guest = |name: String, at_us| Milestone { side: Side::Guest, name, at_us };
        let mut guests = vec![of_guest("kernel entered".to_owned(), place(0))];
        for milestone in hello.timeline.iter().take(GUEST_MILESTONES) {
            let step = milestone.step.enum_value_or_default();
            guests.push(of_guest(format!("{step:?}").to_lowercase(), place(milestone.boottime_ns)));
        }
        guests.sort_by_key(|milestone| milestone.at_us);
        self.milestones.extend(guests);
        self.milestones.push(Milestone { side: Side::Host, name: "hello received".to_owned(), at_us: now });
    }
}

/// A guest's word as it is kept: short and without control characters.
pub fn word(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(GUEST_WORD).collect()
}

#[cfg(test)]
mod tests {
    use husk_protos::system::{BootStep, Milestone as Told};

    use super::*;

    fn hello(timeline: &[(BootStep, u64)]) -> Hello {
        let told = |(step, ns): &(BootStep, u64)| Told { step: (*step).into(), boottime_ns: *ns, ..Default::default() };
        Hello { timeline: timeline.iter().map(told).collect(), ..Default::default() }
    }

    /// Where each is relative to the hello, µs.
    fn placed(timeline: &[(BootStep, u64)], earliest: u64) -> Vec<(String, i64)> {
        let mut boot = Boot::begin();
        boot.began = Instant::now().checked_sub(std::time::Duration::from_secs(1));
        boot.milestones.push(Milestone { side: Side::Host, name: "QEMU started".into(), at_us: earliest });
        boot.heard(&hello(timeline));
        let hello = boot.milestones.last().unwrap().at_us as i64;
        let guests = boot.milestones.iter().filter(|milestone| milestone.side == Side::Guest);
        guests.map(|milestone| (milestone.name.clone(), milestone.at_us as i64 - hello)).collect()
    }

    #[test]
    fn a_guests_milestones_are_placed_before_its_hello() {
        let honest = [(BootStep::INIT, 300_000_000), (BootStep::READY, 400_000_000)];
        let wanted = [("kernel entered", -400_000), ("init", -100_000), ("ready", 0)];
        assert_eq!(placed(&honest, 10), wanted.map(|(name, at)| (name.to_owned(), at)));
        assert_eq!(placed(&[], 10), [("kernel entered".to_owned(), 0)]);
    }

    #[test]
    fn what_a_guest_invents_is_bounded_and_cannot_precede_its_machine() {
        let many: Vec<(BootStep, u64)> = (0..1000).map(|n| (BootStep::SYSTEM, n)).collect();
        assert_eq!(placed(&many, 10).len(), 1 + GUEST_MILESTONES);
        let odd = [(BootStep::INIT, u64::MAX), (BootStep::READY, 0), (BootStep::MOUNTS, u64::MAX / 2)];
        for (name, at) in placed(&odd, 900_000) {
            assert!((-110_000..=0).contains(&at), "{name}: {at}");
        }
    }

    #[test]
    fn it_reads_back() {
        let mut boot = Boot::begin();
        boot.reached("QEMU started");
        let json = serde_json::to_value(&boot).unwrap();
        assert_eq!(json["milestones"][0]["side"], "host");
        let again: Boot = serde_json::from_value(json).unwrap();
        assert_eq!((again.began_ms, again.milestones), (boot.began_ms, boot.milestones));
    }
}
