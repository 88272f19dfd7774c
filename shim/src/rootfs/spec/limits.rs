//! The limits of a container, which decide the size of a VM that is booted for it.

use oci_spec::runtime::{Linux, LinuxResources};

/// Default period of a CPU quota, microseconds (Documentation/admin-guide/cgroup-v2.rst, `cpu.max`).
const DEFAULT_CPU_PERIOD: u64 = 100_000;

/// The limits of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpecLimits {
    /// Bytes.
    pub(crate) memory: Option<u64>,
    /// The CPU quota in whole CPUs, rounded up.
    pub(crate) cpus: Option<u32>,
}

/// Reads the limits of a spec. Zero and -1 mean no limit.
pub(super) fn limits(linux: &Linux) -> SpecLimits {
    let Some(resources) = linux.resources() else { return SpecLimits::default() };
    let memory = resources.memory().and_then(|memory| memory.limit());
    let cpus = resources.cpu().as_ref().and_then(|cpu| whole_cpus(cpu.quota()?, cpu.period()));
    SpecLimits { memory: memory.and_then(|limit| u64::try_from(limit).ok()).filter(|&limit| limit > 0), cpus }
}

/// A CPU quota in whole CPUs, rounded up. A quota of 0 or below means no limit, a period of 0 the kernel's default.
pub(crate) fn whole_cpus(quota: i64, period: Option<u64>) -> Option<u32> {
    let quota = u64::try_from(quota).ok().filter(|&quota| quota > 0)?;
    let period = period.filter(|&period| period > 0).unwrap_or(DEFAULT_CPU_PERIOD);
    u32::try_from(quota.div_ceil(period)).ok()
}

/// The limits of a container that its VM must have room for, in the form in which specs and updates set them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Bytes.
    memory: Option<i64>,
    /// Microseconds of CPU time.
    quota: Option<i64>,
    /// Per so many microseconds.
    period: Option<u64>,
    /// Processes and threads.
    pids: Option<i64>,
}

impl Demand {
    /// The limits that these resources set. Zero sets nothing.
    pub(super) fn of(resources: &LinuxResources) -> Self {
        let memory = resources.memory().and_then(|memory| memory.limit());
        let (quota, period) = resources.cpu().as_ref().map_or((None, None), |cpu| (cpu.quota(), cpu.period()));
        let pids = resources.pids().map(|pids| pids.limit());
        let file = |name: &str| resources.unified().as_ref()?.get(name).map(|text| text.trim());
        // The guest rejects what is not a number.
        let number = |text: &str| if text == "max" { Some(-1) } else { text.parse().ok() };
        let mut cpu_max = file("cpu.max").map(str::split_ascii_whitespace);
        let mut next = || cpu_max.as_mut()?.next();
        Self {
            memory: file("memory.max").and_then(number).or(memory).filter(|&limit| limit != 0),
            quota: next().and_then(number).or(quota).filter(|&quota| quota != 0),
            period: next().and_then(|text| text.parse().ok()).or(period).filter(|&period| period != 0),
            pids: file("pids.max").and_then(number).or(pids).filter(|&limit| limit != 0),
        }
    }

    /// The limits after an update that sets these.
    pub(crate) fn updated(self, new: Self) -> Self {
        let (memory, quota) = (new.memory.or(self.memory), new.quota.or(self.quota));
        Self { memory, quota, period: new.period.or(self.period), pids: new.pids.or(self.pids) }
    }

    /// Bytes, if limited.
    pub(crate) fn memory(self) -> Option<u64> {
        self.memory.and_then(|limit| u64::try_from(limit).ok())
    }

    /// Thousandths of a CPU, rounded up, if limited.
    pub(crate) fn milli_cpus(self) -> Option<u64> {
        let quota = self.quota.and_then(|quota| u64::try_from(quota).ok())?;
        let milli = (u128::from(quota) * 1000).div_ceil(u128::from(self.period.unwrap_or(DEFAULT_CPU_PERIOD)));
        Some(u64::try_from(milli).unwrap_or(u64::MAX))
    }

    /// Processes and threads, if limited.
    pub(crate) fn pids(self) -> Option<u64> {
        self.pids.and_then(|limit| u64::try_from(limit).ok())
    }

    /// The quota in microseconds, as the container's author has set it.
    pub(crate) fn quota(self) -> Option<i64> {
        self.quota
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn updates_change_what_they_set_and_zero_sets_nothing() {
        let demand = |resources| Demand::of(&serde_json::from_value(resources).unwrap());
        let before = demand(json!({"memory": {"limit": 7}, "cpu": {"quota": 150_000, "period": 50_000}}));
        assert_eq!((before.memory(), before.milli_cpus()), (Some(7), Some(3000)));
        for (resources, memory, milli) in [
            (json!({}), Some(7), Some(3000)),
            (json!({"memory": {"limit": 0}, "cpu": {"quota": 0, "period": 0}}), Some(7), Some(3000)),
            (json!({"memory": {"limit": -1}, "cpu": {"quota": -1}}), None, None),
            (json!({"cpu": {"quota": 10_001}}), Some(7), Some(201)),
            (json!({"cpu": {"period": 150_000}}), Some(7), Some(1000)),
            (json!({"unified": {"memory.max": "9", "cpu.max": "200000 100000"}}), Some(9), Some(2000)),
            (json!({"unified": {"memory.max": "max", "cpu.max": "max"}}), None, None),
            (json!({"unified": {"memory.max": "much", "cpu.max": ""}}), Some(7), Some(3000)),
            (json!({"cpu": {"quota": i64::MAX, "period": 1}}), Some(7), Some(u64::MAX)),
        ] {
            let after = before.updated(demand(resources.clone()));
            assert_eq!((after.memory(), after.milli_cpus()), (memory, milli), "{resources}");
        }
        assert_eq!(demand(json!({"cpu": {"quota": 250_000}})).milli_cpus(), Some(2500), "the kernel's period");
    }
}
