//! Updates a container's limits (linux.resources of the runtime spec). [`plan`] decides on all writes and reports all
//! problems at once; [`apply`] performs all writes or none. The values are those that a create with the same limits
//! sets.

use std::fs;
use std::io::{self, ErrorKind};
use std::ops::RangeInclusive;
use std::path::Path;

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use super::file::read;

/// A value to write to a file of the cgroup.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Write {
    /// The spec's field that requires the write.
    field: String,
    file: String,
    value: String,
}

/// The current state that the decisions depend on.
#[derive(Debug, Default)]
pub(crate) struct Present {
    /// memory.max; None means unlimited.
    memory_max: Option<i64>,
    memory_current: i64,
    /// The quota as cpu.max contains it.
    quota: String,
    burst: u64,
    idle: bool,
    /// The parent's cpuset.cpus.effective and cpuset.mems.effective.
    cpus: String,
    mems: String,
    /// Huge page sizes that also have a limit for reservations.
    reserving: Vec<String>,
}

impl Present {
    /// Reads the state of a group.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(crate) fn of(group: &Path) -> io::Result<Self> {
        let text = |file: &str| read(group, file).map(|text| text.unwrap_or_default().trim().to_owned());
        let parents = |file: &str| match group.parent() {
            Some(parent) => read(parent, file).map(|text| text.unwrap_or_default().trim().to_owned()),
            None => Ok(String::new()),
        };
        let mut reserving = Vec::new();
        for entry in fs::read_dir(group)? {
            let name = entry?.file_name();
            let size = name.to_str().and_then(|name| name.strip_prefix("hugetlb.")?.strip_suffix(".rsvd.max"));
            reserving.extend(size.map(str::to_owned));
        }
        Ok(Self {
            memory_max: text("memory.max")?.parse().ok(),
            memory_current: text("memory.current")?.parse().unwrap_or(0),
            quota: text("cpu.max")?.split(' ').next().unwrap_or_default().to_owned(),
            burst: text("cpu.max.burst")?.parse().unwrap_or(0),
            idle: text("cpu.idle")? == "1",
            cpus: parents("cpuset.cpus.effective")?,
            mems: parents("cpuset.mems.effective")?,
            reserving,
        })
    }
}

/// Removes the limits for huge pages of sizes that the kernel does not have, and names them. No process can allocate such
/// pages. Clients limit every size of their host.
pub(crate) fn drop_absent_page_sizes(resources: &mut LinuxResources, group: &Path) -> Vec<String> {
    let mut absent = Vec::new();
    let mut exists = |field: &str, size: &str| {
        let exists = size.contains('/') || group.join(format!("hugetlb.{size}.max")).exists();
        if !exists {
            absent.push(format!("linux.resources.{field}{size}: the guest has no huge pages of this size"));
        }
        exists
    };
    if let Some(limits) = resources.hugepage_limits_mut() {
        limits.retain(|limit| exists("hugepageLimits.", limit.page_size()));
    }
    if let Some(files) = resources.unified_mut() {
        let size = |file: &str| file.strip_prefix("hugetlb.").and_then(|rest| Some(rest.split_once('.')?.0.to_owned()));
        files.retain(|file, _| size(file).is_none_or(|size| exists("unified.hugetlb.", &size)));
    }
    absent
}

/// Decides what to write. As with runc, 0 keeps a limit and -1 removes it.
///
/// # Errors
/// All problems, each with the name of its field.
pub(crate) fn plan(resources: &LinuxResources, present: &Present) -> Result<Vec<Write>, Vec<String>> {
    let mut plan = UpdatePlan::default();
    if let Some(memory) = resources.memory() {
        plan.memory(memory, present);
    }
    if let Some(cpu) = resources.cpu() {
        plan.cpu(cpu, present);
    }
    if let Some(pids) = resources.pids() {
        plan.limit("linux.resources.pids.limit", "pids.max", pids.limit());
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        plan.huge_pages(limit, present);
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        let field = format!("linux.resources.unified.{file}");
        // The core files (cgroup.procs, cgroup.freeze) are not limits.
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            plan.problem(&field, "is not the name of a limit");
        } else {
            plan.write(&field, file, value);
        }
    }
    if plan.problems.is_empty() { Ok(plan.writes) } else { Err(plan.problems) }
}

#[derive(Default)]
struct UpdatePlan {
    writes: Vec<Write>,
    problems: Vec<String>,
}

impl UpdatePlan {
    fn write(&mut self, field: &str, file: &str, value: impl ToString) {
        self.writes.push(Write { field: field.into(), file: file.into(), value: value.to_string() });
    }

    fn problem(&mut self, field: &str, what: impl std::fmt::Display) {
        self.problems.push(format!("{field}: {what}"));
    }

