//! What a sandbox's processes take on the host besides what its containers may use: docs/resources.md has the numbers.

use crate::host::cgroup::Limits;
use crate::rootfs::spec::Demand;

/// Memory of QEMU, virtiofsd, the shim and the holders, with their buffers, without the guest's memory, MiB.
const PROCESSES_MIB: u64 = 128;
/// The host's kernel memory for a file that virtiofsd has open, bytes.
const OPEN_FILE: u64 = 1536;
/// CPU time of the guest's kernel and init, of virtiofsd and the shim, in thousandths of a CPU.
const MILLI_CPUS: u64 = 500;
/// Processes and threads of QEMU, virtiofsd, the shim and the holders.
const PIDS: u64 = 1024;

/// The memory that a sandbox's processes may take together, bytes. `cache_mib` is the VMM's own cache, and `copied` what
/// copies of verified files take.
pub(super) fn memory(vm_mib: u64, cache_mib: u64, open_files: u64, copied: u64) -> u64 {
    let mib = vm_mib.saturating_add(cache_mib).saturating_add(PROCESSES_MIB);
    mib.saturating_mul(1 << 20).saturating_add(open_files.saturating_mul(OPEN_FILE)).saturating_add(copied)
}

/// The limits of a sandbox's cgroup. A resource is limited if every container limits it. The VM keeps its size whatever
/// the limits of its containers are, so the limit of memory is always `memory`.
pub(crate) fn limits(demands: impl Iterator<Item = Demand> + Clone, memory: u64) -> Limits {
    let sum = |limit: fn(Demand) -> Option<u64>| {
        let limits: Option<Vec<u64>> = demands.clone().map(limit).collect();
        let limits = limits.filter(|limits| !limits.is_empty())?;
        Some(limits.into_iter().fold(0, u64::saturating_add))
    };
    Limits {
        memory: sum(Demand::memory).map(|_| memory),
        milli_cpus: sum(Demand::milli_cpus).map(|milli| milli.saturating_add(MILLI_CPUS)),
        pids: sum(Demand::pids).map(|pids| pids.saturating_add(PIDS)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::rootfs::spec::resources;

    #[test]
    fn a_sandbox_is_limited_where_all_its_containers_are() {
        let demand = |value: &Value| resources::update(&serde_json::to_vec(value).unwrap()).unwrap().demand;
        let full = json!({"memory": {"limit": 1 << 26}, "cpu": {"quota": 50_000}, "pids": {"limit": 100}});
        let cpu = json!({"cpu": {"quota": 100_000, "period": 50_000}});
        let unlimited = json!({"memory": {"limit": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}});
        let some = |memory, milli_cpus, pids| Limits { memory, milli_cpus, pids };
        for (containers, expected) in [
            (vec![], some(None, None, None)),
            (vec![&full], some(Some(7), Some(1000), Some(1124))),
            (vec![&full, &full], some(Some(7), Some(1500), Some(1224))),
            (vec![&full, &cpu], some(None, Some(3000), None)),
            (vec![&full, &unlimited], some(None, None, None)),
        ] {
            assert_eq!(limits(containers.iter().map(|value| demand(value)), 7), expected, "{containers:?}");
        }
    }

    #[test]
    fn the_memory_includes_the_vm_its_processes_and_open_files() {
        assert_eq!(memory(512, 256, 131_072, 7), ((512 + 256 + 128 + 192) << 20) + 7);
        assert_eq!(memory(u64::MAX, 1, 1, 1), u64::MAX);
    }
}
