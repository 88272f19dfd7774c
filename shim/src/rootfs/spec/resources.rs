//! What becomes of each field of the spec's `linux.resources`, when a container is created and when its limits change.
//! Pure.
//!
//! The guest enforces most limits, because it schedules the container. Fields that name CPUs and memory nodes of the
//! host concern the VM's processes there. Some fields limit what a guest does not have, so nothing is left to do. All
//! others are rejected: the container would run without a limit that its author relies on. docs/resources.md has the
//! table for users.

use oci_spec::runtime::LinuxResources;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::findings::Findings;
use super::limits::Demand;
use super::parse;

/// Most characters of a value that a message shows.
const SHOWN: usize = 200;
/// Where the fields are in a spec.
const PREFIX: &str = "linux.resources";

/// What becomes of a field that is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The guest applies it.
    Guest,
    /// The guest applies it, and 0 means that nothing is set, as for runc.
    GuestUnlessZero,
    /// It concerns the VM's processes on the host.
    Host,
    /// Nothing is left to apply; the log says why.
    Ignored(&'static str),
    Rejected(&'static str),
}

use Fate::{Guest, GuestUnlessZero, Host, Ignored, Rejected};

const NO_DISKS: &str = "the containers of a VM share no disk";
const HOSTS_DISKS: &str = "the VM does not have the host's block devices";
const NO_SWAP: &str = "the VM has no swap";
const KERNEL_MEMORY: &str = "kernel memory counts towards memory.limit";
const NO_REALTIME: &str = "cgroup v2 has no limits for realtime scheduling";
const NO_NETWORK: &str = "cgroup v2 has no network controller, and the host does not see the packets' cgroups";
const NO_RDMA: &str = "the VM has no RDMA devices";

/// Every field of `linux.resources`. Fields with the same parent are next to each other.
const FIELDS: &[(&str, Fate)] = &[
    ("devices", Guest),
    ("memory.limit", GuestUnlessZero),
    ("memory.reservation", GuestUnlessZero),
    ("memory.swap", GuestUnlessZero),
    ("memory.kernel", Ignored(KERNEL_MEMORY)),
    ("memory.kernelTCP", Ignored(KERNEL_MEMORY)),
    ("memory.swappiness", Ignored(NO_SWAP)),
    ("memory.disableOOMKiller", Rejected("cgroup v2 cannot disable the OOM killer")),
    // Limits of cgroup v2 always include the groups below.
    ("memory.useHierarchy", Guest),
    ("memory.checkBeforeUpdate", Guest),
    ("cpu.shares", GuestUnlessZero),
    ("cpu.quota", GuestUnlessZero),
    ("cpu.idle", Guest),
    ("cpu.burst", Guest),
    ("cpu.period", GuestUnlessZero),
    ("cpu.realtimeRuntime", Rejected(NO_REALTIME)),
    ("cpu.realtimePeriod", Rejected(NO_REALTIME)),
    ("cpu.cpus", Host),
    ("cpu.mems", Host),
    ("pids.limit", GuestUnlessZero),
    ("blockIO.weight", Ignored(NO_DISKS)),
    ("blockIO.leafWeight", Ignored(NO_DISKS)),
    ("blockIO.weightDevice", Ignored(NO_DISKS)),
    ("blockIO.throttleReadBpsDevice", Rejected(HOSTS_DISKS)),
    ("blockIO.throttleWriteBpsDevice", Rejected(HOSTS_DISKS)),
    ("blockIO.throttleReadIOPSDevice", Rejected(HOSTS_DISKS)),
    ("blockIO.throttleWriteIOPSDevice", Rejected(HOSTS_DISKS)),
    // The guest ignores sizes that it does not have: a program cannot allocate such pages.
    ("hugepageLimits", Guest),
    ("network.classID", Rejected(NO_NETWORK)),
    ("network.priorities", Rejected(NO_NETWORK)),
    ("rdma", Ignored(NO_RDMA)),
    // By file: see UNIFIED.
    ("unified", Guest),
];

/// The files that `unified` may name. A name that ends in a dot stands for all others of a controller.
const UNIFIED: &[(&str, Fate)] = &[
    ("cpuset.cpus", Host),
    ("cpuset.mems", Host),
    ("cpuset.", Rejected("partitions of the host's CPUs cannot contain a VM's containers")),
    ("cpu.", Guest),
    ("memory.", Guest),
    ("pids.", Guest),
    ("hugetlb.", Guest),
    ("io.weight", Ignored(NO_DISKS)),
    ("io.bfq.weight", Ignored(NO_DISKS)),
    ("io.", Rejected(HOSTS_DISKS)),
    ("rdma.", Ignored(NO_RDMA)),
    ("cgroup.", Rejected("is not a limit")),
];
const UNKNOWN_FILE: &str = "the guest's kernel has no controller of this name";

/// What a container's resources require of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostResources {
    /// CPUs of the host, as in the spec.
    pub(crate) cpus: Option<String>,
    /// Memory nodes of the host, as in the spec.
    pub(crate) mems: Option<String>,
}

