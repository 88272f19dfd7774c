//! The size of a VM: what annotations, configuration and the spec's limits ask for.

use crate::config::annotations::Annotations;
use crate::config::settings::{Config, DEFAULT_MEMORY_MIB, GUEST_OVERHEAD_MIB, MAX_VCPUS, Profile};
use crate::rootfs::spec::SpecLimits;

/// Virtual CPUs and MiB of a guest. An annotation overrides the configuration, and a CPU count overrides a profile.
/// Without either the spec's limits decide, else the default.
pub(crate) fn size(config: &Config, annotations: &Annotations, limits: SpecLimits) -> (u32, u64) {
    let profile = annotations.profile.or(config.profile).map(Profile::vcpus);
    let vcpus = annotations.vcpus.or(config.vcpus).or(profile).or(limits.cpus).unwrap_or(1).clamp(1, MAX_VCPUS);
    let for_limit = |bytes: u64| bytes.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB).max(DEFAULT_MEMORY_MIB);
    let memory = annotations.memory_mib.or(config.memory_mib).or(limits.memory.map(for_limit));
    (vcpus, memory.unwrap_or(DEFAULT_MEMORY_MIB))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_follows_annotation_configuration_limits_and_default_in_that_order() {
        let limit = |bytes| SpecLimits { memory: bytes, cpus: None };
        let table = [
            (Some(100), Some(200), Some(1 << 30), 100),
            (None, Some(200), Some(1 << 30), 200),
            (None, None, Some(1 << 30), 1024 + 128),
            (None, None, Some(1 << 20), 512),
            (None, None, None, 512),
        ];
        for (annotation, memory_mib, bytes, expected) in table {
            let config = Config { memory_mib, ..Config::default() };
            let wanted = Annotations { memory_mib: annotation, ..Default::default() };
            assert_eq!(size(&config, &wanted, limit(bytes)).1, expected, "{annotation:?} {memory_mib:?} {bytes:?}");
        }
    }

    #[test]
    fn cpus_follow_a_count_then_a_profile_then_limits_and_the_sandbox_comes_before_the_host() {
        use Profile::{Latency, Throughput};
        // (annotation, configuration) of the count and of the profile, the spec's limit, and what comes of it.
        type Row = ((Option<u32>, Option<u32>), (Option<Profile>, Option<Profile>), Option<u32>, u32);
        let table: &[Row] = &[
            ((Some(5), Some(3)), (Some(Latency), Some(Throughput)), Some(2), 5),
            ((None, Some(3)), (Some(Latency), Some(Throughput)), Some(2), 3),
            ((None, None), (Some(Latency), Some(Throughput)), Some(2), 1),
            ((None, None), (Some(Throughput), Some(Latency)), Some(2), 4),
            ((None, None), (None, Some(Throughput)), Some(2), 4),
            ((None, None), (None, Some(Latency)), Some(2), 1),
            ((None, None), (None, None), Some(2), 2),
            ((None, None), (None, None), Some(1000), MAX_VCPUS),
            ((None, None), (None, None), None, 1),
        ];
        for row in table {
            let ((annotation, vcpus), (profile_annotation, profile), cpus, expected) = *row;
            let config = Config { vcpus, profile, ..Config::default() };
            let wanted = Annotations { vcpus: annotation, profile: profile_annotation, ..Default::default() };
            assert_eq!(size(&config, &wanted, SpecLimits { memory: None, cpus }).0, expected, "{row:?}");
        }
    }
}
