//! The limits of a container, which decide the size of a VM that is booted for it.

use oci_spec::runtime::Linux;

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