    fn limit(&mut self, field: &str, file: &str, value: i64) {
        match value {
            0 => {}
            -1 => self.write(field, file, "max"),
            1.. => self.write(field, file, value),
            _ => self.problem(field, format_args!("{value} is not a limit")),
        }
    }

    fn memory(&mut self, memory: &LinuxMemory, present: &Present) {
        const LIMIT: &str = "linux.resources.memory.limit";
        let limit = memory.limit().unwrap_or(0);
        let used = present.memory_current;
        if memory.check_before_update() == Some(true) && (1..used).contains(&limit) {
            self.problem(LIMIT, format_args!("{limit} is less than the {used} bytes in use"));
        }
        // Without an explicit swap limit, unlimited memory means unlimited swap.
        let swap = memory.swap().unwrap_or(if limit == -1 { -1 } else { 0 });
        self.swap(swap, if limit == 0 { present.memory_max.unwrap_or(-1) } else { limit });
        self.limit(LIMIT, "memory.max", limit);
        self.limit("linux.resources.memory.reservation", "memory.low", memory.reservation().unwrap_or(0));
    }

    /// The spec limits memory and swap together, the kernel swap alone.
    fn swap(&mut self, both: i64, memory: i64) {
        const SWAP: &str = "linux.resources.memory.swap";
        match both {
            0 => {}
            -1 => self.write(SWAP, "memory.swap.max", "max"),
            1.. if memory == -1 => self.problem(SWAP, "requires a memory limit"),
            1.. if both < memory => self.problem(SWAP, format_args!("{both} is less than the memory limit {memory}")),
            1.. => self.write(SWAP, "memory.swap.max", both - memory),
            _ => self.problem(SWAP, format_args!("{both} is not a limit")),
        }
    }

    fn cpu(&mut self, cpu: &LinuxCpu, present: &Present) {
        if cpu.realtime_period().is_some_and(|value| value != 0)
            || cpu.realtime_runtime().is_some_and(|value| value != 0)
        {
            self.problem("linux.resources.cpu.realtimeRuntime", "not supported by cgroup v2");
        }
        let idle = cpu.idle().map_or(present.idle, |idle| idle == 1);
        if let Some(value) = cpu.idle() {
            self.write("linux.resources.cpu.idle", "cpu.idle", value);
        }
        // The kernel rejects a weight for an idle group.
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && !idle) {
            self.write("linux.resources.cpu.shares", "cpu.weight", weight(shares));
        }
        let burst = cpu.burst().filter(|burst| *burst != present.burst);
        let write_burst = |plan: &mut Self| {
            if let Some(burst) = burst {
                plan.write("linux.resources.cpu.burst", "cpu.max.burst", burst);
            }
        };
        // The burst must never exceed the quota: shrink it before the quota, grow it after.
        let shrinks = burst.is_some_and(|burst| burst < present.burst);
        if shrinks {
            write_burst(self);
        }
        let quota = match cpu.quota().unwrap_or(0) {
            0 => present.quota.clone(),
            ..0 => "max".to_owned(),
            quota => quota.to_string(),
        };
        match (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0)) {
            (0, 0) => {}
            (_, 0) => self.write("linux.resources.cpu.quota", "cpu.max", quota),
            (_, period) => self.write("linux.resources.cpu.quota", "cpu.max", format_args!("{quota} {period}")),
        }
        if !shrinks {
            write_burst(self);
        }
        self.set("linux.resources.cpu.cpus", "cpuset.cpus", cpu.cpus(), &present.cpus);
        self.set("linux.resources.cpu.mems", "cpuset.mems", cpu.mems(), &present.mems);
    }

    /// Rejects CPUs or memory nodes that the guest does not have. The kernel would accept them and use all that exist.
    fn set(&mut self, field: &str, file: &str, requested: &Option<String>, available: &str) {
        let Some(requested) = requested.as_deref().filter(|set| !set.is_empty()) else { return };
        let (Some(ranges), Some(all)) = (ranges(requested), ranges(available)) else {
            return self.problem(field, format_args!("{requested:?} is not a list of numbers"));
        };
        let within =
            |range: &RangeInclusive<u32>| all.iter().any(|a| a.contains(range.start()) && a.contains(range.end()));
        if ranges.iter().all(within) {
            self.write(field, file, requested);
        } else {
            self.problem(field, format_args!("the guest has {available}, not {requested}"));
        }
    }

    fn huge_pages(&mut self, limit: &LinuxHugepageLimit, present: &Present) {
        let size = limit.page_size();
        let field = format!("linux.resources.hugepageLimits.{size}");
        // 0 is a limit here.
        let value = limit.limit().to_string();
        if size.contains(['/', '.']) || limit.limit() < 0 {
            return self.problem(&field, format_args!("{value} for pages of {size:?} is not a limit"));
        }
        self.write(&field, &format!("hugetlb.{size}.max"), &value);
        if present.reserving.contains(size) {
            self.write(&field, &format!("hugetlb.{size}.rsvd.max"), &value);
        }
    }
}

