//! What `state.json` records about a sandbox's VM for the operator: the machine it was started on, and the milestones
//! of its boot.

use std::fmt;
use std::time::Instant;

use husk_protos::system::{BootStep, Hello};
use protobuf::Enum;
use serde::{Deserialize, Serialize};

use crate::host::process::ProcessId;
use crate::host::text::clean;
use crate::state::life::now_ms;

/// Most milestones of a guest that are kept; an honest one reports eight.
const GUEST_MILESTONES: usize = 32;
/// Longest version string of a guest that is kept, in characters.
const VERSION_MAX: usize = 64;

/// The machine that a VM runs, or ran, on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// The VMM's process.
    pub process: ProcessId,
    /// The guest's address on vsock.
    pub cid: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Virtual CPUs that it can have.
    #[serde(default)]
    pub max_vcpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Guest memory that it can have, MiB.
    #[serde(default)]
    pub max_memory_mib: u64,
    /// The VMM's own cache, MiB; 0 if it has none, or an older version recorded the machine.
    #[serde(default)]
    pub cache_mib: u64,
    /// How guest instructions are executed.
    pub accel: String,
    /// The VMM's board.
    pub board: String,
    /// The kernel's file.
    pub kernel_file: String,
    /// The initramfs's file.
    pub initrd_file: String,
    /// The guest is in debug mode.
    #[serde(default)]
    pub debug: bool,
    /// The network is in user mode.
    #[serde(default)]
    pub user_mode: bool,
    /// The ports of the host that lead to the guest.
    #[serde(default)]
    pub ports: Vec<String>,
    /// The kernel's version, once the guest has reported it.
    pub kernel: Option<String>,
    /// The init's version, once the guest has reported it.
    pub init: Option<String>,
}

/// The side of the VM that reached a milestone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The shim.
    Host,
    /// The guest.
    Guest,
}

impl Side {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Guest => "guest",
        }
    }
}

/// A milestone that the shim reaches, in the order of a boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostMilestone {
    /// The vsock device and the cgroup exist.
    Configured,
    /// The VMM's process runs.
    VmmStarted,
    /// virtiofsd runs.
    VirtiofsdStarted,
    /// The guest's hello has arrived.
    HelloReceived,
    /// The guest's services are connected.
    GuestConnected,
    /// The stream of the guest's events is open.
    EventsSubscribed,
}

impl HostMilestone {
    /// All of them, in the order of a boot.
    pub const ALL: [Self; 6] = [
        Self::Configured,
        Self::VmmStarted,
        Self::VirtiofsdStarted,
        Self::HelloReceived,
        Self::GuestConnected,
        Self::EventsSubscribed,
    ];

    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::VmmStarted => "QEMU started",
            Self::VirtiofsdStarted => "virtiofsd started",
            Self::HelloReceived => "hello received",
            Self::GuestConnected => "guest connected",
            Self::EventsSubscribed => "events subscribed",
        }
    }
}

/// A milestone that the guest reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestMilestone {
    /// The guest's kernel has started, and its clock with it.
    KernelEntered,
    /// A step that the init reports.
    Step(BootStep),
}

/// The name of [`GuestMilestone::KernelEntered`] in JSON.
const KERNEL_ENTERED: &str = "kernel entered";

/// What a boot has reached. In JSON: `side` and `name`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "SideAndName", into = "SideAndName")]
pub enum Reached {
    /// A milestone of the shim.
    Host(HostMilestone),
    /// A milestone of the guest.
    Guest(GuestMilestone),
    /// A milestone that only another version of husk knows.
    Other {
        /// Whose it is.
        side: Side,
        /// Its name.
        name: String,
    },
}

impl Reached {
    /// Whose milestone it is.
    pub fn side(&self) -> Side {
        match self {
            Self::Host(_) => Side::Host,
            Self::Guest(_) => Side::Guest,
            Self::Other { side, .. } => *side,
        }
    }
}

