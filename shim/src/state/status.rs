//! The status of a sandbox: the types that the shim and `husk` exchange as JSON, and how they are filled from
//! `state.json`, which also works when the shim is dead. `sandbox` adds what only the running shim knows.
//!
//! Readers ignore unknown fields and give most missing ones a default, so that `husk` can show the sandbox of an older
//! shim.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::state::facts::{Boot, MachineRecord, Milestone};
use crate::state::life;
use crate::state::life::{Life, VmState};
use crate::state::links::NetworkStatus;
pub use crate::state::live_status::{DiskStatus, FilesStatus, MemoryStatus, RootStatus, WatchStatus, WatchedVolume};
use crate::state::store::State;
use crate::state::volumes::SharedVolume;

/// A name that this version knows, or one that only another version knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Name<T> {
    /// Known here.
    Known(T),
    /// As the other version wrote it.
    Other(String),
}

impl<T: fmt::Display> fmt::Display for Name<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(known) => known.fmt(f),
            Self::Other(name) => name.fmt(f),
        }
    }
}

/// Everything that is known about a sandbox: the result of `compute.vm.status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The part that `compute.vm.list` returns too.
    #[serde(flatten)]
    pub summary: Summary,
    /// The VM's last state changes, oldest first.
    pub transitions: Vec<TransitionStatus>,
    /// The last boot.
    pub boot: Option<BootProfile>,
    /// The sandbox's folder.
    pub dir: PathBuf,
    /// What only a running shim knows. `None`, and absent from the JSON, when the status was read from disk.
    #[serde(flatten)]
    pub live: Option<Live>,
}

/// A sandbox as a list shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Summary {
    /// The sandbox's id.
    pub sandbox: String,
    /// containerd's namespace.
    pub namespace: String,
    /// When the sandbox was created, RFC 3339.
    pub created: Option<String>,
    /// The same in milliseconds since the epoch.
    pub created_ms: Option<u64>,
    /// The sandbox's shim.
    pub shim: ShimStatus,
    /// The VM's state.
    pub state: Option<Name<VmState>>,
    /// The machine that was started last.
    pub machine: Option<MachineStatus>,
    /// The containers, by id.
    pub containers: Vec<ContainerStatus>,
}

/// The result of `compute.vm.list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct List {
    /// One sandbox: each has a socket of its own.
    pub sandboxes: Vec<Summary>,
}

/// What the guest reported last. Nothing of it is on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Live {
    /// `None` without a VM.
    pub health: Option<HealthStatus>,
    /// `None` without a supervisor, as far as is known.
    pub supervisor: Option<SupervisorStatus>,
    /// `None` without a VM.
    pub network: Option<NetworkStatus>,
    /// `None`, and absent from the JSON, without a VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryStatus>,
    /// `None`, and absent from the JSON, without a VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<FilesStatus>,
    /// Folders and files of the host that another running sandbox can write to as well. Absent from the JSON when empty.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub shared_volumes: BTreeSet<SharedVolume>,
    /// The sources whose changes by the host reach the guest. `None`, and absent from the JSON, without such a source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watches: Option<WatchStatus>,
    /// The disks that containers use. Absent from the JSON when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskStatus>,
    /// The root filesystems of the containers. Absent from the JSON when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub roots: Vec<RootStatus>,
}

/// A sandbox's shim.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShimStatus {
    /// Its PID.
    pub pid: Option<u32>,
    /// Whether that process runs. False if that cannot be determined.
    pub alive: bool,
}

/// A VM's machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MachineStatus {
    /// The PID of the VMM.
    pub pid: u32,
    /// Whether that process runs. False if that cannot be determined.
    pub alive: bool,
    /// The guest's address on vsock.
    pub cid: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Virtual CPUs that it can have. 0 if that is not known.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_vcpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Guest memory that it can have, MiB. 0 if that is not known.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_memory_mib: u64,
    /// The VMM's own cache, MiB: translated code of the guest. 0 if it has none, or if that is not known.
    #[serde(skip_serializing_if = "is_zero")]
    pub cache_mib: u64,
    /// How guest instructions are executed.
    pub accel: String,
    /// The VMM's board.
    pub board: String,
    /// The kernel's version as the guest reported it.
    pub kernel: Option<String>,
    /// The init's version as the guest reported it.
    pub init: Option<String>,
    /// The kernel's file.
    pub kernel_file: String,
    /// The initramfs's file.
    pub initrd_file: String,
    /// The guest is in debug mode.
    pub debug: bool,
    /// The network is in user mode.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub user_mode: bool,
    /// The ports of the host that lead to the guest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<String>,
}