/// Converts cgroup v1 shares (2 to 262144, default 1024) to a v2 weight (1 to 10000, default 100). The curve is that of
/// runc since 1.3.2 and of libcgroups, which sets the weight at create.
fn weight(shares: u64) -> u64 {
    let log = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
}

/// Parses the list format of cpuset(7): `0-3,7`.
fn ranges(list: &str) -> Option<Vec<RangeInclusive<u32>>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = first.trim().parse().ok()?..=last.trim().parse().ok()?;
        (range.start() <= range.end()).then_some(range)
    };
    list.trim().split(',').map(range).collect()
}

/// Precedes the failed write in a message.
const NOT_RESTORED: &str = "earlier limits could not be restored after a failure to ";

/// A limit that the kernel rejected.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {}write {value:?} to {file}", if *restored { "" } else { NOT_RESTORED })]
pub(crate) struct LimitError {
    field: String,
    file: String,
    value: String,
    /// Whether the limits that were written before have their old values again.
    restored: bool,
    pub(crate) source: io::Error,
}

/// Performs all writes, or restores the old values after a failure.
///
/// # Errors
/// The first write that the kernel rejects.
pub(crate) fn apply(group: &Path, writes: &[Write]) -> Result<(), LimitError> {
    let mut before: Vec<(&str, String)> = Vec::new();
    for write in writes {
        let file = group.join(&write.file);
        let written = fs::read_to_string(&file).and_then(|old| put(&file, &write.value).map(|()| old));
        let written = written.map_err(|error| match error.kind() {
            ErrorKind::NotFound => io::Error::new(ErrorKind::InvalidInput, "the guest's kernel has no such limit"),
            _ => error,
        });
        match written {
            Ok(old) => before.push((&write.file, old)),
            Err(source) => {
                let restored = before.iter().rev().all(|(file, old)| put(&group.join(file), old.trim_end()).is_ok());
                let Write { field, file, value } = write;
                let (field, file, value) = (field.clone(), file.clone(), value.clone());
                return Err(LimitError { field, file, value, restored, source });
            }
        }
    }
    Ok(())
}