/// The name in JSON.
impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(milestone) => f.write_str(milestone.name()),
            Self::Guest(GuestMilestone::KernelEntered) => f.write_str(KERNEL_ENTERED),
            Self::Guest(GuestMilestone::Step(step)) => f.write_str(&step_name(*step)),
            Self::Other { name, .. } => f.write_str(name),
        }
    }
}

fn step_name(step: BootStep) -> String {
    format!("{step:?}").to_lowercase()
}

#[derive(Serialize, Deserialize)]
struct SideAndName {
    side: Side,
    name: String,
}

impl From<Reached> for SideAndName {
    fn from(reached: Reached) -> Self {
        Self { side: reached.side(), name: reached.to_string() }
    }
}

impl From<SideAndName> for Reached {
    fn from(SideAndName { side, name }: SideAndName) -> Self {
        let known = match side {
            Side::Host => HostMilestone::ALL.into_iter().find(|known| known.name() == name).map(Self::Host),
            Side::Guest if name == KERNEL_ENTERED => Some(Self::Guest(GuestMilestone::KernelEntered)),
            Side::Guest => {
                let step = BootStep::VALUES.iter().find(|step| step_name(**step) == name);
                step.map(|step| Self::Guest(GuestMilestone::Step(*step)))
            }
        };
        known.unwrap_or(Self::Other { side, name })
    }
}

/// A milestone, and when a boot reached it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Milestone {
    /// Which milestone.
    #[serde(flatten)]
    pub reached: Reached,
    /// Microseconds since the boot began.
    #[serde(default)]
    pub at_us: u64,
}

/// The milestones of a boot so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// When the boot began, milliseconds since the epoch.
    pub began_ms: u64,
    /// In the order in which they were reached.
    pub milestones: Vec<Milestone>,
    /// The start of the measurement; `None` in a boot that was read from disk.
    #[serde(skip)]
    began: Option<Instant>,
}

impl Boot {
    /// A boot that begins now.
    pub fn begin() -> Self {
        Self { began_ms: now_ms(), milestones: Vec::new(), began: Some(Instant::now()) }
    }

    /// Records that the shim has just reached a milestone.
    pub fn reached(&mut self, milestone: HostMilestone) {
        let at_us = self.now_us();
        self.milestones.push(Milestone { reached: Reached::Host(milestone), at_us });
    }

    fn now_us(&self) -> u64 {
        self.began.map_or(0, |began| began.elapsed().as_micros() as u64)
    }

    /// Records the guest's hello and the milestones in it.
    ///
    /// The guest measures them by a clock that starts with its kernel. Its last milestone directly precedes the hello,
    /// so that one is taken to be now. An impossible time, such as one before the machine's start, is moved to the
    /// nearest possible one.
    pub fn hello_received(&mut self, hello: &Hello) {
        let now = self.now_us();
        let earliest = self.milestones.last().map_or(0, |last| last.at_us);
        let last_ns = hello.timeline.iter().map(|milestone| milestone.boottime_ns).max().unwrap_or(0);
        let place = |ns: u64| now.saturating_sub((last_ns - ns.min(last_ns)) / 1000).max(earliest);
        let guest = |milestone, at_us| Milestone { reached: Reached::Guest(milestone), at_us };
        let mut milestones = vec![guest(GuestMilestone::KernelEntered, place(0))];
        for milestone in hello.timeline.iter().take(GUEST_MILESTONES) {
            let step = milestone.step.enum_value_or_default();
            milestones.push(guest(GuestMilestone::Step(step), place(milestone.boottime_ns)));
        }
        milestones.sort_by_key(|milestone| milestone.at_us);
        self.milestones.extend(milestones);
        self.milestones.push(Milestone { reached: Reached::Host(HostMilestone::HelloReceived), at_us: now });
    }
}

/// A version string from the guest as it is kept: clean, and shorter than other text.
pub fn printable(text: &str) -> String {
    clean(text).chars().take(VERSION_MAX).collect()
}

#[cfg(test)]
mod tests {
    use husk_protos::system::Milestone as GuestReport;
    use serde_json::json;

