//! The kernel parameters that a configuration may set: those that tune a guest. Parameters that could keep husk from
//! booting the guest, from detecting its end or from enforcing its limits are rejected. The names are from
//! Documentation/admin-guide/kernel-parameters.txt.

use husk_protos::param;

/// The allowed parameters; `*` at the end stands for any continuation.
///
/// Besides husk's own, the list omits parameters of hardware that a VM does not have, of modules (the kernel has none),
/// of systemd or a distribution's initramfs (the init is husk's), and those that disable what limits or statistics of
/// containers need (`cgroup_disable`, `psi`, `swapaccount`).
const ALLOWED: &[&str] = &[
    // The kernel's log.
    "quiet",
    "loglevel",
    "ignore_loglevel",
    "log_buf_len",
    "initcall_debug",
    "printk.*",
    // Mitigations of processor vulnerabilities, and hardening.
    "mitigations",
    "nosmt",
    "pti",
    "nopti",
    "spectre_v2",
    "spec_store_bypass_disable",
    "retbleed",
    "init_on_alloc",
    "init_on_free",
    "slab_nomerge",
    "slub_debug",
    "randomize_kstack_offset",
    "oops",
    // Memory.
    "transparent_hugepage",
    "transparent_hugepage_shmem",
    "hugepages",
    "hugepagesz",
    "default_hugepagesz",
    // Clock and entropy.
    "clocksource",
    "random.trust_cpu",
    // Sysctls, which the kernel sets before the init starts.
    "sysctl.*",
    "ipv6.*",
    "workqueue.*",
];

/// Parameters that husk sets itself, and the reason why a configuration may not.
const RESERVED: &[(&[&str], &str)] = &[
    (
        &["console", "earlycon", "earlyprintk", "keep_bootcon"],
        "would redirect the console, which husk records in console.log",
    ),
    (&["panic", "reboot", "sysctl.kernel.panic"], "changes how the guest ends, and husk would not detect its end"),
    (
        &[
            "init",
            "rdinit",
            "root",
            "rootfstype",
            "rootflags",
            "rootdelay",
            "rootwait",
            "ro",
            "rw",
            "initrd",
            "noinitrd",
        ],
        "would replace husk's init",
    ),
    (
        &["mem", "memmap", "nr_cpus", "maxcpus", "possible_cpus", "nosmp", "numa"],
        "changes the VM's size: use memory_mib, vcpus or profile",
    ),
    (
        &["acpi", "pci", "noapic", "nolapic", "virtio_mmio.*", "no_timer_check", "noreplace_smp", "noreplace_returns"],
        "describes the VM's board: use machine",
    ),
    (
        &[
            "tsc",
            "tsc_early_khz",
            "lapic_timer_khz",
            "norandmaps",
            "randmaps_once",
            "sysctl.kernel.randomize_va_space",
            "rcupdate.*",
        ],
        "is set by husk for a fast boot",
    ),
];

/// Limit for all configured parameters together, bytes. The kernel cuts its command line off at 2048 bytes
/// (COMMAND_LINE_SIZE) without a message, and the devices of a microvm are at its end. husk's own parameters and those
/// devices take less than the other half.
const MAX_BYTES: usize = 1024;

/// Checks a list of parameters.
///
/// # Errors
///
/// Every rejected parameter with the reason.
pub(super) fn check(params: &[&str]) -> Result<Vec<String>, String> {
    let rejected: Vec<String> =
        params.iter().filter_map(|param| Some(format!("{param:?} {}", rejection(param)?))).collect();
    if !rejected.is_empty() {
        return Err(rejected.join(", "));
    }
    let length: usize = params.iter().map(|param| param.len() + 1).sum();
    if length > MAX_BYTES {
        return Err(format!("all parameters together have {length} bytes, at most {MAX_BYTES} are allowed"));
    }
    Ok(params.iter().map(|param| (*param).to_owned()).collect())
}