/// Appends a newline: an empty write would not reach the kernel.
fn put(file: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(file)?;
    io::Write::write_all(&mut file, format!("{value}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use husk_protos::chain::Chain;
    use serde_json::{Value, json};

    use super::*;

    fn present() -> Present {
        Present {
            memory_max: Some(1 << 20),
            memory_current: 4096,
            quota: "50000".into(),
            burst: 1000,
            idle: false,
            cpus: "0-1".into(),
            mems: "0".into(),
            reserving: vec!["2MB".into()],
        }
    }

    fn planned(resources: Value) -> Result<Vec<(String, String)>, Vec<String>> {
        let resources = serde_json::from_value(resources).unwrap();
        plan(&resources, &present()).map(|all| all.into_iter().map(|write| (write.file, write.value)).collect())
    }

    #[test]
    fn each_limit_is_written_to_its_file() {
        let cases = [
            (json!({}), vec![]),
            (json!({"memory": {"limit": 2097152}}), vec![("memory.max", "2097152")]),
            (json!({"memory": {"limit": -1}}), vec![("memory.swap.max", "max"), ("memory.max", "max")]),
            (json!({"memory": {"limit": 0, "reservation": 7}}), vec![("memory.low", "7")]),
            (json!({"memory": {"limit": 100, "swap": 150}}), vec![("memory.swap.max", "50"), ("memory.max", "100")]),
            (json!({"memory": {"swap": 1048577}}), vec![("memory.swap.max", "1")]),
            (json!({"cpu": {"shares": 1024}}), vec![("cpu.weight", "100")]),
            (json!({"cpu": {"shares": 2}}), vec![("cpu.weight", "1")]),
            (json!({"cpu": {"shares": 262144}}), vec![("cpu.weight", "10000")]),
            (json!({"cpu": {"idle": 1, "shares": 5}}), vec![("cpu.idle", "1")]),
            (json!({"cpu": {"quota": 20000}}), vec![("cpu.max", "20000")]),
            (json!({"cpu": {"quota": 20000, "period": 10000}}), vec![("cpu.max", "20000 10000")]),
            (json!({"cpu": {"quota": -1, "period": 10000}}), vec![("cpu.max", "max 10000")]),
            (json!({"cpu": {"period": 10000}}), vec![("cpu.max", "50000 10000")]),
            (json!({"cpu": {"quota": 9, "burst": 9}}), vec![("cpu.max.burst", "9"), ("cpu.max", "9")]),
            (json!({"cpu": {"quota": 9000, "burst": 9000}}), vec![("cpu.max", "9000"), ("cpu.max.burst", "9000")]),
            (json!({"cpu": {"cpus": "1", "mems": "0"}}), vec![("cpuset.cpus", "1"), ("cpuset.mems", "0")]),
            (json!({"pids": {"limit": 5}}), vec![("pids.max", "5")]),
            (json!({"pids": {"limit": -1}}), vec![("pids.max", "max")]),
            (
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}),
                vec![("hugetlb.2MB.max", "0"), ("hugetlb.2MB.rsvd.max", "0")],
            ),
            (json!({"unified": {"memory.high": "9"}}), vec![("memory.high", "9")]),
        ];
        for (resources, expected) in cases {
            let expected = expected.into_iter().map(|(file, value)| (file.to_owned(), value.to_owned())).collect();
            assert_eq!(planned(resources.clone()), Ok(expected), "{resources}");
        }
    }

    #[test]
    fn limits_for_huge_pages_that_the_guest_lacks_are_ignored_by_name() {
        let group = tempfile::tempdir().unwrap();
        fs::write(group.path().join("hugetlb.2MB.max"), "").unwrap();
        let limit = |size: &str| json!({"pageSize": size, "limit": 0});
        let mut resources: LinuxResources = serde_json::from_value(json!({
            "hugepageLimits": [limit("2MB"), limit("16GB")],
            "unified": {"hugetlb.2MB.max": "0", "hugetlb.1GB.rsvd.max": "0", "memory.high": "1"},
        }))
        .unwrap();
        let absent = drop_absent_page_sizes(&mut resources, group.path());
        let expected = [
            "linux.resources.hugepageLimits.16GB: the guest has no huge pages of this size",
            "linux.resources.unified.hugetlb.1GB: the guest has no huge pages of this size",
        ];
        assert_eq!(absent, expected);
        let left = json!({"hugepageLimits": [limit("2MB")], "unified": {"hugetlb.2MB.max": "0", "memory.high": "1"}});
        assert_eq!(serde_json::to_value(&resources).unwrap(), left);
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let cases = [
            (json!({"memory": {"limit": -2}}), "linux.resources.memory.limit: -2 is not a limit"),
            (
                json!({"memory": {"limit": 4095, "checkBeforeUpdate": true}}),
                "linux.resources.memory.limit: 4095 is less than the 4096 bytes in use",
            ),
            (
                json!({"memory": {"limit": 100, "swap": 99}}),
                "linux.resources.memory.swap: 99 is less than the memory limit 100",
            ),
            (json!({"memory": {"limit": -1, "swap": 99}}), "linux.resources.memory.swap: requires a memory limit"),
            (json!({"cpu": {"cpus": "1-2"}}), "linux.resources.cpu.cpus: the guest has 0-1, not 1-2"),
            (json!({"cpu": {"cpus": "a"}}), "linux.resources.cpu.cpus: \"a\" is not a list of numbers"),
            (json!({"cpu": {"realtimeRuntime": 5}}), "linux.resources.cpu.realtimeRuntime: not supported by cgroup v2"),
            (
                json!({"unified": {"cgroup.freeze": "1"}}),
                "linux.resources.unified.cgroup.freeze: is not the name of a limit",
            ),
            (json!({"unified": {"../x.y": "1"}}), "linux.resources.unified.../x.y: is not the name of a limit"),
        ];
        for (resources, expected) in cases {
            assert_eq!(planned(resources.clone()), Err(vec![expected.to_owned()]), "{resources}");
        }
        let both = planned(json!({"pids": {"limit": -2}, "cpu": {"mems": "1"}}));
        assert_eq!(both.unwrap_err().len(), 2);
    }

    #[test]
    fn a_rejected_write_restores_the_earlier_limits() {
        let group = tempfile::tempdir().unwrap();
        for (file, value) in [("a.max", "1\n"), ("b.max", "2\n")] {
            fs::write(group.path().join(file), value).unwrap();
        }
        let write = |file: &str| Write { field: file.into(), file: file.into(), value: "9".into() };
        let error = apply(group.path(), &[write("a.max"), write("b.max"), write("absent")]).unwrap_err();
        assert_eq!(fs::read_to_string(group.path().join("a.max")).unwrap(), "1\n");
        assert_eq!(fs::read_to_string(group.path().join("b.max")).unwrap(), "2\n");
        let error = Chain(&error).to_string();
        assert!(error.starts_with("absent: write \"9\" to absent: "), "{error}");
        apply(group.path(), &[write("a.max")]).unwrap();
        assert_eq!(fs::read_to_string(group.path().join("a.max")).unwrap(), "9\n");
    }
}