/// Leaves in `resources` what the guest applies. Returns what the host does; problems and notes are in `findings`.
pub(super) fn rewrite_resources(resources: &mut LinuxResources, findings: &mut Findings) -> HostResources {
    let not_possible =
        |findings: &mut Findings, error: serde_json::Error| findings.reject(PREFIX, None, error.to_string());
    let mut fields = match serde_json::to_value(&*resources) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) => return HostResources::default(),
        Err(error) => {
            not_possible(findings, error);
            return HostResources::default();
        }
    };
    let host = divide(&mut fields, findings);
    match LinuxResources::deserialize(Value::Object(fields)) {
        Ok(guests) => *resources = guests,
        Err(error) => not_possible(findings, error),
    }
    host
}

/// An update for the guest, and what the host does for it.
#[derive(Debug)]
pub(crate) struct Update {
    /// The JSON of the guest's `LinuxResources`.
    pub(crate) guest: Vec<u8>,
    pub(crate) host: HostResources,
    /// The new limits that the VM must have room for.
    pub(crate) demand: Demand,
    /// What was ignored, for the log.
    pub(crate) notes: Vec<String>,
}

/// Divides the new limits of a container, which are the JSON of a `LinuxResources`.
///
/// # Errors
/// All problems at once.
pub(crate) fn update(json: &[u8]) -> Result<Update, Vec<String>> {
    let invalid = |error: serde_json::Error| vec![format!("{PREFIX}: {error}")];
    let given: Value = serde_json::from_slice(json).map_err(invalid)?;
    let mut resources: LinuxResources = serde_json::from_slice(json).map_err(invalid)?;
    let mut findings = Findings::default();
    let understood = serde_json::to_value(&resources).map_err(invalid)?;
    parse::compare(PREFIX, &given, &understood, &mut findings.notes);
    let host = rewrite_resources(&mut resources, &mut findings);
    if !findings.problems.is_empty() {
        return Err(findings.problems.iter().map(ToString::to_string).collect());
    }
    let guest = serde_json::to_vec(&resources).map_err(invalid)?;
    Ok(Update { guest, host, demand: Demand::of(&resources), notes: findings.notes })
}

/// Removes the fields that are not for the guest.
fn divide(fields: &mut Map<String, Value>, findings: &mut Findings) -> HostResources {
    let mut host = HostResources::default();
    for (path, fate) in FIELDS {
        let Some((parent, name)) = parent_of(fields, path) else { continue };
        let Some(value) = parent.get(name) else { continue };
        let keep = match fate {
            Guest => true,
            GuestUnlessZero => !parse::is_empty(value),
            Host | Ignored(_) | Rejected(_) => {
                if !parse::is_empty(value) {
                    let value = value.clone();
                    take(&format!("{PREFIX}.{path}"), name, *fate, &value, &mut host, findings);
                }
                false
            }
        };
        if !keep {
            parent.remove(name);
        }
    }
    // A part without a field has no meaning, and pids without a limit means 0.
    fields.retain(|_, part| !part.as_object().is_some_and(Map::is_empty));
    check_hugepages(fields, findings);
    divide_unified(fields, &mut host, findings);
    host
}

fn parent_of<'a, 'p>(
    fields: &'a mut Map<String, Value>,
    path: &'p str,
) -> Option<(&'a mut Map<String, Value>, &'p str)> {
    match path.split_once('.') {
        Some((part, name)) => Some((fields.get_mut(part)?.as_object_mut()?, name)),
        None => Some((fields, path)),
    }
}