/// Why a parameter is rejected, if it is.
fn rejection(text: &str) -> Option<String> {
    // A quotation mark would extend a value over the following parameters.
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"') {
        return Some("is not a single kernel parameter".to_owned());
    }
    let name = text.split_once('=').map_or(text, |(name, _)| name);
    // The kernel treats dashes as underscores, and allows slashes between the parts of a sysctl.
    let mut name = name.replace('-', "_");
    if name.starts_with("sysctl") {
        let parts: Vec<&str> = name.split(['.', '/']).filter(|part| !part.is_empty()).collect();
        name = parts.join(".");
    }
    if name.starts_with(param::PREFIX) {
        return Some("is reserved for husk's init".to_owned());
    }
    let matches = |pattern: &&str| match pattern.strip_suffix('*') {
        Some(beginning) => name.strip_prefix(beginning).is_some_and(|rest| !rest.is_empty()),
        None => name == **pattern,
    };
    if let Some((_, why)) = RESERVED.iter().find(|(names, _)| names.iter().any(matches)) {
        return Some((*why).to_owned());
    }
    if ALLOWED.iter().any(matches) {
        return None;
    }
    Some(format!("is not one of {}", ALLOWED.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tuning_is_allowed_and_what_husk_sets_is_rejected() {
        let table = [
            ("loglevel=7", None),
            ("mitigations=off", None),
            ("transparent_hugepage=always", None),
            ("hugepages=16", None),
            ("init-on-alloc=1", None),
            ("nosmt", None),
            ("sysctl.vm.swappiness=7", None),
            ("sysctl/net/core/somaxconn=7", None),
            ("sysctl.=7", Some("is not one of quiet loglevel")),
            ("console=ttyS1", Some("would redirect the console")),
            ("panic=0", Some("changes how the guest ends")),
            ("sysctl.kernel.panic=0", Some("changes how the guest ends")),
            ("sysctl.kernel/panic=0", Some("changes how the guest ends")),
            ("sysctl/kernel.panic=0", Some("changes how the guest ends")),
            ("sysctl.kernel.//panic=0", Some("changes how the guest ends")),
            ("reboot=k", Some("changes how the guest ends")),
            ("init=/bin/sh", Some("would replace husk's init")),
            ("rdinit=/bin/sh", Some("would replace husk's init")),
            ("root=/dev/vda", Some("would replace husk's init")),
            ("rw", Some("would replace husk's init")),
            ("husk.log=trace", Some("is reserved for husk's init")),
            ("mem=64M", Some("use memory_mib")),
            ("nr-cpus=1", Some("use memory_mib, vcpus or profile")),
            ("acpi=on", Some("use machine")),
            ("sysctl.kernel.randomize_va_space=0", Some("is set by husk")),
            ("tsc=unstable", Some("is set by husk")),
            ("cgroup_disable=memory", Some("is not one of quiet loglevel")),
            ("systemd.unit=rescue.target", Some("is not one of quiet loglevel")),
            ("loglevels=7", Some("is not one of quiet loglevel")),
            ("--", Some("is not one of quiet loglevel")),
            ("=1", Some("is not one of quiet loglevel")),
            ("a b", Some("is not a single kernel parameter")),
            ("", Some("is not a single kernel parameter")),
            ("loglevel=\"7", Some("is not a single kernel parameter")),
        ];
        for (param, expected) in table {
            match (rejection(param), expected) {
                (None, None) => {}
                (Some(why), Some(expected)) => assert!(why.contains(expected), "{param}: {why}"),
                (why, _) => panic!("{param}: {why:?}"),
            }
        }
    }

    #[test]
    fn every_rejected_parameter_is_reported() {
        let why = check(&["quiet", "panic=0", "foo"]).unwrap_err();
        assert!(
            why.starts_with("\"panic=0\" changes how the guest ends") && why.contains(", \"foo\" is not one of"),
            "{why}"
        );
        assert_eq!(check(&["quiet", "loglevel=3"]).unwrap(), ["quiet", "loglevel=3"]);
    }

    #[test]
    fn of_husks_own_parameters_only_quiet_may_be_configured() {
        let own = crate::vmm::kernel_cmdline::COMMON;
        let allowed: Vec<_> = own.iter().filter(|param| rejection(param).is_none()).collect();
        assert_eq!(allowed, [&"quiet"]);
    }

    #[test]
    fn configured_parameters_leave_room_for_husks_own() {
        let long = format!("loglevel={}", "1".repeat(MAX_BYTES));
        assert_eq!(check(&[&long]).unwrap_err(), "all parameters together have 1034 bytes, at most 1024 are allowed");
    }
}