    use super::*;

    fn hello(timeline: &[(BootStep, u64)]) -> Hello {
        let report =
            |(step, ns): &(BootStep, u64)| GuestReport { step: (*step).into(), boottime_ns: *ns, ..Default::default() };
        Hello { timeline: timeline.iter().map(report).collect(), ..Default::default() }
    }

    /// The guest's milestones with their times relative to the hello, µs.
    fn placed(timeline: &[(BootStep, u64)], earliest: u64) -> Vec<(String, i64)> {
        let mut boot = Boot::begin();
        boot.began = Instant::now().checked_sub(std::time::Duration::from_secs(1));
        boot.milestones.push(Milestone { reached: Reached::Host(HostMilestone::VmmStarted), at_us: earliest });
        boot.hello_received(&hello(timeline));
        let hello = boot.milestones.last().unwrap().at_us as i64;
        let guests = boot.milestones.iter().filter(|milestone| milestone.reached.side() == Side::Guest);
        guests.map(|milestone| (milestone.reached.to_string(), milestone.at_us as i64 - hello)).collect()
    }

    #[test]
    fn a_guests_milestones_are_placed_before_its_hello() {
        let honest = [(BootStep::INIT, 300_000_000), (BootStep::READY, 400_000_000)];
        let expected = [("kernel entered", -400_000), ("init", -100_000), ("ready", 0)];
        assert_eq!(placed(&honest, 10), expected.map(|(name, at)| (name.to_owned(), at)));
        assert_eq!(placed(&[], 10), [("kernel entered".to_owned(), 0)]);
    }

    #[test]
    fn a_dishonest_guests_milestones_are_bounded_and_never_precede_its_machine() {
        let many: Vec<(BootStep, u64)> = (0..1000).map(|n| (BootStep::SYSTEM, n)).collect();
        assert_eq!(placed(&many, 10).len(), 1 + GUEST_MILESTONES);
        let odd = [(BootStep::INIT, u64::MAX), (BootStep::READY, 0), (BootStep::MOUNTS, u64::MAX / 2)];
        for (name, at) in placed(&odd, 900_000) {
            assert!((-110_000..=0).contains(&at), "{name}: {at}");
        }
    }

    #[test]
    fn every_milestone_reads_back_under_the_name_that_earlier_versions_wrote() {
        let host = [
            "configured",
            "QEMU started",
            "virtiofsd started",
            "hello received",
            "guest connected",
            "events subscribed",
        ];
        let hosts = HostMilestone::ALL.map(Reached::Host).into_iter().zip(host.map(|name| ("host", name)));
        let guest =
            ["boot_step_unspecified", "init", "mounts", "clock", "cgroups", "system", "extras", "listening", "ready"];
        let steps = BootStep::VALUES.iter().map(|step| Reached::Guest(GuestMilestone::Step(*step)));
        let guests = steps.zip(guest.map(|name| ("guest", name)));
        let kernel = (Reached::Guest(GuestMilestone::KernelEntered), ("guest", "kernel entered"));
        let other = (Reached::Other { side: Side::Host, name: "init".into() }, ("host", "init"));
        assert_eq!(BootStep::VALUES.len(), guest.len());
        for (reached, (side, name)) in hosts.chain(guests).chain([kernel, other]) {
            let json = serde_json::to_value(Milestone { reached: reached.clone(), at_us: 7 }).unwrap();
            assert_eq!(json, json!({"side": side, "name": name, "at_us": 7}));
            assert_eq!(serde_json::from_value::<Milestone>(json).unwrap().reached, reached);
        }
    }

    #[test]
    fn a_boot_reads_back() {
        let mut boot = Boot::begin();
        boot.reached(HostMilestone::VmmStarted);
        let json = serde_json::to_value(&boot).unwrap();
        assert_eq!(json["milestones"][0]["side"], "host");
        let again: Boot = serde_json::from_value(json).unwrap();
        assert_eq!((again.began_ms, again.milestones), (boot.began_ms, boot.milestones));
    }
}
