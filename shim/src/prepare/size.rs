//! The size of a VM: what annotations, configuration and the spec's limits ask for.

use crate::config::annotations::Annotations;
use crate::config::settings::{Config, DEFAULT_MEMORY_MIB, GUEST_OVERHEAD_MIB, MAX_VCPUS, Profile};
use crate::rootfs::spec::SpecLimits;

/// The most virtual CPUs that a guest can get while it runs, if the configuration names no number: each takes memory in
/// the guest, and a thread of the host.
const SPARE_UP_TO: u32 = 8;

/// A running VM can have so many times the memory that it starts with, if the configuration names no size: QEMU keeps 96
/// KiB of its own for each GiB that a VM can have.
const GROWS_TO: u64 = 8;
/// A step in which a VM's memory grows, MiB, and that of a VM as large as `LARGE_MIB`: a block of memory as its kernel
/// divides it (arch/x86/mm/init_64.c, probe_memory_block_size). The kernel reports only whole blocks.
const STEP_MIB: u64 = 128;
const LARGE_STEP_MIB: u64 = 2048;
/// The kernel counts the gap below 4 GiB too.
const LARGE_MIB: u64 = 60 * 1024;

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostSize {
    /// CPUs that this process may use.
    pub(crate) cpus: u32,
    /// MiB.
    pub(crate) memory_mib: u64,
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Virtual CPUs of the guest.
    pub(crate) vcpus: u32,
    /// Virtual CPUs that the running guest can have.
    pub(crate) max_vcpus: u32,
    /// MiB of the guest.
    pub(crate) memory_mib: u64,
    /// MiB that the running guest can have.
    pub(crate) max_memory_mib: u64,
}

impl Size {
    /// The size of a VM's memory, MiB, that has room for `needed`, as far as the VM can grow.
    pub(crate) fn memory_for(&self, needed_mib: u64) -> u64 {
        let missing = needed_mib.saturating_sub(self.memory_mib).div_ceil(step_mib(self.memory_mib));
        let grown = missing.saturating_mul(step_mib(self.memory_mib)).saturating_add(self.memory_mib);
        grown.min(self.max_memory_mib.max(self.memory_mib))
    }
}

fn step_mib(memory_mib: u64) -> u64 {
    if memory_mib < LARGE_MIB { STEP_MIB } else { LARGE_STEP_MIB }
}

/// The size of a machine. An annotation overrides the configuration, and a CPU count overrides a profile. `max_vcpus` and
/// `max_memory_mib` cap what limits ask for. Without an annotation and a key the limits of the pod decide, then those of
/// the sandbox's first container, else the default.
pub(crate) fn size(
    config: &Config,
    annotations: &Annotations,
    pod: SpecLimits,
    first: SpecLimits,
    host: HostSize,
) -> Size {
    let limits = SpecLimits { memory: pod.memory.or(first.memory), cpus: pod.cpus.or(first.cpus) };
    let profile = annotations.profile.or(config.profile).map(Profile::vcpus);
    // A limit is no request: a larger one than a VM may have is capped.
    let cpus_of_limits = limits.cpus.map(|cpus| cpus.min(config.max_vcpus.unwrap_or(MAX_VCPUS)));
    let vcpus = annotations.vcpus.or(config.vcpus).or(profile).or(cpus_of_limits).unwrap_or(1).clamp(1, MAX_VCPUS);
    let most = config.max_memory_mib.unwrap_or(u64::MAX);
    let for_limit = |bytes: u64| bytes.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB).max(DEFAULT_MEMORY_MIB);
    let memory = limits.memory.map_or(DEFAULT_MEMORY_MIB, for_limit).min(most);
    let memory_mib = annotations.memory_mib.or(config.memory_mib).unwrap_or(memory);
    let spare = if config.board.has_spare_vcpus() { host.cpus.min(SPARE_UP_TO) } else { 0 };
    let max_vcpus = config.max_vcpus.unwrap_or(spare).max(vcpus);
    Size { vcpus, max_vcpus, memory_mib, max_memory_mib: max_memory(config, memory_mib, host.memory_mib) }
}