/// Records what becomes of a field that the guest does not get.
fn take(field: &str, name: &str, fate: Fate, value: &Value, host: &mut HostResources, findings: &mut Findings) {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let shown: String = text.chars().take(SHOWN).collect();
    match fate {
        Host if name.ends_with("cpus") => host.cpus = Some(text),
        Host => host.mems = Some(text),
        Ignored(why) => findings.note(format!("{field} {shown:?}: ignored, {why}")),
        Rejected(why) => findings.reject(field, Some(&shown), why),
        Guest | GuestUnlessZero => {}
    }
}

/// Rejects sizes that no kernel can have. The guest decides about the others.
fn check_hugepages(fields: &Map<String, Value>, findings: &mut Findings) {
    for limit in fields.get("hugepageLimits").and_then(Value::as_array).into_iter().flatten() {
        let size = limit["pageSize"].as_str().unwrap_or_default();
        let field = || format!("{PREFIX}.hugepageLimits");
        if !is_page_size(size) {
            let why = "is not a page size: it must be a power of two and its unit, as in 2MB";
            findings.reject(field(), Some(&size.chars().take(SHOWN).collect::<String>()), why);
        } else if limit["limit"].as_i64().is_none_or(|limit| limit < 0) {
            findings.reject(format!("{}.{size}", field()), Some(&limit["limit"].to_string()), "is not a limit");
        }
    }
}

/// Whether this is a size in the form of the runtime spec and of the kernel's files.
fn is_page_size(size: &str) -> bool {
    let number = ["KB", "MB", "GB"].iter().find_map(|unit| size.strip_suffix(unit));
    number.is_some_and(|number| {
        number.bytes().all(|byte| byte.is_ascii_digit()) && number.parse().is_ok_and(u32::is_power_of_two)
    })
}