/// A container of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerStatus {
    /// Its id.
    pub id: String,
    /// It is being created. Absent from the JSON when false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub creating: bool,
    /// Its processes; `None`, and absent from the JSON, while it is being created and when the status was read from
    /// disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processes: Option<Vec<ProcessStatus>>,
}

/// A process of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessStatus {
    /// The exec's id; empty for the container's init.
    pub exec: String,
    /// Its PID in the guest; 0 before it has one.
    pub pid: u32,
    /// Its exit status, once it has exited.
    pub exit_status: Option<u32>,
}

/// A state change of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransitionStatus {
    /// The state before.
    pub from: Name<VmState>,
    /// The state after.
    pub to: Name<VmState>,
    /// Why.
    #[serde(default)]
    pub cause: String,
    /// When, RFC 3339.
    #[serde(default)]
    pub at: String,
    /// When, milliseconds since the epoch.
    #[serde(default)]
    pub at_ms: u64,
}

/// A VM's boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BootProfile {
    /// When it began, RFC 3339.
    pub began: String,
    /// When it began, milliseconds since the epoch.
    pub began_ms: u64,
    /// What it reached, in that order.
    pub milestones: Vec<Milestone>,
}

/// A guest's heartbeats.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Heartbeats {
    /// Time between two heartbeats.
    pub heartbeat_interval_ms: u64,
    /// Time since the last one, or since the guest's hello.
    pub since_heartbeat_ms: u64,
    /// Heartbeats that are overdue.
    pub missed: u32,
    /// They are overdue because the host gives the VM too little CPU time. Absent from the JSON if not.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub starved: bool,
}

/// A VM's health.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthStatus {
    /// The guest's heartbeats.
    #[serde(flatten)]
    pub heartbeats: Heartbeats,
    /// The VM runs.
    pub alive: bool,
    /// Why it does not.
    pub cause_of_death: Option<String>,
}

/// The supervisor in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SupervisorStatus {
    /// running, waiting, given up, stopped or unknown.
    pub state: String,
    /// Its PID in the guest, while it runs.
    pub pid: Option<u32>,
    /// How often it was restarted.
    pub restarts: u32,
    /// How it exited last.
    pub last_end: Option<String>,
    /// Time until the next restart, while it waits for one.
    pub wait_ms: Option<u64>,
}

/// A time as RFC 3339, always with three digits after the second. The number may come from a file, so it can be any.
pub fn utc(ms: u64) -> String {
    let second = i64::try_from(ms / 1000).ok().and_then(|second| OffsetDateTime::from_unix_timestamp(second).ok());
    match second.and_then(|second| second.format(&Rfc3339).ok()) {
        Some(second) => format!("{}.{:03}Z", second.trim_end_matches('Z'), ms % 1000),
        None => format!("{ms} ms after 1970"),
    }
}

/// The status as far as it is on disk.
pub fn of(state: &State) -> Status {
    Status {
        summary: summary(state),
        transitions: state.vm().into_iter().flat_map(Life::transitions).map(TransitionStatus::from).collect(),
        boot: state.boot().map(BootProfile::from),
        dir: state.dir().to_owned(),
        live: None,
    }
}

/// The summary as far as it is on disk.
pub fn summary(state: &State) -> Summary {
    let container = |id: &String| ContainerStatus { id: id.clone(), ..ContainerStatus::default() };
    Summary {
        sandbox: state.sandbox().to_owned(),
        namespace: state.namespace().to_owned(),
        created: state.created_ms().map(utc),
        created_ms: state.created_ms(),
        shim: ShimStatus {
            pid: state.shim().map(|shim| shim.pid),
            // `husk` reports the error itself when it fails to connect to the shim.
            alive: state.shim_lives().unwrap_or(false),
        },
        state: state.vm().map(|vm| Name::Known(vm.state())),
        machine: state.machine().map(MachineStatus::from),
        containers: state.containers().keys().map(container).collect(),
    }
}

fn is_zero<T: Default + PartialEq>(number: &T) -> bool {
    *number == T::default()
}