/// What a running VM can have, in whole steps. Huge pages would have to be free when the guest takes them.
fn max_memory(config: &Config, memory_mib: u64, host_mib: u64) -> u64 {
    if !config.board.has_spare_memory() || config.hugepages {
        return memory_mib;
    }
    let most = config.max_memory_mib.unwrap_or(memory_mib.saturating_mul(GROWS_TO)).min(host_mib);
    let step = step_mib(memory_mib);
    memory_mib + most.saturating_sub(memory_mib) / step * step
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::Board;
    use crate::vmm::factory::boards;

    fn host(cpus: u32) -> HostSize {
        HostSize { cpus, memory_mib: 16 << 10 }
    }

    fn board(name: &str) -> Board {
        boards().iter().find(|(found, _)| *found == name).unwrap().1
    }

    #[test]
    fn memory_follows_annotation_configuration_pod_container_and_default_in_that_order() {
        let limit = |bytes| SpecLimits { memory: bytes, cpus: None };
        let table = [
            (Some(100), Some(200), Some(2 << 30), Some(1 << 30), 100),
            (None, Some(200), Some(2 << 30), Some(1 << 30), 200),
            (None, None, Some(2 << 30), Some(1 << 30), 2048 + 128),
            (None, None, None, Some(1 << 30), 1024 + 128),
            (None, None, Some(1 << 20), Some(1 << 30), 512),
            (None, None, None, None, 512),
        ];
        for (annotation, memory_mib, pod, bytes, expected) in table {
            let config = Config { memory_mib, ..Config::default() };
            let wanted = Annotations { memory_mib: annotation, ..Default::default() };
            let found = size(&config, &wanted, limit(pod), limit(bytes), host(2)).memory_mib;
            assert_eq!(found, expected, "{annotation:?} {memory_mib:?} {pod:?} {bytes:?}");
        }
    }

    #[test]
    fn limits_of_containers_ask_for_no_more_than_the_configuration_allows() {
        let limits = SpecLimits { memory: Some(4 << 30), cpus: Some(8) };
        for (max_vcpus, max_memory_mib, expected) in
            [(None, None, (8, 4096 + 128)), (Some(3), Some(1024), (3, 1024)), (Some(9), Some(8192), (8, 4096 + 128))]
        {
            let config = Config { max_vcpus, max_memory_mib, ..Config::default() };
            let found = size(&config, &Annotations::default(), limits, limits, host(2));
            assert_eq!((found.vcpus, found.memory_mib), expected, "{max_vcpus:?} {max_memory_mib:?}");
        }
        let config = Config { max_memory_mib: Some(256), ..Config::default() };
        let none = SpecLimits::default();
        assert_eq!(size(&config, &Annotations::default(), none, none, host(2)).memory_mib, 256);
    }

    #[test]
    fn cpus_follow_a_count_then_a_profile_then_limits_and_the_sandbox_comes_before_the_host() {
        use Profile::{Latency, Throughput};
        // (annotation, configuration) of the count and of the profile, the limits, and what comes of it.
        type Row = ((Option<u32>, Option<u32>), (Option<Profile>, Option<Profile>), Limits, u32);
        // Of the pod and of the first container.
        type Limits = (Option<u32>, Option<u32>);
        let table: &[Row] = &[
            ((Some(5), Some(3)), (Some(Latency), Some(Throughput)), (None, Some(2)), 5),
            ((None, Some(3)), (Some(Latency), Some(Throughput)), (None, Some(2)), 3),
            ((None, None), (Some(Latency), Some(Throughput)), (None, Some(2)), 1),
            ((None, None), (Some(Throughput), Some(Latency)), (None, Some(2)), 4),
            ((None, None), (None, Some(Throughput)), (None, Some(2)), 4),
            ((None, None), (None, Some(Latency)), (None, Some(2)), 1),
            ((None, None), (None, None), (None, Some(2)), 2),
            ((None, None), (None, None), (None, Some(1000)), MAX_VCPUS),
            ((None, None), (None, None), (Some(3), Some(2)), 3),
            ((None, None), (None, None), (None, None), 1),
        ];
        for row in table {
            let ((annotation, vcpus), (profile_annotation, profile), (pod, first), expected) = *row;
            let limit = |cpus| SpecLimits { memory: None, cpus };
            let config = Config { vcpus, profile, ..Config::default() };
            let wanted = Annotations { vcpus: annotation, profile: profile_annotation, ..Default::default() };
            let found = size(&config, &wanted, limit(pod), limit(first), host(2));
            assert_eq!((found.vcpus, found.max_vcpus), (expected, expected), "{row:?}");
        }
    }

    #[test]
    fn a_running_guest_can_have_more_cpus_by_configuration_or_on_a_board_with_pci() {
        let q35 = board("q35");
        for (board, max_vcpus, vcpus, cpus, expected) in [
            (Board::default(), None, 1, 4, 1),
            (Board::default(), Some(3), 1, 4, 3),
            (Board::default(), Some(3), 5, 4, 5),
            (q35, None, 1, 4, 4),
            (q35, None, 1, 100, SPARE_UP_TO),
            (q35, None, 16, 100, 16),
            (q35, Some(1), 1, 4, 1),
        ] {
            let config = Config { board, max_vcpus, vcpus: Some(vcpus), ..Config::default() };
            let none = SpecLimits::default();
            let found = size(&config, &Annotations::default(), none, none, host(cpus));
            assert_eq!((found.vcpus, found.max_vcpus), (vcpus, expected), "{board:?} {max_vcpus:?} {vcpus} {cpus}");
        }
    }

    #[test]
    fn the_memory_of_a_running_guest_can_grow_on_a_board_with_pci_in_whole_steps() {
        for (name, hugepages, max_memory_mib, memory_mib, expected) in [
            ("microvm", false, Some(4096), 512, 512),
            ("q35", true, Some(4096), 512, 512),
            ("q35", false, None, 512, 4096),
            ("q35", false, None, 100, 100 + 5 * 128),
            ("q35", false, Some(1000), 512, 512 + 3 * 128),
            ("q35", false, Some(256), 512, 512),
            ("q35", false, Some(1 << 30), 512, 16 << 10),
            ("q35", false, None, 32 << 10, 32 << 10),
        ] {
            let config = Config {
                board: board(name),
                hugepages,
                max_memory_mib,
                memory_mib: Some(memory_mib),
                ..Config::default()
            };
            let none = SpecLimits::default();
            let found = size(&config, &Annotations::default(), none, none, host(2));
            assert_eq!(found.max_memory_mib, expected, "{name} {hugepages} {max_memory_mib:?} {memory_mib}");
        }
    }

    #[test]
    fn memory_grows_in_whole_blocks_of_the_kernel_and_no_further_than_it_can() {
        for (memory_mib, max_memory_mib, needed, expected) in [
            (512, 4096, 100, 512),
            (512, 4096, 513, 640),
            (512, 4096, 640, 640),
            (512, 4096, 5000, 4096),
            (512, 0, 5000, 512),
            (512, u64::MAX, u64::MAX, u64::MAX),
            (64 << 10, 100 << 10, (64 << 10) + 1, 66 << 10),
        ] {
            let size = Size { vcpus: 1, max_vcpus: 1, memory_mib, max_memory_mib };
            assert_eq!(size.memory_for(needed), expected, "{memory_mib} {max_memory_mib} {needed}");
        }
    }
}