fn divide_unified(fields: &mut Map<String, Value>, host: &mut HostResources, findings: &mut Findings) {
    let Some(files) = fields.get_mut("unified").and_then(Value::as_object_mut) else { return };
    files.retain(|file, value| {
        let of_controller = |name: &&str| name.ends_with('.') && file.starts_with(*name) && file.len() > name.len();
        let fate = UNIFIED
            .iter()
            .find(|(name, _)| file == name || of_controller(name))
            .map_or(Rejected(UNKNOWN_FILE), |(_, fate)| *fate);
        let fate = if file.contains('/') || file.ends_with('.') { Rejected(UNKNOWN_FILE) } else { fate };
        if fate == Guest {
            return true;
        }
        take(&format!("{PREFIX}.unified.{file}"), file, fate, value, host, findings);
        false
    });
    if files.is_empty() {
        fields.remove("unified");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxNetwork, LinuxPids};
    use serde::de::{DeserializeOwned, Visitor};
    use serde::forward_to_deserialize_any;
    use serde_json::json;

    use super::*;

    /// A deserializer that only notes which fields a structure asks for.
    struct FieldsOf<'a>(&'a mut &'static [&'static str]);

    impl<'de> serde::Deserializer<'de> for FieldsOf<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("not a structure"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    fn fields<T: DeserializeOwned>() -> BTreeSet<String> {
        let mut fields: &'static [&'static str] = &[];
        assert!(T::deserialize(FieldsOf(&mut fields)).is_err());
        assert!(!fields.is_empty());
        fields.iter().map(|&field| field.to_owned()).collect()
    }

    #[test]
    fn every_field_of_the_runtime_spec_has_a_row() {
        let rows = |part: &str| -> BTreeSet<String> {
            let rows = FIELDS.iter().filter_map(|(path, _)| match path.split_once('.') {
                Some((of, name)) if of == part => Some(name),
                Some((of, _)) if part.is_empty() => Some(of),
                None if part.is_empty() => Some(*path),
                _ => None,
            });
            rows.map(str::to_owned).collect()
        };
        assert_eq!(rows(""), fields::<LinuxResources>());
        assert_eq!(rows("memory"), fields::<LinuxMemory>());
        assert_eq!(rows("cpu"), fields::<LinuxCpu>());
        assert_eq!(rows("pids"), fields::<LinuxPids>());
        assert_eq!(rows("blockIO"), fields::<LinuxBlockIo>());
        assert_eq!(rows("network"), fields::<LinuxNetwork>());
    }

    #[test]
    fn the_documentation_has_the_same_rows() {
        let page = include_str!("../../../../docs/resources.md");
        for (names, prefix) in [(FIELDS, ""), (UNIFIED, "unified.")] {
            for (name, fate) in names.iter().filter(|(name, _)| *name != "unified") {
                let cell = match name.strip_suffix('.') {
                    Some(controller) => format!("`{prefix}{controller}.*`"),
                    None => format!("`{prefix}{name}`"),
                };
                let row = page.lines().find(|line| line.starts_with('|') && line.contains(&cell));
                let row = row.unwrap_or_else(|| panic!("docs/resources.md has no row for {cell}"));
                let expected = match fate {
                    Guest | GuestUnlessZero => "| guest |",
                    Host => "| host |",
                    Ignored(_) => "| ignored |",
                    Rejected(_) => "| rejected |",
                };
                assert!(row.contains(expected), "{cell}: {row}");
            }
        }
    }

    /// What the guest gets, what the host does, and the numbers of notes.
    fn run(resources: &Value) -> Result<(Value, HostResources, usize), Vec<String>> {
        let update = update(&serde_json::to_vec(resources).unwrap())?;
        Ok((serde_json::from_slice(&update.guest).unwrap(), update.host, update.notes.len()))
    }

    #[test]
    fn each_field_goes_where_its_row_says() {
        let guest = |resources: Value| (resources.clone(), Ok((resources, HostResources::default(), 0)));
        let ignored = |resources: Value| (resources, Ok((json!({}), HostResources::default(), 1)));
        let nothing = |resources: Value| (resources, Ok((json!({}), HostResources::default(), 0)));
        let host = |resources: Value, cpus: Option<&str>, mems: Option<&str>| {
            let host = HostResources { cpus: cpus.map(Into::into), mems: mems.map(Into::into) };
            (resources, Ok((json!({}), host, 0)))
        };
        let table = [
            guest(json!({"devices": [{"allow": false, "access": "rwm"}]})),
            guest(json!({"memory": {"limit": 5, "reservation": 4, "swap": -1, "checkBeforeUpdate": true}})),
            guest(json!({"memory": {"useHierarchy": true}})),
            guest(json!({"cpu": {"shares": 2, "quota": -1, "period": 3, "burst": 0, "idle": 0}})),
            guest(json!({"pids": {"limit": -1}})),
            guest(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "16GB", "limit": 9}]})),
            guest(
                json!({"unified": {"memory.high": "1", "cpu.uclamp.min": "2", "pids.max": "3", "hugetlb.2MB.max": "4"}}),
            ),
            nothing(
                json!({"memory": {"limit": 0, "reservation": 0, "swap": 0, "kernel": 0, "disableOOMKiller": false}}),
            ),
            nothing(
                json!({"cpu": {"shares": 0, "quota": 0, "period": 0, "realtimeRuntime": 0, "cpus": "", "mems": ""}}),
            ),
            nothing(json!({"pids": {"limit": 0}, "blockIO": {"weight": 0, "throttleReadBpsDevice": []}, "rdma": {}})),
            nothing(json!({"network": {"classID": 0, "priorities": []}})),
            ignored(json!({"memory": {"kernel": 1}})),
            ignored(json!({"memory": {"kernelTCP": 1}})),
            ignored(json!({"memory": {"swappiness": 60}})),
            ignored(json!({"blockIO": {"weight": 10}})),
            ignored(json!({"blockIO": {"leafWeight": 10}})),
            ignored(json!({"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "weight": 7}]}})),
            ignored(json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}})),
            ignored(json!({"unified": {"io.weight": "10"}})),
            ignored(json!({"unified": {"io.bfq.weight": "10"}})),
            ignored(json!({"unified": {"rdma.max": "mlx5_1 hca_handle=3"}})),
            ignored(json!({"later": 1})),
            host(json!({"cpu": {"cpus": "2-3", "mems": "1"}}), Some("2-3"), Some("1")),
            host(json!({"unified": {"cpuset.cpus": "5"}}), Some("5"), None),
            host(json!({"unified": {"cpuset.mems": "0"}}), None, Some("0")),
        ];
        for (resources, expected) in table {
            assert_eq!(run(&resources), expected, "{resources}");
        }
    }

    #[test]
    fn a_limit_that_nothing_would_apply_is_rejected_by_field_and_value() {
        let rejected = |resources: Value, problem: &str| (resources, format!("linux.resources.{problem}"));
        let disk = json!([{"major": 8, "minor": 0, "rate": 7}]);
        let no_disk = r#" "[{\"major\":8,\"minor\":0,\"rate\":7}]": the VM does not have the host's block devices"#;
        let table = [
            rejected(
                json!({"memory": {"disableOOMKiller": true}}),
                r#"memory.disableOOMKiller "true": cgroup v2 cannot disable the OOM killer"#,
            ),
            rejected(
                json!({"cpu": {"realtimeRuntime": 7}}),
                r#"cpu.realtimeRuntime "7": cgroup v2 has no limits for realtime scheduling"#,
            ),
            rejected(
                json!({"cpu": {"realtimePeriod": 7}}),
                r#"cpu.realtimePeriod "7": cgroup v2 has no limits for realtime scheduling"#,
            ),
            rejected(json!({"network": {"classID": 7}}), &format!(r#"network.classID "7": {NO_NETWORK}"#)),
            rejected(
                json!({"network": {"priorities": [{"name": "e", "priority": 1}]}}),
                &format!(r#"network.priorities "[{{\"name\":\"e\",\"priority\":1}}]": {NO_NETWORK}"#),
            ),
            rejected(
                json!({"blockIO": {"throttleReadBpsDevice": disk}}),
                &format!("blockIO.throttleReadBpsDevice{no_disk}"),
            ),
            rejected(
                json!({"blockIO": {"throttleWriteBpsDevice": disk}}),
                &format!("blockIO.throttleWriteBpsDevice{no_disk}"),
            ),
            rejected(
                json!({"blockIO": {"throttleReadIOPSDevice": disk}}),
                &format!("blockIO.throttleReadIOPSDevice{no_disk}"),
            ),
            rejected(
                json!({"blockIO": {"throttleWriteIOPSDevice": disk}}),
                &format!("blockIO.throttleWriteIOPSDevice{no_disk}"),
            ),
            rejected(
                json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}),
                r#"hugepageLimits "3MB": is not a page size: it must be a power of two and its unit, as in 2MB"#,
            ),
            rejected(
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": -1}]}),
                r#"hugepageLimits.2MB "-1": is not a limit"#,
            ),
            rejected(json!({"unified": {"cgroup.freeze": "1"}}), r#"unified.cgroup.freeze "1": is not a limit"#),
            rejected(
                json!({"unified": {"io.max": "8:0 rbps=1"}}),
                r#"unified.io.max "8:0 rbps=1": the VM does not have the host's block devices"#,
            ),
            rejected(
                json!({"unified": {"cpuset.cpus.partition": "root"}}),
                r#"unified.cpuset.cpus.partition "root": partitions of the host's CPUs cannot contain a VM's containers"#,
            ),
            rejected(json!({"unified": {"cpu./../x": "1"}}), &format!(r#"unified.cpu./../x "1": {UNKNOWN_FILE}"#)),
            rejected(json!({"unified": {"misc.max": "1"}}), &format!(r#"unified.misc.max "1": {UNKNOWN_FILE}"#)),
            rejected(json!({"unified": {"memory.": "1"}}), &format!(r#"unified.memory. "1": {UNKNOWN_FILE}"#)),
        ];
        for (resources, problem) in table {
            assert_eq!(run(&resources), Err(vec![problem]), "{resources}");
        }
        let both = run(&json!({"network": {"classID": 7}, "memory": {"disableOOMKiller": true}}));
        assert_eq!(both.unwrap_err().len(), 2, "all problems are reported at once");
    }

    #[test]
    fn what_is_not_the_json_of_resources_is_rejected() {
        for broken in ["", "7", r#"{"memory": "much"}"#] {
            let problems = update(broken.as_bytes()).unwrap_err();
            assert!(problems[0].starts_with("linux.resources: "), "{problems:?}");
        }
    }
}