impl From<&MachineRecord> for MachineStatus {
    fn from(machine: &MachineRecord) -> Self {
        let MachineRecord {
            process,
            cid,
            vcpus,
            max_vcpus,
            memory_mib,
            max_memory_mib,
            cache_mib,
            accel,
            board,
            kernel_file,
            initrd_file,
            debug,
            user_mode,
            ports,
            kernel,
            init,
        } = machine.clone();
        Self {
            pid: process.pid,
            alive: process.runs().unwrap_or(false),
            cid,
            vcpus,
            max_vcpus,
            memory_mib,
            max_memory_mib,
            cache_mib,
            accel,
            board,
            kernel,
            init,
            kernel_file,
            initrd_file,
            debug,
            user_mode,
            ports,
        }
    }
}

impl From<&life::Transition> for TransitionStatus {
    fn from(transition: &life::Transition) -> Self {
        Self {
            from: Name::Known(transition.from),
            to: Name::Known(transition.to),
            cause: transition.cause.clone(),
            at: utc(transition.at_ms),
            at_ms: transition.at_ms,
        }
    }
}

impl From<&Boot> for BootProfile {
    fn from(boot: &Boot) -> Self {
        Self { began: utc(boot.began_ms), began_ms: boot.began_ms, milestones: boot.milestones.clone() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn times_have_one_width_unless_they_are_out_of_range() {
        let table = [
            (0, "1970-01-01T00:00:00.000Z"),
            (1_795_256_789_010, "2026-11-21T10:26:29.010Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
            (u64::MAX, "18446744073709551615 ms after 1970"),
        ];
        for (ms, expected) in table {
            assert_eq!(utc(ms), expected);
        }
    }

    fn milestones() -> Value {
        json!([
            {"at_us": 2000, "name": "configured", "side": "host"},
            {"at_us": 9000, "name": "QEMU started", "side": "host"},
            {"at_us": 11000, "name": "virtiofsd started", "side": "host"},
            {"at_us": 50000, "name": "kernel entered", "side": "guest"},
            {"at_us": 60000, "name": "init", "side": "guest"},
            {"at_us": 61000, "name": "clock", "side": "guest"},
            {"at_us": 61500, "name": "boot_step_unspecified", "side": "guest"},
            {"at_us": 70000, "name": "hello received", "side": "host"},
            {"at_us": 71000, "name": "guest connected", "side": "host"},
            {"at_us": 72000, "name": "events subscribed", "side": "host"},
        ])
    }

    /// What the first version of husk wrote.
    fn state_json() -> Value {
        json!({
            "version": 1, "namespace": "default", "sandbox": "web", "shim": {"pid": 4_000_001, "start_time": 7},
            "containers": {"web": {"bundle": "/b"}, "side": {"bundle": "/c"}}, "created_ms": 1_795_256_789_012_u64,
            "vm": {"state": "Failed", "transitions": [
                {"from": "Pending", "to": "Provisioning", "cause": "a container needs it",
                    "at_ms": 1_795_256_789_100_u64},
                {"from": "Running", "to": "Failed", "cause": "QEMU was killed by signal 9",
                    "at_ms": 1_795_256_790_000_u64}]},
            "machine": {"process": {"pid": 4_000_002, "start_time": 8}, "cid": 3, "vcpus": 2, "memory_mib": 256,
                "accel": "Kvm", "board": "Microvm", "kernel_file": "/k", "initrd_file": "/i", "debug": true,
                "kernel": "6.12.1", "init": "0.1.0"},
            "boot": {"began_ms": 1_795_256_789_100_u64, "milestones": milestones()},
            "journal": [],
        })
    }

    /// What the first version of husk made of it, printed by that version.
    fn status_json(dir: &str) -> Value {
        json!({
            "boot": {"began": "2026-11-21T10:26:29.100Z", "began_ms": 1_795_256_789_100_u64,
                "milestones": milestones()},
            "containers": [{"id": "side"}, {"id": "web"}],
            "created": "2026-11-21T10:26:29.012Z",
            "created_ms": 1_795_256_789_012_u64,
            "dir": dir,
            "machine": {"accel": "Kvm", "alive": false, "board": "Microvm", "cid": 3, "debug": true, "init": "0.1.0",
                "initrd_file": "/i", "kernel": "6.12.1", "kernel_file": "/k", "memory_mib": 256, "pid": 4_000_002,
                "vcpus": 2},
            "namespace": "default",
            "sandbox": "web",
            "shim": {"alive": false, "pid": 4_000_001},
            "state": "Failed",
            "transitions": [
                {"at": "2026-11-21T10:26:29.100Z", "at_ms": 1_795_256_789_100_u64, "cause": "a container needs it",
                    "from": "Pending", "to": "Provisioning"},
                {"at": "2026-11-21T10:26:30.000Z", "at_ms": 1_795_256_790_000_u64,
                    "cause": "QEMU was killed by signal 9", "from": "Running", "to": "Failed"}],
        })
    }

    #[test]
    fn a_status_from_disk_has_the_json_of_earlier_versions() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("default/web");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("state.json"), state_json().to_string()).unwrap();
        let state = State::load(base.path(), "default", "web").unwrap();
        let status = of(&state);
        let mut expected = status_json(dir.to_str().unwrap());
        assert_eq!(serde_json::to_value(&status).unwrap(), expected);

        for key in ["transitions", "boot", "dir"] {
            expected.as_object_mut().unwrap().remove(key).unwrap();
        }
        assert_eq!(serde_json::to_value(summary(&state)).unwrap(), expected);

        let new = State::create(base.path(), "default", "new").unwrap();
        let json = serde_json::to_value(of(&new)).unwrap();
        let expected = [("boot", json!(null)), ("containers", json!([])), ("machine", json!(null))];
        for (key, expected) in expected.into_iter().chain([("transitions", json!([])), ("state", json!("Pending"))]) {
            assert_eq!(json.get(key), Some(&expected), "{key}");
        }
    }

    #[test]
    fn a_status_from_a_shim_has_the_json_of_earlier_versions_and_reads_back() {
        let mut json = status_json("/run/husk/default/web");
        json["containers"] = json!([
            {"id": "new", "creating": true},
            {"id": "web", "processes": [
                {"exec": "", "pid": 20, "exit_status": null},
                {"exec": "sh", "pid": 0, "exit_status": 137}]},
        ]);
        let table = [
            (json!(null), json!(null), json!(null)),
            (
                json!({"heartbeat_interval_ms": 10000, "since_heartbeat_ms": 12000, "missed": 1, "alive": true,
                    "cause_of_death": null}),
                json!({"state": "waiting", "pid": null, "restarts": 3, "last_end": "exited with status 1",
                    "wait_ms": 4000}),
                json!({"netns": "/run/netns/pod", "problems": [], "links": [{"mac": "02:00:00:00:00:01",
                    "guest": {"name": "eth0", "mtu": 1500, "up": true, "carrier": true,
                        "addresses": ["10.88.0.7/16"],
                        "counters": {"received_bytes": 1, "received_packets": 2, "received_errors": 3,
                            "received_dropped": 4, "sent_bytes": 5, "sent_packets": 6, "sent_errors": 7,
                            "sent_dropped": 8}},
                    "host": {"nic": "02:00:00:00:00:01", "tap": "husk-2", "link": {"name": "eth0", "index": 2,
                        "mac": "02:00:00:00:00:01", "mtu": 1500, "up": true}}}]}),
            ),
        ];
        for (health, supervisor, network) in table {
            json["health"] = health;
            json["supervisor"] = supervisor;
            json["network"] = network;
            let status: Status = serde_json::from_value(json.clone()).unwrap();
            assert_eq!(serde_json::to_value(&status).unwrap(), json);
        }
    }

    #[test]
    fn a_status_of_another_version_is_read_as_far_as_it_is_known() {
        let json = json!({
            "sandbox": "web", "state": "Hibernating", "weather": {"sun": true},
            "machine": {"pid": 7, "colour": "red"},
            "containers": [{"id": "web", "processes": [{"pid": 5, "mood": "good"}]}],
            "transitions": [{"from": "Running", "to": "Hibernating"}],
            "boot": {"milestones": [{"side": "guest", "name": "waxed", "at_us": 3}]},
            "health": {"missed": 2},
        });
        let status: Status = serde_json::from_value(json).unwrap();
        assert_eq!(status.summary.state.unwrap().to_string(), "Hibernating");
        assert_eq!(status.transitions[0].from, Name::Known(VmState::Running));
        assert_eq!(status.summary.machine.unwrap().pid, 7);
        assert_eq!(status.summary.containers[0].processes.as_ref().unwrap()[0].pid, 5);
        assert_eq!(status.boot.unwrap().milestones[0].reached.to_string(), "waxed");
        assert_eq!(status.live.unwrap().health.unwrap().heartbeats.missed, 2);
    }
}
